"""INT8: against the formula in numpy, and what it does with zeros, NaN and scaled channels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from toolchain.quantizers import NotFiniteError, int8
from toolchain.quantizers.rows import Workers

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(2) as made:
        yield made


def weights(dtype: torch.dtype, rows: int = 700, columns: int = 1280) -> torch.Tensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    values[:, 5] *= 40
    values[10] *= 1e-4
    values[11] = 0
    return values.to(dtype)


def numpy_quantized(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [out, in] -> codes and scales, in float32 and rounding to even as the format's writers do."""
    scale = np.abs(matrix).max(axis=1) / np.float32(127)
    scale[scale == 0] = 1
    return np.rint(matrix / scale[:, None]).astype(np.int8), scale


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_and_scales_equal_the_formula_bit_for_bit(dtype: torch.dtype, workers: Workers) -> None:
    weight = weights(dtype)
    made = int8.quantize(weight, workers)
    codes, scale = numpy_quantized(weight.float().numpy())
    assert np.array_equal(made.code.numpy(), codes)
    assert np.array_equal(made.scale.numpy(), scale)
    assert made.code.abs().amax(1).tolist() == [127 if row != 11 else 0 for row in range(len(weight))]
    assert made.scale[11] == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_channels_give_the_codes_of_the_scaled_matrix(dtype: torch.dtype, workers: Workers) -> None:
    weight = weights(dtype)
    by = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(1)) * 3 + 0.1
    made = int8.quantize(weight, workers, by=by)
    codes, scale = numpy_quantized(weight.float().numpy() * by.numpy())
    assert np.array_equal(made.code.numpy(), codes)
    assert np.array_equal(made.scale.numpy(), scale)


@pytest.mark.parametrize("scaled", [False, True])
def test_reported_error_is_that_of_the_models_own_weights(scaled: bool, workers: Workers) -> None:
    weight = weights(torch.bfloat16)
    by = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(1)) * 3 + 0.1 if scaled else None
    made = int8.quantize(weight, workers, by=by)
    back = made.code.double() * made.scale.double()[:, None] / (1 if by is None else by.double())
    expected = float((back - weight.double()).norm() / weight.double().norm())
    assert 0 < expected < 0.2
    assert made.error.relative == pytest.approx(expected, rel=1e-4)
    assert torch.equal(int8.dequantize(made.code, made.scale), made.code.float() * made.scale.view(-1, 1))


def test_workers_do_not_change_a_bit() -> None:
    weight, by = weights(torch.bfloat16), torch.linspace(0.5, 2, 1280)
    made = []
    for threads in (1, 3):
        with Workers(threads) as pool:
            made.append(int8.quantize(weight, pool, by=by))
    one, three = made
    assert torch.equal(one.code, three.code)
    assert torch.equal(one.scale, three.scale)
    assert one.error == three.error


def test_all_zero_matrix_has_scales_of_one_and_no_error(workers: Workers) -> None:
    made = int8.quantize(torch.zeros(6, 64, dtype=torch.float16), workers)
    assert torch.equal(made.scale, torch.ones(6))
    assert not made.code.any()
    assert made.error.relative == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(dtype: torch.dtype, poison: float, workers: Workers) -> None:
    weight = weights(dtype)
    weight[650, 3] = poison
    with pytest.raises(NotFiniteError):
        int8.quantize(weight, workers)


@pytest.mark.parametrize(("amax", "scale"), [(3.0, np.float32(3) / np.float32(127)), (0.0, 1.0)])
def test_scale_of_an_input_is_its_largest_over_127(amax: float, scale: float) -> None:
    assert float(int8.scale_of(amax)) == scale
