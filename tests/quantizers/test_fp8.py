"""FP8: against torch's cast and against a table of e4m3 numbers built from the format's definition."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from toolchain.quantizers import NotFiniteError, fp8
from toolchain.quantizers.rows import Scratch, Workers


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(2) as made:
        yield made


def weights(dtype: torch.dtype, rows: int = 384, columns: int = 1280) -> torch.Tensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    values[:, 5] *= 40
    values[10] *= 1e-4  # far into the subnormal numbers of e4m3
    values[11] = 0
    return values.to(dtype)


def e4m3_numbers() -> np.ndarray:
    """The 127 finite numbers >= 0, in the order of their codes: exponent bias 7, three mantissa bits, no infinity."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    return np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))


def numpy_cast(values: np.ndarray) -> np.ndarray:
    """float64 -> codes, to the nearest number; of two equally near ones, the even code."""
    numbers = e4m3_numbers()
    above = np.clip(np.searchsorted(numbers, np.abs(values)), 1, 126)
    low, high = numbers[above - 1], numbers[above]
    to_low, to_high = np.abs(values) - low, high - np.abs(values)
    up = (to_high < to_low) | ((to_high == to_low) & (above % 2 == 0))
    return (np.where(up, above, above - 1) | np.where(np.signbit(values), 0x80, 0)).astype(np.uint8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_codes_equal_torchs_cast_and_the_formats_definition(dtype: torch.dtype, workers: Workers) -> None:
    weight = weights(dtype)
    scale = fp8.scale_of([fp8.amax(weight, workers)])
    made = fp8.cast(weight, scale, workers)
    assert float(scale) == np.float32(weight.float().abs().max()) / np.float32(448)
    expected = (weight.float() / scale).to(torch.float8_e4m3fn)
    assert torch.equal(made.code.view(torch.uint8), expected.view(torch.uint8))
    divided = weight.float().numpy() / scale.numpy()
    assert np.array_equal(made.code.view(torch.uint8).numpy(), numpy_cast(divided.astype(np.float64)))


def test_shared_scale_is_the_largest(workers: Workers) -> None:
    small, large = weights(torch.float16), weights(torch.float16) * 3
    scale = fp8.scale_of([fp8.amax(small, workers), fp8.amax(large, workers)])
    assert float(scale) == np.float32(large.float().abs().max()) / np.float32(448)
    assert fp8.cast(large, scale, workers).code.float().abs().max() == 448
    assert fp8.cast(small, scale, workers).code.float().abs().max() < 160


def test_reported_error_is_that_of_the_stored_bytes(workers: Workers) -> None:
    weight = weights(torch.bfloat16)
    scale = fp8.scale_of([fp8.amax(weight, workers)])
    made = fp8.cast(weight, scale, workers)
    wrong = made.code.double() * scale.double() - weight.double()
    assert made.error.relative == pytest.approx(float(wrong.norm() / weight.double().norm()), rel=1e-4)


def test_the_error_of_a_large_matrix_is_that_of_a_sample(workers: Workers) -> None:
    weight = torch.randn(4096, 2048, generator=torch.Generator().manual_seed(5)).bfloat16()
    scale = fp8.scale_of([fp8.amax(weight, workers)])
    made = fp8.cast(weight, scale, workers)
    wrong = made.code.float() * scale - weight.float()
    assert 0 < made.error.squared_norm < 0.5 * float(weight.float().square().sum())
    assert made.error.relative == pytest.approx(float(wrong.norm() / weight.float().norm()), rel=0.02)


def test_decoding_through_float16_is_exact_for_every_finite_code() -> None:
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    decoded = fp8._decode(codes.view(torch.float8_e4m3fn), Scratch(), torch.empty(len(codes)))
    assert torch.equal(decoded, codes.view(torch.float8_e4m3fn).float())
    assert np.array_equal(decoded[:127].numpy(), e4m3_numbers().astype(np.float32))


def test_all_zero_matrix_has_scale_one(workers: Workers) -> None:
    zero = torch.zeros(6, 64, dtype=torch.float16)
    scale = fp8.scale_of([fp8.amax(zero, workers)])
    made = fp8.cast(zero, scale, workers)
    assert float(scale) == 1
    assert not made.code.view(torch.uint8).any()
    assert made.error.relative == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(dtype: torch.dtype, poison: float, workers: Workers) -> None:
    weight = weights(dtype, rows=1200)
    weight[1100, 3] = poison
    with pytest.raises(NotFiniteError):
        fp8.amax(weight, workers)
