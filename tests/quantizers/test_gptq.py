"""gptq: against the paper's algorithm (inverse Hessian, column by column) written in numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from toolchain.quantizers import SCALES, NotFiniteError, gptq, int4
from toolchain.quantizers.rows import Workers


def problem(
    dtype: torch.dtype = torch.float32, rows: int = 64, columns: int = 256
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, activations whose channels are correlated, and activations of the same kind that were not seen."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(24, columns, generator=generator)
    x = torch.randn(2048, 24, generator=generator) @ mix + torch.randn(2048, columns, generator=generator)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    return weight.to(dtype), x[:1024], x[1024:]


def numpy_gptq(weight: np.ndarray, hessian: np.ndarray, group: int, damp: float) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 1 of arXiv 2210.17323 without lazy blocks; a symmetric grid amax/7 at each group's first column."""
    weight = weight.copy()
    rows, columns = weight.shape
    damped = hessian + damp * np.diag(hessian).mean() * np.eye(columns)
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    codes, steps = np.zeros((rows, columns)), np.zeros((rows, columns // group))
    for j in range(columns):
        if j % group == 0:
            steps[:, j // group] = np.abs(weight[:, j : j + group]).max(1) / 7
        step = steps[:, j // group]
        codes[:, j] = np.clip(np.rint(weight[:, j] / step), -8, 7)
        error = (weight[:, j] - codes[:, j] * step) / upper[j, j]
        weight[:, j:] -= np.outer(error, upper[j, j:])
    return codes, steps


def output_error(weight: torch.Tensor, x: torch.Tensor, made: int4.Int4Matrix) -> float:
    wrong = int4.dequantize(made.packed, made.scale) - weight.float()
    return float((wrong @ x.T).norm() / (weight.float() @ x.T).norm())


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_codes_and_scales_are_those_of_the_papers_algorithm(dtype: torch.dtype, group: int) -> None:
    weight, x, _ = problem(dtype)
    hessian = x.T @ x
    made = gptq.quantize(weight, hessian, group_size=group, scales="modelopt")
    codes, steps = numpy_gptq(weight.double().numpy(), hessian.double().numpy(), group, 0.01)
    # A value on the border of two codes may fall to either side in float32, and its row then goes another way.
    same = (int4.unpack(made.packed).numpy() == codes).all(1) & np.isclose(made.scale, steps, rtol=1e-4).all(1)
    assert same.mean() > 0.9


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("group", [64, 128])
def test_output_error_is_lower_than_plain_roundings_also_on_other_activations(scales: str, group: int) -> None:
    weight, x, other = problem()
    made = gptq.quantize(weight, x.T @ x, group_size=group, scales=scales)
    with Workers(1) as workers:
        plain = int4.quantize(weight, group, scales, workers)
    assert output_error(weight, x, made) < 0.7 * output_error(weight, x, plain)
    assert output_error(weight, other, made) < 0.7 * output_error(weight, other, plain)


@pytest.mark.parametrize("scales", SCALES)
def test_activations_without_correlation_give_plain_rounding(scales: str) -> None:
    weight, _, _ = problem()
    made = gptq.quantize(weight, torch.diag(torch.linspace(1, 9, 256)), group_size=128, scales=scales)
    with Workers(1) as workers:
        plain = int4.quantize(weight, 128, scales, workers)
    assert torch.equal(made.packed, plain.packed)
    assert torch.equal(made.scale, plain.scale)


@pytest.mark.parametrize("scales", SCALES)
def test_searched_scales_beat_modelopts(scales: str) -> None:
    weight, x, other = problem()
    errors = {
        rule: output_error(weight, other, gptq.quantize(weight, x.T @ x, group_size=128, scales=rule))
        for rule in ("modelopt", "mse")
    }
    assert errors["mse"] < errors["modelopt"]


@pytest.mark.parametrize("scales", SCALES)
def test_workers_do_not_change_a_bit_and_a_shared_factor_neither(scales: str) -> None:
    weight, x, _ = problem(torch.bfloat16, rows=2600)
    hessian = x.T @ x
    before = hessian.clone()
    made = [gptq.quantize(weight, hessian, group_size=128, scales=scales)]
    for threads in (1, 3):
        with Workers(threads) as workers:
            made.append(
                gptq.quantize(weight, gptq.factor(hessian.clone()), group_size=128, scales=scales, workers=workers)
            )
    assert torch.equal(hessian, before)
    for other in made[1:]:
        assert torch.equal(other.packed, made[0].packed)
        assert torch.equal(other.scale, made[0].scale)
        assert other.error == made[0].error


def test_reported_error_is_that_of_the_stored_bytes() -> None:
    weight, x, _ = problem(torch.bfloat16)
    made = gptq.quantize(weight, x.T @ x, group_size=64, scales="mse")
    wrong = int4.dequantize(made.packed, made.scale).double() - weight.double()
    assert made.error.relative == pytest.approx(float(wrong.norm() / weight.double().norm()), rel=1e-4)


def test_factor_is_the_upper_triangle_whose_square_is_the_damped_hessian() -> None:
    _, x, _ = problem()
    hessian = x.T @ x
    made = gptq.factor(hessian.clone())
    upper = made.upper.double()
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(256)
    assert made.damp == 0.01
    assert torch.equal(upper, upper.triu())
    assert ((upper @ upper.T) - damped).abs().max() < 1e-5 * damped.abs().max()


def test_channels_that_were_never_active_are_rounded_as_they_are() -> None:
    weight, x, other = problem()
    dead = [0, 1, 70, 200, 255]
    x[:, dead] = other[:, dead] = 0
    made = gptq.quantize(weight, x.T @ x, group_size=64, scales="modelopt")
    back = int4.dequantize(made.packed, made.scale)
    half_step = made.scale.repeat_interleave(64, 1)[:, dead] / 2
    clipped = int4.unpack(made.packed)[:, dead].abs() >= 7
    assert ((back[:, dead] - weight[:, dead]).abs() <= half_step * 1.001)[~clipped].all()
    with Workers(1) as workers:
        plain = int4.quantize(weight, 64, "modelopt", workers)
    assert output_error(weight, other, made) < 0.7 * output_error(weight, other, plain)


@pytest.mark.parametrize("rows_of_x", [0, 1, 5])
def test_fewer_rows_of_activations_than_channels_are_enough(rows_of_x: int) -> None:
    weight, x, _ = problem()
    few = x[:rows_of_x]
    made = gptq.quantize(weight, few.T @ few, group_size=128, scales="modelopt")
    with Workers(1) as workers:
        plain = int4.quantize(weight, 128, "modelopt", workers)
    if rows_of_x:
        assert output_error(weight, few, made) < 0.3 * output_error(weight, few, plain)
    else:
        assert torch.equal(made.packed, plain.packed)


def test_a_hessian_that_float32_cannot_factor_takes_float64() -> None:
    row = torch.randint(1, 50, (1, 256), generator=torch.Generator().manual_seed(0)).float()
    hessian = row.T @ row  # exact, of rank one; a millionth of a millionth on the diagonal is lost in float32
    damped = hessian.double() + 1e-12 * hessian.diagonal().double().mean() * torch.eye(256)
    assert torch.linalg.cholesky_ex(damped.float()).info > 0
    made = gptq.factor(hessian.clone(), damp=1e-12)
    assert made.damp == 1e-12
    assert torch.isfinite(made.upper).all()


def test_a_hessian_that_rounding_made_indefinite_takes_more_damping() -> None:
    _, x, _ = problem()
    rank_one = x[:1].T @ x[:1]
    made = gptq.factor(rank_one - 0.02 * rank_one.diagonal().mean() * torch.eye(256))
    assert made.damp == pytest.approx(0.1)
    assert torch.isfinite(made.upper).all()


def test_a_second_attempt_starts_from_the_same_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    """An odd number of columns beyond a block, and rank one less noise, so that two tries with little damping fail."""
    monkeypatch.setattr(gptq, "_KEPT_ROWS", 100)
    monkeypatch.setattr(gptq, "_REVERSED_AT_ONCE", 1000)
    x = torch.randn(1, 333, generator=torch.Generator().manual_seed(3))
    hessian = x.T @ x
    hessian -= 0.02 * hessian.diagonal().mean() * torch.eye(333)
    made = gptq.factor(hessian.clone())
    assert made.damp == pytest.approx(0.1)
    damped = hessian.double() + 0.1 * hessian.double().diagonal().mean() * torch.eye(333)
    upper = made.upper.double()
    assert torch.equal(upper, upper.triu())
    assert ((upper @ upper.T) - damped).abs().max() < 1e-5 * damped.abs().max()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scales", SCALES)
def test_nan_and_infinity_are_refused(scales: str, poison: float) -> None:
    weight, x, _ = problem(torch.float16)
    hessian = x.T @ x
    weight[63, 200] = poison
    with pytest.raises(NotFiniteError):
        gptq.quantize(weight, hessian, group_size=128, scales=scales)
    hessian[5, 9] = poison
    with pytest.raises(NotFiniteError):
        gptq.factor(hessian)


def test_a_matrix_that_is_no_gram_matrix_is_refused() -> None:
    with pytest.raises(NotFiniteError):
        gptq.factor(torch.diag(torch.tensor([1.0, -5.0, 1.0, 1.0])))


def test_all_zero_weights_stay_zero() -> None:
    _, x, _ = problem()
    made = gptq.quantize(torch.zeros(4, 256), x.T @ x, group_size=128, scales="mse")
    assert not made.packed.any()
    assert (made.scale == 1).all()
