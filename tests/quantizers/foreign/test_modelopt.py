"""NVIDIA's unified folders: read as they are, or copied where they deviate; what they cannot mean for us is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.backends.quantized_folder import random_llama, write_quantized
from tests.quantizers.foreign.adopted import adopt, assert_same, quantization_of, tensors_of
from toolchain.checkpoint import Checkpoint
from toolchain.errors import PlanError
from toolchain.quantizers import foreign

PRODUCER = {"name": "modelopt", "version": "0.47.0"}


def state(folder: Path, **quantization: object) -> None:
    """Write hf_quant_config.json as ModelOpt does."""
    document = {"producer": PRODUCER, "quantization": {"exclude_modules": ["lm_head"], **quantization}}
    (folder / "hf_quant_config.json").write_text(json.dumps(document))


def state_in_config(folder: Path, **settings: object) -> None:
    """Say it in config.json only."""
    raw = json.loads((folder / "config.json").read_text())
    base = {"quant_method": "modelopt", "producer": PRODUCER, "ignore": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": base | settings}))
    (folder / "hf_quant_config.json").unlink()


@pytest.fixture
def fp8(tmp_path) -> Path:
    source = write_quantized(random_llama(), tmp_path / "fp8", "fp8")
    for layer in range(2):
        for letter in "kv":
            name = f"model.layers.{layer}.self_attn.{letter}_proj.{letter}_scale"
            source.tensors[name] = torch.tensor(0.25 + layer)
    for name in [name for name in source.tensors if name.endswith("weight_scale")]:
        source.tensors[name.replace("weight_scale", "input_scale")] = torch.tensor(0.5)
    save_file(source.tensors, source.path / "model.safetensors", {"format": "pt"})
    state(source.path, quant_algo="FP8", kv_cache_quant_algo="FP8")
    return source.path


def test_a_published_fp8_folder_is_used_as_it_is(fp8):
    found = foreign.identify(fp8)
    assert (found.format, found.use, found.weights, found.kv) == ("modelopt", "direct", "fp8", "fp8")
    assert found.producer == "modelopt 0.47.0"
    assert foreign.open_foreign(fp8) is None


def test_an_fp8_folder_that_says_so_in_config_json_only_is_copied(fp8, tmp_path):
    before = tensors_of(fp8)
    weights = {"num_bits": 8, "type": "float", "dynamic": False}
    state_in_config(fp8, quant_algo="FP8", config_groups={"group_0": {"weights": weights}}, kv_cache_scheme=weights)
    assert foreign.identify(fp8).use == "import"
    target = adopt(fp8, tmp_path / "out")
    assert_same(tensors_of(target), before)
    assert quantization_of(target)["quant_algo"] == "FP8"
    assert quantization_of(target)["kv_cache_quant_algo"] == "FP8"
    assert Checkpoint.open(target).quantization.kv_cache_quant_algo == "FP8"


def test_scalars_of_shape_1_become_scalars(fp8, tmp_path):
    before = tensors_of(fp8)
    changed = {name: tensor.reshape(1) if not tensor.shape else tensor for name, tensor in before.items()}
    save_file(changed, fp8 / "model.safetensors", {"format": "pt"})
    assert_same(tensors_of(adopt(fp8, tmp_path / "out")), before)


@pytest.mark.parametrize("pre_quant", [False, True])
def test_an_int4_folder_that_does_not_state_its_group_size_is_told_by_its_shapes(tmp_path, pre_quant):
    source = write_quantized(random_llama(), tmp_path / "int4", "int4", group=64, pre_quant=pre_quant)
    state_in_config(source.path, quant_algo="W4A16_AWQ")
    target = adopt(source.path, tmp_path / "out")
    assert_same(tensors_of(target), source.tensors)
    assert quantization_of(target)["group_size"] == 64
    assert quantization_of(target)["pre_quant_scale"] is pre_quant


@pytest.mark.parametrize(
    ("quantization", "reason"),
    [
        ({"quant_algo": "NVFP4"}, "NVFP4"),
        ({"quant_algo": "FP8_PB_WO"}, "FP8_PB_WO"),
        ({"quant_algo": "MIXED_PRECISION"}, "MIXED_PRECISION"),
        ({"quant_algo": "W4A16_AWQ", "has_zero_point": True}, "zero points"),
        ({"quant_algo": "FP8", "kv_cache_quant_algo": "NVFP4"}, "cache is NVFP4"),
        ({"quant_algo": "FP8", "exclude_modules": ["lm_head", "*.down_proj"]}, r"'\*\.down_proj' unquantized"),
        ({"quant_algo": "FP8", "exclude_modules": ["model.layers.1.*"]}, r"'model\.layers\.1\.\*' unquantized"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path, quantization, reason):
    source = write_quantized(random_llama(), tmp_path / "fp8", "fp8")
    state(source.path, **quantization)
    if "exclude_modules" in quantization:
        source.tensors["model.layers.1.mlp.down_proj.weight"] = torch.ones(256, 512, dtype=torch.float16)
        save_file(source.tensors, source.path / "model.safetensors", {"format": "pt"})
    assert foreign.identify(source.path).use == "refused"
    with pytest.raises(PlanError, match=reason):
        adopt(source.path, tmp_path / "out")
