"""AutoAWQ folders become the same numbers, or are refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert import AutoAWQConverter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from tests.quantizers.foreign.adopted import adopt, assert_same, dequantized, quantization_of
from tests.quantizers.foreign.folders import AWQ, awq, meaning, words, write
from toolchain.checkpoint import Checkpoint
from toolchain.errors import ArtifactError, PlanError
from toolchain.quantizers import foreign


@pytest.mark.parametrize(("group", "kept"), [(128, 128), (64, 64), (32, 32), (256, 128)])
def test_symmetric_weights_are_the_same_numbers(tmp_path, group, kept):
    source = write(tmp_path / "awq", awq(group), AWQ | {"group_size": group}, kv_heads=2)
    target = adopt(source.path, tmp_path / "out")
    assert_same(dequantized(target), source.stands_for)
    assert quantization_of(target)["group_size"] == kept
    assert Checkpoint.open(target).quantization.quant_algo == "W4A16_AWQ"


def test_one_scale_per_row_is_held_by_groups_that_repeat_it(tmp_path):
    def pack(module: str, weight: np.ndarray):
        return awq(weight.shape[1])(module, weight)

    source = write(tmp_path / "awq", pack, AWQ | {"group_size": -1})
    assert_same(dequantized(adopt(source.path, tmp_path / "out")), source.stands_for)


def test_zero_points_that_fit_are_exact(tmp_path):
    """Codes 5..12 around zero points 4..8: every difference is in -4..8 and most in -4..7; keep those that are."""
    rng = np.random.default_rng(3)

    def pack(_module: str, weight: np.ndarray):
        rows, columns = weight.shape
        zeros = rng.integers(4, 9, (columns // 128, rows))
        codes = np.repeat(zeros, 128, 0) + rng.integers(-4, 8, (columns, rows))
        scales = (np.abs(weight).max() / 8 * rng.uniform(0.5, 1, zeros.shape)).astype(np.float16)
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        tensors = {"qweight": words(codes, order), "qzeros": words(zeros, order), "scales": torch.from_numpy(scales)}
        return tensors, meaning(codes, zeros, scales)

    source = write(tmp_path / "awq", pack, AWQ)
    assert_same(dequantized(adopt(source.path, tmp_path / "out")), source.stands_for)


def test_zero_points_that_do_not_fit_are_refused_with_their_share_and_nothing_is_written(tmp_path):
    source = write(tmp_path / "awq", awq(128, zero=None), AWQ)
    groups = bad = 0
    for name in (name for name in source.tensors if name.endswith(".qzeros")):
        module = name.removesuffix(".qzeros")
        scales = source.tensors[f"{module}.scales"].float()
        codes = (source.stands_for[f"{module}.weight"].T / scales.repeat_interleave(128, 0)).round()
        grouped = codes.reshape(len(scales), 128, -1)
        bad += int(((grouped.amin(1) < -8) | (grouped.amax(1) > 7)).sum())
        groups += scales.numel()
    assert 0 < bad < groups
    with pytest.raises(PlanError, match=rf"{100 * bad / groups:.1f} % of its groups \({bad} of {groups}.*q_proj"):
        adopt(source.path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["awq"]


@pytest.mark.parametrize("zero", [8, None])
def test_compressed_tensors_own_converter_unpacks_the_same_codes(tmp_path, zero):
    """An independent reading of AutoAWQ's packing, with zero points too, which our unpacking sees before it refuses."""
    source = write(tmp_path / "awq", awq(128, zero=zero), AWQ)
    converted = AutoAWQConverter().process(dict(source.tensors))
    args = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=128, symmetric=False)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    folder = foreign.open_foreign(source.path)
    for module in sorted(folder.linears):
        names = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
        state = {name: converted[f"{module}.{name}"] for name in names}
        state["weight_scale"] = state["weight_scale"].float()
        theirs = BaseCompressor.get_value_from_registry("pack-quantized").decompress(state, scheme)["weight"]
        codes = folder.codes(module, slice(0, theirs.shape[1])).astype(np.int64)
        ours = meaning(codes, folder.zeros(module).astype(np.int64), folder.scales(module))
        assert torch.equal(torch.from_numpy(ours.copy()), theirs)


