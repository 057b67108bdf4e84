"""Quantized folders of small random models, and the TensorRT-LLM checkpoints made from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.quantizers.unified_folder import dense_of, tensors_of
from toolchain.backends.tensorrt_llm import TensorRtLlmCheckpoint, write
from toolchain.checkpoint import Checkpoint
from toolchain.errors import PlanError, ScalellmError

MODELS: dict[str, dict[str, Any]] = {
    "gqa": {"dtype": "bfloat16"},
    "mha": {"num_key_value_heads": 4},
    "tied": {"num_key_value_heads": 1, "tie_word_embeddings": True, "vocab_size": 323},
    "biased": {"attention_bias": True},
    "qwen2": {"architecture": "Qwen2ForCausalLM"},
    "biased-bf16": {"dtype": "bfloat16", "attention_bias": True},
    "biased-fp32": {"dtype": "float32", "attention_bias": True},
}
WAYS: dict[str, dict[str, Any]] = {
    "none": {"weights": "none"},
    "fp8": {"weights": "fp8", "kv": "fp8"},
    "int4": {"weights": "int4", "group_size": 64},
    "awq": {"weights": "int4", "group_size": 64, "method": "awq"},
    "int8": {"weights": "int8"},
    "int8-sq": {"weights": "int8_sq"},
    "w4a8": {"weights": "int4_fp8"},
}
SPLITS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)]
Folders = Callable[..., Path]


def written(folder: Path, out: Path, **choices: Any) -> Path:
    write(Checkpoint.open(folder), out, **choices)
    return out


def rank(folder: Path, number: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"rank{number}.safetensors")


def same_numbers(folder: Path, unified_folder: Path) -> None:
    """The dense float32 weights of both, bit for bit."""
    expected = dense_of(unified_folder)
    expected.setdefault("lm_head.weight", expected["model.embed_tokens.weight"])
    found = dict(TensorRtLlmCheckpoint.open(folder).dense())
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert np.array_equal(found[name], tensor.numpy()), name


def quantization(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "config.json").read_text())["quantization"]
    return found


def equal_scales(folder: Path, out: Path) -> Path:
    """The folder with one weight scale for all matrices, so that it can be exported however it was quantized."""
    return changed(folder, out, lambda name, one: torch.tensor(0.25) if name.endswith(".weight_scale") else one)


def changed(folder: Path, out: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Path:
    """A copy of a folder, each tensor as ``change`` returns it, or without it."""
    out.mkdir()
    for file in folder.iterdir():
        if not file.name.startswith(("model", "stamp")):
            (out / file.name).write_bytes(file.read_bytes())
    tensors = {name: change(name, one) for name, one in tensors_of(folder).items()}
    save_file({name: one for name, one in tensors.items() if one is not None}, out / "model.safetensors")
    return out


def refused(folder: Path, out: Path, **choices: Any) -> ScalellmError:
    with pytest.raises(PlanError) as caught:
        written(folder, out, **choices)
    assert not out.exists()
    return caught.value
