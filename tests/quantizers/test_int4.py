"""int4: against formulas written in numpy, the contract's golden bytes, and the search's own promises."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.quantizers import SCALES, NotFiniteError, int4
from toolchain.quantizers.rows import Workers


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(2) as made:
        yield made


def weights(dtype: torch.dtype, rows: int = 320, columns: int = 1536, seed: int = 0) -> torch.Tensor:
    """Gaussian values with outliers, a group that is all zero, and ties that must round to even."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) * 0.02
    values[:, 7] *= 30
    values[3, :128] = 0
    values[4, :128] = 0.5
    values[4, 0] = 7.0
    return values.to(dtype)


def numpy_codes(weight: torch.Tensor, scale: np.ndarray) -> np.ndarray:
    grouped = weight.float().numpy().reshape(len(weight), scale.shape[1], -1)
    return np.clip(np.rint(grouped / scale[:, :, None]), -8, 7).reshape(weight.shape).astype(np.int8)


def numpy_unpack(packed: np.ndarray) -> np.ndarray:
    codes = np.empty((packed.shape[0] * 2, packed.shape[1]), np.int16)
    codes[0::2], codes[1::2] = packed & 15, packed >> 4
    return np.where(codes > 7, codes - 16, codes).astype(np.int8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group", [64, 128])
def test_modelopt_scales_and_codes_equal_the_formula_bit_for_bit(
    dtype: torch.dtype, group: int, workers: Workers
) -> None:
    weight = weights(dtype)
    made = int4.quantize(weight, group, "modelopt", workers)
    largest = np.abs(weight.float().numpy().reshape(len(weight), -1, group)).max(-1)
    expected = np.where(largest > 0, largest / np.float32(7), np.float32(1))
    assert made.scale.dtype == torch.float32
    assert np.array_equal(made.scale.numpy(), expected)
    assert np.array_equal(numpy_unpack(made.packed.numpy()), numpy_codes(weight, expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_searched_codes_are_the_nearest_ones_to_the_stored_scales(dtype: torch.dtype, workers: Workers) -> None:
    weight = weights(dtype)
    made = int4.quantize(weight, 128, "mse", workers)
    assert (made.scale > 0).all()
    codes = numpy_unpack(made.packed.numpy())
    assert np.array_equal(codes, numpy_codes(weight, made.scale.numpy()))
    assert codes.min() == -8
    assert codes.max() == 7


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("group", [64, 128])
def test_search_never_loses_to_modelopt_in_any_group(seed: int, group: int, workers: Workers) -> None:
    weight = weights(torch.float16, seed=seed)

    def group_errors(scales: str) -> torch.Tensor:
        made = int4.quantize(weight, group, scales, workers)
        wrong = int4.dequantize(made.packed, made.scale).double() - weight.double()
        return wrong.view(len(weight), -1, group).square().sum(-1)

    searched, plain = group_errors("mse"), group_errors("modelopt")
    assert (searched <= plain * (1 + 1e-5) + 1e-12).all()
    assert searched.sum() < 0.8 * plain.sum()


def test_search_comes_within_two_percent_of_two_hundred_candidates(workers: Workers) -> None:
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(1))
    made = int4.quantize(weight, 128, "mse", workers)
    grouped = weight.double().view(-1, 128)
    best = torch.full((len(grouped),), torch.inf, dtype=torch.float64)
    for top in torch.linspace(6, 16, 200, dtype=torch.float64):
        scale = grouped.abs().amax(-1, keepdim=True) / top
        wrong = (grouped / scale).round().clamp(-8, 7) * scale - grouped
        best = torch.minimum(best, wrong.square().sum(-1))
    assert made.error.relative < 1.02 * float((best.sum() / grouped.square().sum()).sqrt())


@pytest.mark.parametrize("scales", SCALES)
def test_reported_error_is_that_of_the_stored_bytes(scales: str, workers: Workers) -> None:
    weight = weights(torch.float16)
    made = int4.quantize(weight, 128, scales, workers)
    wrong = int4.dequantize(made.packed, made.scale).double() - weight.double()
    assert made.error.relative == pytest.approx(float(wrong.norm() / weight.double().norm()), rel=1e-4)


@pytest.mark.parametrize("scales", SCALES)
def test_threads_do_not_change_a_bit(scales: str) -> None:
    weight = weights(torch.float16, rows=2000)
    with Workers(1) as one:
        alone = int4.quantize(weight, 128, scales, one)
    with Workers(3) as three:
        together = int4.quantize(weight, 128, scales, three)
    assert torch.equal(alone.packed, together.packed)
    assert torch.equal(alone.scale, together.scale)
    assert alone.error == together.error


def test_workers_give_torch_its_threads_back() -> None:
    before = torch.get_num_threads()
    with Workers(2) as workers:
        int4.quantize(weights(torch.float16), 128, "modelopt", workers)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(scales: str, poison: float, workers: Workers) -> None:
    weight = weights(torch.float16)
    weight[317, 1000] = poison
    with pytest.raises(NotFiniteError):
        int4.quantize(weight, 128, scales, workers)


@pytest.mark.parametrize("scales", SCALES)
def test_zero_and_subnormal_groups_become_zero_codes(scales: str, workers: Workers) -> None:
    weight = torch.zeros(4, 256)
    weight[1, :128] = 1e-42
    made = int4.quantize(weight, 128, scales, workers)
    assert not made.packed.any()
    assert (made.scale == 1).all()
    assert made.error.squared_error < 1e-70


def test_packing_is_the_contracts_golden_vector() -> None:
    codes = torch.tensor([[1, -2], [3, -4], [5, -6], [7, -8]], dtype=torch.int8)
    assert int4.pack(codes).tolist() == [[0x31, 0xCE], [0x75, 0x8A]]
    assert codes[0].tolist() == [1, -2]  # pack leaves its argument alone


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(1, 9))
def test_unpack_inverts_pack(data: st.DataObject, pairs: int, columns: int) -> None:
    flat = data.draw(st.lists(st.integers(-8, 7), min_size=pairs * 2 * columns, max_size=pairs * 2 * columns))
    codes = torch.tensor(flat, dtype=torch.int8).view(-1, columns)
    packed = int4.pack(codes)
    assert packed.dtype == torch.uint8
    assert torch.equal(int4.unpack(packed), codes)
    assert np.array_equal(numpy_unpack(packed.numpy()), codes.numpy())


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_pack_inverts_unpack_for_every_byte(data: st.DataObject) -> None:
    flat = data.draw(st.lists(st.integers(0, 255), min_size=12, max_size=12))
    packed = torch.tensor(flat, dtype=torch.uint8).view(3, 4)
    assert torch.equal(int4.pack(int4.unpack(packed)), packed)
