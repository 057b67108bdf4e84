"""Folders whose matrices compressed-tensors 0.20.0 itself packed, against what it says that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
    preset_name_to_scheme,
)
from safetensors.torch import save_file

from tests.backends.quantized_folder import random_llama
from tests.quantizers.foreign.adopted import adopt, assert_same, dequantized, quantization_of, tensors_of
from tests.quantizers.foreign.folders import Written, write
from toolchain.checkpoint import Checkpoint
from toolchain.errors import ArtifactError, PlanError
from toolchain.quantization import WEIGHTS
from toolchain.quantizers import foreign

needs_int8 = pytest.mark.skipif("int8" not in WEIGHTS, reason="no int8 weights in the table of quantizations")

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
STATIC = FP8 | {"dynamic": False}
DYNAMIC = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}


def settings(weights: dict[str, Any], kind: str, inputs: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    base = {"quant_method": "compressed-tensors", "format": kind, "quantization_status": "compressed"}
    return base | {"config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None} | more


def packed(
    weights: dict[str, Any],
    kind: str,
    *,
    scale_dtype: torch.dtype = torch.bfloat16,
    more: Callable[[str], dict[str, torch.Tensor]] = lambda _module: {},
    zero: Callable[[tuple[int, ...]], torch.Tensor] | None = None,
) -> Any:
    """A ``Pack`` that compressed-tensors does; what a matrix stands for is what it decompresses to in float32."""
    compressor = BaseCompressor.get_value_from_registry(kind)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))

    def pack(module: str, weight: np.ndarray) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        matrix = torch.from_numpy(weight)
        rows, columns = matrix.shape
        group = {"tensor": 0, "channel": columns}.get(weights["strategy"], weights.get("group_size", columns))
        amax = matrix.abs().max().reshape(1) if group == 0 else matrix.reshape(rows, -1, group).abs().amax(2)
        top = 448.0 if weights["type"] == "float" else 2 ** (weights["num_bits"] - 1) - 0.5
        state = {"weight": matrix, "weight_scale": (amax / top).to(scale_dtype).float()}
        if zero is not None:
            state["weight_zero_point"] = zero(tuple(amax.shape)).to(torch.int8)
        tensors = compressor.compress(state, scheme)
        stands_for = compressor.decompress(dict(tensors), scheme)["weight"]
        assert stands_for.dtype == torch.float32
        tensors["weight_scale"] = tensors["weight_scale"].to(scale_dtype)
        return tensors | more(module), stands_for.numpy()

    return pack


def with_cache(source: Written) -> None:
    """Add the scales of an FP8 cache, as llm-compressor names them."""
    for layer in range(2):
        for letter, scale in (("k", 0.03125), ("v", 0.017)):
            name = f"model.layers.{layer}.self_attn.{letter}_scale"
            source.tensors[name] = torch.tensor([scale + layer], dtype=torch.bfloat16)
    save_file(source.tensors, source.path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(("group", "kept"), [(128, 128), (64, 64), (32, 32), (256, 128)])
def test_w4a16_is_the_same_numbers(tmp_path, group, kept):
    weights = INT4 | {"group_size": group}
    source = write(tmp_path / "ct", packed(weights, "pack-quantized"), settings(weights, "pack-quantized"), kv_heads=2)
    target = adopt(source.path, tmp_path / "out")
    assert_same(dequantized(target), source.stands_for)
    assert quantization_of(target)["group_size"] == kept
    assert foreign.identify(source.path).title == f"compressed-tensors pack-quantized: int4 weights, groups of {group}"


def test_w4a16_with_one_scale_per_row_is_the_same_numbers(tmp_path):
    weights = INT4 | {"strategy": "channel", "group_size": None}
    source = write(tmp_path / "ct", packed(weights, "pack-quantized"), settings(weights, "pack-quantized"))
    assert_same(dequantized(adopt(source.path, tmp_path / "out")), source.stands_for)


def test_asymmetric_w4a16_is_exact_where_it_fits_and_refused_elsewhere(tmp_path):
    weights = INT4 | {"symmetric": False}
    generator = torch.Generator().manual_seed(0)
    zeros = {0: torch.zeros, 1: lambda shape: torch.randint(-3, 4, shape, generator=generator)}
    fits = write(
        tmp_path / "fits", packed(weights, "pack-quantized", zero=zeros[0]), settings(weights, "pack-quantized")
    )
    assert_same(dequantized(adopt(fits.path, tmp_path / "out")), fits.stands_for)
    other = write(
        tmp_path / "other", packed(weights, "pack-quantized", zero=zeros[1]), settings(weights, "pack-quantized")
    )
    assert foreign.identify(other.path).zero_points
    with pytest.raises(PlanError, match=r"% of its groups"):
        adopt(other.path, tmp_path / "refused")


def test_zero_points_of_asymmetric_w4a16_are_taken_off(tmp_path):
    """Zero points -3..3 with weights small enough that q - z stays in range."""
    weights = INT4 | {"symmetric": False}
    generator = torch.Generator().manual_seed(0)

    def pack(module: str, weight: np.ndarray):
        random = packed(weights, "pack-quantized", zero=lambda shape: torch.randint(-3, 4, shape, generator=generator))
        limit = np.abs(weight).max() / 2.5
        clipped = np.clip(weight, -limit, limit)
        clipped[:, ::128] = np.abs(weight).max()  # keeps the scales wide; made zero below
        tensors, _ = random(module, clipped)
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
        compressor = BaseCompressor.get_value_from_registry("pack-quantized")
        small = clipped.copy()
        small[:, ::128] = 0
        state = {"weight": torch.from_numpy(small), "weight_scale": tensors["weight_scale"].float()}
        zero = torch.randint(-3, 4, tuple(tensors["weight_scale"].shape), generator=generator).to(torch.int8)
        again = compressor.compress(state | {"weight_zero_point": zero}, scheme)
        return again, compressor.decompress(dict(again), scheme)["weight"].numpy()

    source = write(tmp_path / "ct", pack, settings(weights, "pack-quantized"))
    assert_same(dequantized(adopt(source.path, tmp_path / "out")), source.stands_for)


def test_trivial_g_idx_is_passed_over_and_act_order_refused(tmp_path):
    def order(index: torch.Tensor):
        return lambda module: {"weight_g_idx": index[: 512 if module.endswith("down_proj") else 256].clone()}

    weights = INT4 | {"actorder": "group"}
    kind = settings(weights, "pack-quantized")
    plain = INT4
    in_order = torch.arange(512, dtype=torch.int32) // 128
    source = write(tmp_path / "ct", packed(plain, "pack-quantized", more=order(in_order)), kind)
    assert_same(dequantized(adopt(source.path, tmp_path / "out")), source.stands_for)
    other = write(tmp_path / "other", packed(plain, "pack-quantized", more=order(in_order.flip(0))), kind)
    assert foreign.identify(other.path).act_order
    with pytest.raises(PlanError, match="act order"):
        adopt(other.path, tmp_path / "refused")


@needs_int8
def test_w8a16_per_row_is_our_int8(tmp_path):
    for kind in ("pack-quantized", "int-quantized", "naive-quantized"):
        source = write(tmp_path / kind, packed(INT8, kind), settings(INT8, kind))
        assert_same(dequantized(adopt(source.path, tmp_path / f"{kind}-out")), source.stands_for)
        assert foreign.identify(source.path).weights == "int8"


class TestFloat8:
    """FP8 with one scale per matrix."""

    def source(self, tmp_path, inputs=None, scale_dtype=torch.bfloat16, **more: Any) -> Written:
        def static(_module: str) -> dict[str, torch.Tensor]:
            return {"input_scale": torch.tensor([0.0123], dtype=scale_dtype)} if inputs == STATIC else {}

        pack = packed(FP8, "float-quantized", more=static, scale_dtype=scale_dtype)
        return write(tmp_path / "ct", pack, settings(FP8, "float-quantized", inputs, **more))

    @pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_static_inputs_come_along_widened_exactly(self, tmp_path, scale_dtype):
        source = self.source(tmp_path, STATIC, scale_dtype)
        target = adopt(source.path, tmp_path / "out")
        assert_same(dequantized(target), source.stands_for)
        found = tensors_of(target)["model.layers.1.mlp.up_proj.input_scale"]
        assert found.dtype == torch.float32
        assert found.shape == ()
        assert found == torch.tensor(0.0123, dtype=scale_dtype).float()
        assert Checkpoint.open(target).quantization.quant_algo == "FP8"

    def test_dynamic_inputs_have_no_scale(self, tmp_path):
        target = adopt(self.source(tmp_path, DYNAMIC).path, tmp_path / "out")
        assert not [name for name in tensors_of(target) if name.endswith("input_scale")]
        Checkpoint.open(target)

    def test_the_scales_of_an_fp8_cache_get_the_layouts_names(self, tmp_path):
        source = self.source(tmp_path, STATIC, kv_cache_scheme=STATIC)
        with_cache(source)
        assert foreign.identify(source.path).kv == "fp8"
        target = adopt(source.path, tmp_path / "out")
        tensors = tensors_of(target)
        assert tensors["model.layers.1.self_attn.k_proj.k_scale"] == 1.03125
        expected = torch.tensor(0.017, dtype=torch.bfloat16).float()
        assert tensors["model.layers.0.self_attn.v_proj.v_scale"] == expected
        assert quantization_of(target)["kv_cache_quant_algo"] == "FP8"
        Checkpoint.open(target)

    def test_cache_scales_that_are_missing_are_named(self, tmp_path):
        source = self.source(tmp_path, STATIC, kv_cache_scheme=STATIC)
        with pytest.raises(ArtifactError, match=r"self_attn\.k_scale is missing"):
            adopt(source.path, tmp_path / "out")

    def test_a_code_that_is_not_a_number_is_named(self, tmp_path):
        source = self.source(tmp_path)
        tensor = source.tensors["model.layers.0.mlp.gate_proj.weight"]
        tensor.view(torch.uint8)[3, 4] = 0x7F
        with_cache(source)
        with pytest.raises(ArtifactError, match=r"gate_proj\.weight holds NaN"):
            adopt(source.path, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": "marlin-24"}, "'marlin-24'"),
        ({"format": "nvfp4-pack-quantized"}, "'nvfp4-pack-quantized'"),
        ({"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}, "rotated"),
        ({"sparsity_config": {"format": "sparse-bitmask"}}, "sparse"),
        ({"config_groups": {"a": {"weights": INT4}, "b": {"weights": INT8}}}, "several ways"),
        ({"config_groups": {"a": {"weights": INT4 | {"num_bits": 3}}}}, "3 bits"),
        ({"config_groups": {"a": {"weights": INT8, "input_activations": INT8}}}, "inputs are int8"),
        ({"config_groups": {"a": {"weights": FP8 | {"strategy": "channel"}}}}, "one scale per channel"),
        ({"config_groups": {"a": {"weights": FP8 | {"strategy": "block"}}}}, "one scale per block"),
        ({"kv_cache_scheme": INT8}, "cache is int8"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path, changes, reason):
    kind = settings(INT4, "pack-quantized") | changes
    source = write(tmp_path / "ct", packed(INT4, "pack-quantized"), kind)
    assert foreign.identify(source.path).use == "refused"
    with pytest.raises(PlanError, match=reason):
        adopt(source.path, tmp_path / "out")


def test_a_matrix_that_was_left_out_is_named(tmp_path):
    def pack(module: str, weight: np.ndarray):
        if module == "model.layers.1.mlp.down_proj":
            return {"weight": torch.from_numpy(weight).half()}, weight
        return packed(INT4, "pack-quantized")(module, weight)

    ignore = ["lm_head", "re:.*layers.1.mlp.down_proj"]
    source = write(tmp_path / "ct", pack, settings(INT4, "pack-quantized", ignore=ignore))
    with pytest.raises(PlanError, match=r"layers\.1\.mlp\.down_proj; ignore: lm_head, re:"):
        adopt(source.path, tmp_path / "out")


def whole_folder(folder: Path, preset: str) -> None:
    """A folder that compressed-tensors and transformers write by themselves, config.json and all."""
    model = random_llama(kv_heads=2).to(torch.bfloat16)
    scheme = preset_name_to_scheme(preset, ["Linear"])
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            scale, weight = module.weight_scale, module.weight.float()
            groups = weight.reshape(1, 1, -1) if scale.numel() == 1 else weight.reshape(*scale.shape, -1)
            top = 448.0 if scale.numel() == 1 else 7.5
            scale.data.copy_((groups.abs().amax(2) / top).reshape(scale.shape))
        if hasattr(module, "input_scale"):
            module.input_scale.data.fill_(0.02)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


@pytest.mark.parametrize(("preset", "weights"), [("W4A16", "int4"), ("FP8", "fp8")])
def test_a_folder_written_by_them_loads_in_transformers_to_the_same_numbers(tmp_path, preset, weights):
    """transformers' own loader dequantizes to the dtype of the scales, bfloat16: ours rounded to it must be equal."""
    whole_folder(tmp_path / "ct", preset)
    assert foreign.identify(tmp_path / "ct").weights == weights
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ct", quantization_config=transformers.CompressedTensorsConfig(dequantize=True), dtype=torch.bfloat16
    )
    found = dequantized(adopt(tmp_path / "ct", tmp_path / "out"))
    assert_same({name: tensor.to(torch.bfloat16) for name, tensor in found.items()}, loaded.state_dict())
    if preset == "FP8":
        scale = torch.tensor(0.02, dtype=torch.bfloat16).float()
        assert tensors_of(tmp_path / "out")["model.layers.0.mlp.down_proj.input_scale"] == scale