def test_biases_of_nothing_are_left_out_and_others_refused(tmp_path):
    def with_bias(value: float):
        def pack(module: str, weight: np.ndarray):
            tensors, stands_for = awq()(module, weight)
            return tensors | {"bias": torch.full((len(weight),), value, dtype=torch.float16)}, stands_for

        return pack

    source = write(tmp_path / "zero", with_bias(0), AWQ)
    assert_same(dequantized(adopt(source.path, tmp_path / "out")), source.stands_for)
    with pytest.raises(PlanError, match=r"q_proj\.bias|k_proj\.bias|down_proj\.bias"):
        adopt(write(tmp_path / "some", with_bias(0.5), AWQ).path, tmp_path / "other")


def test_the_settings_of_old_folders_are_found_beside_config_json(tmp_path):
    old = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    source = write(tmp_path / "awq", awq(64), old, config_file="quant_config.json")
    found = foreign.identify(source.path)
    assert (found.format, found.weights, found.group_size, found.use) == ("autoawq", "int4", 64, "import")
    assert_same(dequantized(adopt(source.path, tmp_path / "out")), source.stands_for)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"version": "gemv"}, "version 'gemv'"),
        ({"version": "gemv_fast"}, "version 'gemv_fast'"),
        ({"bits": 3}, "3 bits"),
        ({"group_size": 48}, "groups of 48"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path, settings, reason):
    source = write(tmp_path / "awq", awq(), AWQ | settings)
    found = foreign.identify(source.path)
    assert found.use == "refused"
    assert reason in found.reason
    with pytest.raises(PlanError, match=reason):
        adopt(source.path, tmp_path / "out")


def test_a_group_size_that_is_not_the_stored_one_is_told_by_the_tensor(tmp_path):
    source = write(tmp_path / "awq", awq(128), AWQ | {"group_size": 64})
    with pytest.raises(ArtifactError, match=r"down_proj\.\w+ is \w+ \[4, 256\], where this format has"):
        adopt(source.path, tmp_path / "out")


def test_a_scale_that_is_not_a_number_is_named_before_anything_is_written(tmp_path):
    def pack(module: str, weight: np.ndarray):
        tensors, stands_for = awq()(module, weight)
        if module.endswith("1.mlp.up_proj"):
            tensors["scales"][1, 3] = float("nan")
        return tensors, stands_for

    source = write(tmp_path / "awq", pack, AWQ)
    with pytest.raises(ArtifactError, match=r"layers\.1\.mlp\.up_proj\.scales holds NaN"):
        adopt(source.path, tmp_path / "out")
    assert not list(tmp_path.rglob("*.partial-*"))


def test_inspect_names_an_awq_folder(tmp_path):
    source = write(tmp_path / "named-something-else", awq(), AWQ)
    found = foreign.identify(source.path)
    assert found.title == "AutoAWQ int4, groups of 128, with zero points"
    assert (found.weights, found.group_size, found.zero_points, found.kv) == ("int4", 128, True, "fp16")


def test_a_folder_of_a_method_that_we_do_not_know_is_refused_by_its_name(tmp_path):
    source = write(tmp_path / "x", awq(), AWQ)
    raw = json.loads((source.path / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (source.path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(PlanError, match="bitsandbytes"):
        foreign.open_foreign(source.path)


def test_a_folder_without_config_json_is_refused_and_one_that_is_not_there_is_an_error(tmp_path: Path):
    found = foreign.identify(tmp_path)
    assert found.use == "refused"
    assert "config.json: no such file" in found.reason
    with pytest.raises(ArtifactError, match=r"config\.json: no such file"):
        foreign.identify(tmp_path / "absent")
