"""A machine with fake programs on PATH."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hosts.fakes import Programs


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Programs]:
    """``programs("trtllm-build", "nvidia-smi")`` -> those programs, on the PATH of this process and of its children."""

    def install(*names: str, **options: object) -> Programs:
        made = Programs(tmp_path / "bin", *names, **options)  # type: ignore[arg-type]
        for name, value in made.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        return made

    return install
