"""SmoothQuant: against the paper's formula and a plain W8A8 product in numpy, and what it does with dead channels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from toolchain.quantizers import NotFiniteError, smoothquant
from toolchain.quantizers.rows import Workers

ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-23}


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(2) as made:
        yield made


def problem(dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Two matrices that read one input, some channels of which are far larger than the others."""
    generator = torch.Generator().manual_seed(0)
    pair = [torch.randn(rows, 256, generator=generator) * 0.02 for rows in (1600, 96)]
    x = torch.randn(300, 256, generator=generator) * torch.randn(256, generator=generator).exp()
    x[:, [7, 100]] *= 50
    return [matrix.to(dtype) for matrix in pair], x.to(dtype)


def amax(x: torch.Tensor) -> torch.Tensor:
    return x.abs().amax(0)


def numpy_balance(pair: list[torch.Tensor], activity: np.ndarray, alpha: float) -> np.ndarray:
    """The mean over the matrices of max|W|^(1 - alpha) / max|x|^alpha, in float64."""
    largest = [matrix.double().abs().amax(0).numpy() for matrix in pair]
    return np.mean([np.clip(w ** (1 - alpha) / activity**alpha, 1e-4, 1e4) for w in largest], axis=0)


def numpy_w8a8(matrix: np.ndarray, x: np.ndarray, p: np.ndarray) -> np.ndarray:
    """What an engine computes: inputs times p in int8 with one scale, weights over p in int8 with a scale per row."""
    step = np.abs(x * p).max() / 127
    scale = np.abs(matrix / p).max(axis=1, keepdims=True) / 127
    return (np.rint(x * p / step) @ np.rint(matrix / p / scale).T) * (step * scale.T)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_balance_is_the_formula_up_to_the_rounding_of_the_dtype(
    dtype: torch.dtype, alpha: float, workers: Workers
) -> None:
    pair, x = problem(dtype)
    found = smoothquant.balance(pair, amax(x), alpha, workers)
    assert found.dtype == dtype
    expected = numpy_balance(pair, amax(x).double().numpy(), alpha)
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=3 * ROUNDING[dtype])


def test_half_makes_inputs_and_weights_equally_large(workers: Workers) -> None:
    pair, x = problem()
    p = smoothquant.balance(pair[:1], amax(x), 0.5, workers)
    np.testing.assert_allclose((amax(x) * p).numpy(), (pair[0].abs().amax(0) / p).numpy(), rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_output_errors_are_those_of_an_int8_product(alpha: float, workers: Workers) -> None:
    pair, x = problem()
    rows = x[torch.arange(smoothquant.ERROR_ROWS) * len(x) // smoothquant.ERROR_ROWS]
    p = smoothquant.balance(pair, amax(rows), alpha, workers)
    found = smoothquant.output_errors(pair, x, amax(rows), p, workers)
    given, exact = rows.double().numpy(), [rows.double().numpy() @ matrix.double().numpy().T for matrix in pair]
    size = sum(np.square(one).sum() for one in exact)
    for factor, error in ((np.ones(256), found.before), (p.double().numpy(), found.after)):
        made = [numpy_w8a8(matrix.double().numpy(), given, factor) for matrix in pair]
        wrong = sum(np.square(one - two).sum() for one, two in zip(made, exact, strict=True))
        assert error == pytest.approx(np.sqrt(wrong / size), rel=0.02)
    assert found.after < 0.5 * found.before


def test_channels_that_are_never_active_or_have_no_weight_stay_finite(workers: Workers) -> None:
    pair, x = problem(torch.float16)
    x[:, 3] = 0
    for matrix in pair:
        matrix[:, [5, 9]] = 0
    x[:, 9] = 0
    p = smoothquant.balance(pair, amax(x), 0.5, workers)
    assert (p[3], p[9]) == (1, 1)
    assert float(p[5]) == pytest.approx(1e-4, rel=1e-2)
    untouched = smoothquant.balance(*((pair, amax(problem(torch.float16)[1]))), 0.5, workers)
    others = [channel for channel in range(256) if channel not in (3, 5, 9)]
    assert torch.equal(p[others], untouched[others])
    errors = smoothquant.output_errors(pair, x, amax(x), p, workers)
    assert 0 < errors.after < errors.before < 1


def test_inputs_that_are_all_zero_have_no_error(workers: Workers) -> None:
    pair, x = problem()
    p = smoothquant.balance(pair, amax(x * 0), 0.5, workers)
    assert torch.equal(p, torch.ones(256))
    errors = smoothquant.output_errors(pair, x * 0, amax(x * 0), p, workers)
    assert (errors.before, errors.after) == (0, 0)


def test_workers_do_not_change_a_bit() -> None:
    pair, x = problem(torch.bfloat16)
    found = []
    for threads in (1, 3):
        with Workers(threads) as pool:
            p = smoothquant.balance(pair, amax(x), 0.5, pool)
            found.append((p, smoothquant.output_errors(pair, x, amax(x), p, pool)))
    (one, first), (three, second) = found
    assert torch.equal(one, three)
    assert first == second


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(poison: float, workers: Workers) -> None:
    pair, x = problem(torch.float16)
    pair[0][1500, 200] = poison
    with pytest.raises(NotFiniteError):
        smoothquant.balance(pair, amax(x), 0.5, workers)
