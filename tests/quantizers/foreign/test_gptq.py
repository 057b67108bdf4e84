"""AutoGPTQ's and GPTQModel's folders become the same numbers, or are refused with the reason."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.quantizers.foreign.adopted import adopt, assert_same, dequantized, quantization_of, tensors_of
from tests.quantizers.foreign.folders import GPTQ, gptq, write
from toolchain.errors import PlanError
from toolchain.quantization import WEIGHTS
from toolchain.quantizers import foreign

needs_int8 = pytest.mark.skipif("int8" not in WEIGHTS, reason="no int8 weights in the table of quantizations")


@pytest.mark.parametrize(
    ("kind", "lacking"), [("gptq", 1), ("gptq_v2", 0), (None, 1)], ids=["gptq", "gptq_v2", "unnamed"]
)
@pytest.mark.parametrize("group", [128, 32])
def test_symmetric_weights_are_the_same_numbers(tmp_path, kind, lacking, group):
    settings = GPTQ | {"group_size": group} | ({"checkpoint_format": kind} if kind else {})
    source = write(tmp_path / "gptq", gptq(group, lacking=lacking), settings, kv_heads=1)
    target = adopt(source.path, tmp_path / "out")
    assert_same(dequantized(target), source.stands_for)
    assert quantization_of(target)["group_size"] == group


def test_one_scale_per_row_is_held_by_groups_that_repeat_it(tmp_path):
    source = write(tmp_path / "gptq", gptq(-1), GPTQ | {"group_size": -1, "desc_act": True})
    assert_same(dequantized(adopt(source.path, tmp_path / "out")), source.stands_for)


def test_act_order_whose_groups_are_in_order_is_the_same_numbers(tmp_path):
    source = write(tmp_path / "gptq", gptq(), GPTQ | {"desc_act": True, "static_groups": True})
    assert foreign.identify(source.path).act_order
    assert_same(dequantized(adopt(source.path, tmp_path / "out")), source.stands_for)


def test_act_order_is_refused_by_name(tmp_path):
    shuffled = np.random.default_rng(0).permutation(512) % 2
    source = write(tmp_path / "gptq", gptq(order=shuffled), GPTQ | {"desc_act": True})
    found = foreign.identify(source.path)
    assert found.use == "refused"
    assert "act order" in found.reason
    assert "g_idx" in found.reason
    with pytest.raises(PlanError, match="act order"):
        adopt(source.path, tmp_path / "out")


@pytest.mark.parametrize(("kind", "lacking"), [("gptq", 1), ("gptq_v2", 0)])
def test_zero_points_that_do_not_fit_are_refused_with_their_share(tmp_path, kind, lacking):
    settings = GPTQ | {"sym": False, "checkpoint_format": kind}
    source = write(tmp_path / "gptq", gptq(128, zero=None, lacking=lacking), settings)
    with pytest.raises(PlanError, match=r"% of its groups \(\d+ of \d+, the first in model\.layers\.0"):
        adopt(source.path, tmp_path / "out")


def test_zero_points_other_than_8_are_taken_off_where_the_rest_fits(tmp_path):
    """Zero points 7: codes 0..15 stand for -7..8, so those that are 15 do not fit; the others do."""

    def pack(module: str, weight: np.ndarray):
        clipped = np.clip(weight, None, weight.max() * 0.8)
        return gptq(128, zero=7)(module, np.where(np.abs(clipped) > 0.8 * np.abs(weight).max(), 0, clipped))

    source = write(tmp_path / "gptq", pack, GPTQ | {"sym": False})
    zeros = [tensor for name, tensor in source.tensors.items() if name.endswith("qzeros")]
    assert all((tensor == 0x66666666).all() for tensor in zeros)
    assert_same(dequantized(adopt(source.path, tmp_path / "out")), source.stands_for)


def test_a_zero_point_that_readers_disagree_about_is_refused(tmp_path):
    """Stored as 15 it was -1 in 4 bits (so 0) or it is 16."""
    source = write(tmp_path / "gptq", gptq(128, zero=0), GPTQ | {"sym": False})
    with pytest.raises(PlanError, match="stored as 15"):
        adopt(source.path, tmp_path / "out")


@needs_int8
def test_8_bits_with_one_scale_per_row_are_our_int8(tmp_path):
    settings = GPTQ | {"bits": 8, "group_size": -1}
    source = write(tmp_path / "gptq", gptq(-1, zero=128, bits=8), settings)
    target = adopt(source.path, tmp_path / "out")
    assert_same(dequantized(target), source.stands_for)
    weight = tensors_of(target)["model.layers.0.mlp.up_proj.weight"]
    assert weight.dtype == torch.int8
    assert foreign.identify(source.path).weights == "int8"


def test_8_bits_in_groups_are_refused(tmp_path):
    source = write(tmp_path / "gptq", gptq(128, zero=128, bits=8), GPTQ | {"bits": 8})
    with pytest.raises(PlanError, match="one scale for 128 input channels"):
        adopt(source.path, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"bits": 3}, "3 bits"),
        ({"checkpoint_format": "marlin"}, "'marlin'"),
        ({"is_marlin_format": True}, "'marlin'"),
        ({"dynamic": {"-:.*down.*": {}}}, "different ways"),
        ({"lm_head": True}, "lm_head"),
        ({"pack_dtype": "int16"}, "int16"),
        ({"group_size": 16}, "groups of 16"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path, settings, reason):
    source = write(tmp_path / "gptq", gptq(), GPTQ | settings)
    with pytest.raises(PlanError, match=reason):
        adopt(source.path, tmp_path / "out")


def test_old_folders_with_other_names_are_read(tmp_path):
    """AutoGPTQ wrote quantize_config.json and gptq_model-4bit-128g.safetensors."""
    source = write(tmp_path / "gptq", gptq(), GPTQ, config_file="quantize_config.json")
    (source.path / "model.safetensors").rename(source.path / "gptq_model-4bit-128g.safetensors")
    assert foreign.identify(source.path).title == "GPTQ int4, groups of 128"
    assert_same(dequantized(adopt(source.path, tmp_path / "out")), source.stands_for)
