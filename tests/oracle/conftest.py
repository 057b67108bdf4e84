"""ModelOpt's exports, which `make test-oracle` makes, and our own results on the same models and token ids."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.quantizers.calibrated import samples_of
from tests.quantizers.unified_folder import tensors_of
from toolchain import workspace
from toolchain.checkpoint import Checkpoint
from toolchain.progress import Silent
from toolchain.stages.quantize import quantize

FOLDER = "SCALELLM_ORACLE"
"""The environment variable that names the exports. Without it these tests are skipped; with it they may not be."""
SCRIPT = Path(__file__).with_name("export_with_modelopt.py")
MODELS = ("mha-fp16", "gqa-llama3-bf16", "tied-gqa-bf16")


@pytest.fixture(scope="session")
def exports() -> Path:
    """The folder that the script filled."""
    if FOLDER not in os.environ:
        pytest.skip("compares with NVIDIA ModelOpt, which needs an environment of its own: make test-oracle")
    folder = Path(os.environ[FOLDER])
    stamp = json.loads((folder / "stamp.json").read_text())
    assert stamp["script"] == hashlib.sha256(SCRIPT.read_bytes()).hexdigest(), f"{folder} is old: make test-oracle"
    return folder


@pytest.fixture(scope="session", params=MODELS)
def theirs(request: pytest.FixtureRequest, exports: Path) -> Path:
    """The folder of one model."""
    folder: Path = exports / request.param
    return folder


@pytest.fixture(scope="session")
def our_folders(exports: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Callable[..., Path]]:
    """``our_folders("mha-fp16")(weights="fp8", ...)`` -> what our stage makes of that model on the same token ids."""
    made: dict[str, Path] = {}

    def of(model: str) -> Callable[..., Path]:
        ids = load_file(exports / model / "ids.safetensors")["ids"]

        def make(**choices: Any) -> Path:
            name = f"{model} {sorted(choices.items())}"
            if name not in made:
                target = tmp_path_factory.mktemp("ours") / "made"
                words = {"group_size": 128, "scales": "modelopt", "kv": "fp16", "compute": "model"} | choices
                with workspace.draft(target, "quantize", {"name": name}) as draft:
                    source = Checkpoint.open(exports / model / "hf")
                    quantize(source, draft, progress=Silent(), samples=samples_of(ids), **words)
                    draft.commit(versions={}, recipe="")
                made[name] = target
            return made[name]

        return make

    return of


@pytest.fixture(scope="session")
def ours(theirs: Path, our_folders: Callable[[str], Callable[..., Path]]) -> Callable[..., Path]:
    """``ours(weights="fp8", ...)`` -> our folder of the model of ``theirs``."""
    return our_folders(theirs.name)


def differing(found: Path | dict[str, torch.Tensor], expected: Path | dict[str, torch.Tensor]) -> dict[str, int]:
    """Name -> bytes that differ, of tensors of two folders; -1 for another dtype or shape, or a missing tensor."""
    left, right = (one if isinstance(one, dict) else tensors_of(one) for one in (found, expected))
    different = {}
    for name in sorted({*left, *right}):
        one, other = left.get(name), right.get(name)
        if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
            different[name] = -1
        elif count := int((as_bytes(one) != as_bytes(other)).sum()):
            different[name] = count
    return different


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
