"""Quantized folders for the tests of TensorRT-LLM checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.backends.trtllm_folders import MODELS, WAYS, Folders
from tests.quantizers.calibrated import random_samples
from toolchain import workspace
from toolchain.checkpoint import Checkpoint
from toolchain.progress import Silent
from toolchain.stages.quantize import quantize


@pytest.fixture(scope="session")
def unified(random_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """``unified("gqa", "awq")`` -> a model's quantized folder; all but "none" are calibrated on two short rows."""
    made: dict[str, Path] = {}

    def make(model: str, way: str, **more: Any) -> Path:
        name = f"{model} {way} {sorted(more.items())}"
        if name not in made:
            source = Checkpoint.open(random_llama(**MODELS[model]))
            words = {"group_size": 128, "scales": "modelopt", "kv": "fp16"} | WAYS[way] | more
            words["samples"] = words.get("samples", None if way == "none" else random_samples(2, 16))
            target = tmp_path_factory.mktemp("unified") / "made"
            with workspace.draft(target, "quantize", {"name": name}) as draft:
                quantize(source, draft, progress=Silent(), **words)
                draft.commit(versions={}, recipe="")
            made[name] = target
        return made[name]

    return make
