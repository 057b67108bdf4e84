"""What our quantizers write, rewritten into the layout of compressed-tensors and loaded by transformers through it.

A third reading beside ``unified_folder``: here the library of the vLLM project unpacks and multiplies. Its layout has
no pre_quant_scale, so AWQ is not among them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.quantizers.calibrated import random_samples
from tests.quantizers.unified_folder import logits_of, model_of, tensors_of
from tests.stages.test_quantize_calibrated import calibrate

WAYS: dict[str, dict[str, Any]] = {
    "int4-rtn": {"weights": "int4", "group_size": 64, "scales": "mse", "kv": "fp16", "method": "rtn"},
    "int4-gptq": {"weights": "int4", "group_size": 128, "scales": "mse", "kv": "fp16", "method": "gptq"},
    "fp8": {"weights": "fp8", "group_size": 128, "scales": "mse", "kv": "fp16"},
}


def rewritten(made: Path, target: Path) -> Path:
    """Its layout: int4 as eight codes + 8 in an int32 along the inputs, lowest bits first; scales as they are."""
    target.mkdir()
    tensors = {}
    for name, tensor in tensors_of(made).items():
        module, _, kind = name.rpartition(".")
        if tensor.dtype == torch.uint8:
            both = np.stack((tensor.numpy() & 15, tensor.numpy() >> 4), 1).reshape(-1, tensor.shape[1])
            codes = (both.astype(np.uint32) ^ 8).reshape(len(both), -1, 8)  # two's complement -> offset 8
            packed = np.bitwise_or.reduce(codes << (4 * np.arange(8, dtype=np.uint32)), axis=2)
            tensors[f"{module}.weight_packed"] = torch.from_numpy(packed.view(np.int32))
            tensors[f"{module}.weight_shape"] = torch.tensor(both.shape)
        elif kind == "weight_scale":
            tensors[name] = tensor if tensor.ndim else tensor.view(1)
        elif kind != "input_scale":
            tensors[name] = tensor if tensor.dtype == torch.float8_e4m3fn else tensor.float()
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    raw = json.loads((made / "config.json").read_text())
    quantized = json.loads((made / "hf_quant_config.json").read_text())["quantization"]
    group = quantized.get("group_size")
    four = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": group}
    eight = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    weights = {"symmetric": True, "dynamic": False, **(four if group else eight)}
    raw["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if group else "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    raw.pop("torch_dtype", None)
    (target / "config.json").write_text(json.dumps(raw | {"dtype": "float32"}))
    return target


@pytest.mark.parametrize("way", WAYS)
def test_transformers_gives_the_same_logits_through_compressed_tensors(
    random_llama: Callable[..., Path], tmp_path: Path, way: str
) -> None:
    from transformers import AutoModelForCausalLM

    made = calibrate(random_llama(dtype="bfloat16"), tmp_path / "made", **WAYS[way])
    ids = torch.from_numpy(random_samples(2, 64, seed=3).token_ids)
    folder = rewritten(made, tmp_path / "rewritten")
    found = logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), ids)
    expected = logits_of(model_of(made), ids)
    assert torch.equal(found, expected)
