"""Promises about reading adapters: what fits is read exactly, everything else is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.backends.quantized_folder import random_llama
from tests.lora import write_adapter
from toolchain.adapters import open_adapter
from toolchain.errors import ArtifactError
from toolchain.family import LlamaConfig, read_config


@pytest.fixture(scope="module")
def model() -> transformers.PreTrainedModel:
    return random_llama(kv_heads=2)


@pytest.fixture(scope="module")
def config(model: transformers.PreTrainedModel) -> LlamaConfig:
    told = json.loads(model.config.to_json_string(use_diff=False))
    return read_config({**told, "architectures": ["LlamaForCausalLM"]}, "config.json")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_matrices_are_read_as_they_are_and_scaled_once(
    tmp_path: Path, model: transformers.PreTrainedModel, config: LlamaConfig, dtype: torch.dtype
) -> None:
    folder = write_adapter(tmp_path / "a", model, rank=4, alpha=12, targets=("up_proj",), dtype=dtype)
    adapter = open_adapter("a", folder, config)
    saved = load_file(folder / "adapter_model.safetensors")
    first, second = adapter.matrices(1, "mlp.up_proj")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"
    assert np.array_equal(first, saved[name.format("A")].float().numpy())
    assert np.array_equal(second, saved[name.format("B")].float().numpy() * 3)
    assert not adapter.has(1, "mlp.gate_proj")


@pytest.mark.parametrize(
    ("told", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"r": 5}, r"for this model and r 5 it must be \[5, 256\]"),
        ({"r": 0}, "not a rank"),
        ({"lora_alpha": "x"}, "lora_alpha"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(
    tmp_path: Path, model: transformers.PreTrainedModel, config: LlamaConfig, told: dict[str, Any], named: str
) -> None:
    folder = write_adapter(tmp_path / "a", model, targets=("q_proj",), **told)
    with pytest.raises(ArtifactError, match=named):
        open_adapter("a", folder, config)


def test_what_is_not_of_this_model_is_refused_with_its_name(
    tmp_path: Path, model: transformers.PreTrainedModel, config: LlamaConfig
) -> None:
    folder = write_adapter(tmp_path / "a", model, targets=("q_proj",))
    file = folder / "adapter_model.safetensors"
    right = {name: tensor.clone() for name, tensor in load_file(file).items()}
    one = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    for changed, named in (
        ({**right, "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 256)}, "lm_head"),
        ({**right, one.replace("layers.0", "layers.7"): right[one].clone()}, r"layers\.7"),
        ({name: tensor for name, tensor in right.items() if name != one}, "has lora_A alone"),
        ({**right, one: right[one].to(torch.int32)}, "I32"),
        ({}, "no matrices"),
    ):
        save_file(changed, file)
        with pytest.raises(ArtifactError, match=named):
            open_adapter("a", folder, config)
    save_file({**right, one: torch.full_like(right[one], float("nan"))}, file)
    with pytest.raises(ArtifactError, match="not finite"):
        open_adapter("a", folder, config).matrices(0, "self_attn.q_proj")


def test_pickled_weights_are_not_read(tmp_path: Path, model: transformers.PreTrainedModel, config: LlamaConfig) -> None:
    folder = write_adapter(tmp_path / "a", model)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ArtifactError, match="can run code"):
        open_adapter("a", folder, config)
    with pytest.raises(ArtifactError, match="adapter_config"):
        open_adapter("a", tmp_path / "nowhere", config)
