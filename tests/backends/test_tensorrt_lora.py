"""Adapters as TensorRT-LLM reads them, against the steps of NVIDIA's examples/hf_lora_convert.py, written down anew."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.backends.quantized_folder import random_llama
from tests.lora import write_adapter
from toolchain.adapters import open_adapter
from toolchain.backends.tensorrt_llm.adapters import MODULES, write_adapters
from toolchain.errors import ArtifactError
from toolchain.family import read_config

IDS = {"attn_q": 1, "attn_k": 2, "attn_v": 3, "attn_dense": 4, "mlp_h_to_4h": 5, "mlp_4h_to_h": 6, "mlp_gate": 7}
NAMES = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_dense",
    "gate_proj": "mlp_h_to_4h",
    "down_proj": "mlp_4h_to_h",
    "up_proj": "mlp_gate",
}
MODEL = random_llama(kv_heads=2)
CONFIG = read_config(
    {**json.loads(MODEL.config.to_json_string(use_diff=False)), "architectures": ["LlamaForCausalLM"]}, "config.json"
)


def converted(folder: Path) -> dict[tuple[int, int], torch.Tensor]:
    """(module, layer) -> A and B times alpha / r in one row, f16."""
    told = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, first in tensors.items():
        if "lora_A" in name:
            words = name.split(".")
            second = tensors[name.replace("lora_A", "lora_B")] * (told["lora_alpha"] / told["r"])
            row = torch.cat([first.flatten(), second.flatten()]).to(torch.float16)
            found[IDS[NAMES[words[-3]]], int(words[words.index("layers") + 1])] = row
    return found


def test_each_row_is_what_nvidias_converter_writes(tmp_path: Path) -> None:
    folders = [
        write_adapter(tmp_path / "a", MODEL, rank=4, alpha=12),
        write_adapter(tmp_path / "b", MODEL, rank=2, targets=("k_proj", "up_proj"), seed=1),
    ]
    write_adapters([open_adapter(one.name, one, CONFIG) for one in folders], CONFIG, tmp_path / "out")
    for task, folder in enumerate(folders, start=1):
        place = tmp_path / "out" / "lora" / str(task)
        weights, keys = (np.load(place / f"model.lora_{name}.npy") for name in ("weights", "config"))
        expected = converted(folder)
        assert (weights.dtype, keys.dtype) == (np.float16, np.int32)
        assert weights.shape == (1, len(expected), max(map(len, expected.values())))
        assert keys.shape == (1, len(expected), 3)
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        for row, (module, layer, size) in zip(weights[0], keys[0].tolist(), strict=True):
            wanted = expected.pop((module, layer))
            assert size == rank
            assert np.array_equal(row[: len(wanted)], wanted.numpy())
            assert not row[len(wanted) :].any()
        assert not expected
    assert {name.split(".")[1]: IDS[NAMES[name.split(".")[1]]] for name in MODULES} == {
        name.split(".")[1]: number for name, number in MODULES.items()
    }


def test_numbers_beyond_16_bits_are_refused(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", MODEL, targets=("q_proj",), size=1e5)
    with pytest.raises(ArtifactError, match="16 bits"):
        write_adapters([open_adapter("a", folder, CONFIG)], CONFIG, tmp_path / "out")
