"""A registry, a deployment, and the verb that exports it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from tests.exports.packages import DEPLOYMENT, push
from toolchain.cli import verbs

Export = Callable[..., dict[str, Any]]
INSTALL = "scalellm-toolchain[gateway] @ https://example.com/scalellm_toolchain-0.1.0-py3-none-any.whl"
FLAGS: dict[str, list[str]] = {"skyserve": ["--target-qps", "2"], "kubernetes": ["--claim", "models"], "compose": []}
"""What each format wants beside the deployment."""


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    """With a package for each of two kinds of GPU."""
    folder = tmp_path / "registry"
    push(folder, "rtx4090", device="rtx4090", sm=89)
    push(folder, "l4", device="l4", sm=89)
    return folder


@pytest.fixture
def export(tmp_path: Path, registry: Path, monkeypatch: pytest.MonkeyPatch) -> Export:
    """``export("kubernetes", DEPLOYMENT text, flags...)`` -> {file: text or what the YAML or JSON in it says}."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SCALELLM_REGISTRY", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(format_: str, text: str = DEPLOYMENT, *flags: object, raw: bool = False) -> dict[str, Any]:
        file, out = tmp_path / "DEPLOYMENT.yaml", tmp_path / "out"
        file.write_text(text)
        where = [] if "--registry" in flags else ["--registry", str(registry)]
        where += [] if "--install" in flags else ["--install", INSTALL]
        argv = ["deploy", "export", format_, str(file), "-o", str(out), *where, *map(str, flags), "--json"]
        done = CliRunner().invoke(verbs, argv, standalone_mode=False)
        if done.exception:
            raise done.exception
        told = json.loads(done.stdout)
        texts = {name: (out / name).read_text() for name in told["files"]}
        return texts if raw else {"told": told, **{name: _read(name, body) for name, body in texts.items()}}

    return run


def _read(name: str, text: str) -> Any:
    if name.endswith((".yaml", ".yml")):
        return yaml.safe_load(text)
    return json.loads(text) if name.endswith(".json") else text
