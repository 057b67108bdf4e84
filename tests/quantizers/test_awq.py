"""awq: against the formulas of the paper and of awq_lite written in numpy, and the search's own promises."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from toolchain.quantizers import SCALES, NotFiniteError, awq, int4
from toolchain.quantizers.rows import Workers


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(2) as made:
        yield made


def problem(
    dtype: torch.dtype = torch.float32, rows: int = awq.FINAL_ROWS, columns: int = 512
) -> tuple[torch.Tensor, ...]:
    """Weights [192, columns], activations [2 * rows, columns] whose channels differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(7)
    loudness = torch.exp(torch.randn(columns, generator=generator) * 0.5)
    loudness[5::64] *= 25
    x = torch.randn(2 * rows, columns, generator=generator) * loudness
    weight = torch.randn(192, columns, generator=generator) * 0.02
    return weight.to(dtype), x[:rows], x[rows:]


def numpy_mean(weights: list[torch.Tensor], group: int) -> np.ndarray:
    ratios = []
    for weight in weights:
        size = np.abs(weight.double().numpy()).reshape(len(weight), -1, group)
        ratios.append((size / size.max(-1, keepdims=True)).reshape(weight.shape))
    return np.concatenate(ratios).mean(0)


def numpy_scale(x_mean: np.ndarray, w_mean: np.ndarray, alpha: float) -> np.ndarray:
    scale = np.clip(x_mean**alpha / w_mean ** (1 - alpha), 1e-4, 1e4)
    return scale / np.sqrt(scale.max() * scale.min())


def numpy_quantized(weight: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 [out, in] -> codes, group scales amax/7."""
    grouped = weight.reshape(len(weight), -1, group)
    scale = np.abs(grouped).max(-1, keepdims=True) / np.float32(7)
    return np.clip(np.rint(grouped / scale), -8, 7).reshape(weight.shape), scale[:, :, 0]


def numpy_loss(weights: list[torch.Tensor], x: torch.Tensor, scale: np.ndarray, group: int) -> float:
    loss = 0.0
    for weight in weights:
        smoothed = weight.float().numpy() * scale.astype(np.float32)
        codes, steps = numpy_quantized(smoothed, group)
        back = codes * np.repeat(steps, group, 1) / scale
        loss += float(np.square((back - weight.double().numpy()) @ x.double().numpy().T).sum())
    return loss


def restored(made: int4.Int4Matrix, scale: torch.Tensor) -> torch.Tensor:
    return int4.dequantize(made.packed, made.scale) / scale


def output_error(weight: torch.Tensor, x: torch.Tensor, back: torch.Tensor) -> float:
    return float(((back - weight.float()) @ x.T).norm() / (weight.float() @ x.T).norm())


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_search_finds_the_best_alpha_of_the_grid_that_numpy_finds(
    dtype: torch.dtype, group: int, workers: Workers
) -> None:
    weight, x, _ = problem(dtype)
    pair = [weight[:64], weight[64:]]
    mean = x.abs().mean(0)
    found = awq.search(pair, x, mean, group_size=group, scales="modelopt", clip=False, workers=workers)
    w_mean = numpy_mean(pair, group)
    losses = {
        alpha: numpy_loss(pair, x, numpy_scale(mean.double().numpy(), w_mean, alpha), group) for alpha in awq.ALPHAS
    }
    assert losses[found.alpha] <= min(losses.values()) * 1.005  # the search multiplies in bfloat16
    expected = numpy_scale(mean.double().numpy(), w_mean, found.alpha)
    np.testing.assert_allclose(found.scale.numpy(), expected, rtol=2e-5)
    size = float((weight.double() @ x.double().T).square().sum())
    plain = numpy_loss(pair, x, np.ones(len(mean)), group)
    assert found.error_before == pytest.approx((plain / size) ** 0.5, rel=0.01)
    assert found.error_after == pytest.approx((losses[found.alpha] / size) ** 0.5, rel=0.01)


@pytest.mark.parametrize("scales", SCALES)
def test_outlier_channels_cost_less_than_with_plain_rounding_also_on_other_activations(
    scales: str, workers: Workers
) -> None:
    weight, x, other = problem()
    found = awq.search([weight], x, x.abs().mean(0), group_size=128, scales=scales, clip=False, workers=workers)
    made = awq.apply(weight, found.scale, group_size=128, scales=scales, workers=workers, clip=found.clips[0])
    plain = int4.quantize(weight, 128, scales, workers)
    ones = torch.ones(weight.shape[1])
    assert output_error(weight, other, restored(made, found.scale)) < 0.7 * output_error(
        weight, other, restored(plain, ones)
    )
    assert found.error_after < 0.7 * found.error_before


@pytest.mark.parametrize("group", [64, 128])
def test_each_finer_choice_of_the_group_scales_lowers_the_output_error_also_on_other_activations(
    group: int, workers: Workers
) -> None:
    weight, x, other = problem()
    errors = []
    for scales, clip in (("modelopt", False), ("mse", False), ("mse", True)):
        found = awq.search([weight], x, x.abs().mean(0), group_size=group, scales=scales, clip=clip, workers=workers)
        made = awq.apply(weight, found.scale, group_size=group, scales=scales, workers=workers, clip=found.clips[0])
        back = restored(made, found.scale)
        assert found.error_after == pytest.approx(output_error(weight, x, back), rel=0.01)
        errors.append(output_error(weight, other, back))
        if found.clips[0] is not None:
            largest = (weight * found.scale).abs().view(len(weight), -1, group).amax(-1)
            assert torch.equal(made.scale, largest / 7 * found.clips[0])
    assert errors[0] > errors[1] > errors[2]


def test_clip_of_a_group_is_the_one_with_the_least_output_error_of_that_group(workers: Workers) -> None:
    weight, x, _ = problem()
    found = awq.search([weight], x, x.abs().mean(0), group_size=128, scales="modelopt", clip=True, workers=workers)
    (clip,) = found.clips
    assert clip is not None
    smoothed = (weight * found.scale).double().view(len(weight), -1, 128)
    inputs = (x / found.scale).double().view(len(x), -1, 128)
    errors = []
    for factor in awq.CLIPS:
        step = smoothed.abs().amax(-1, keepdim=True) / 7 * factor
        wrong = (smoothed / step).round().clamp(-8, 7) * step - smoothed
        errors.append(torch.einsum("ogi,rgi->org", wrong, inputs).square().sum(1))
    best = torch.stack(errors).amin(0)
    chosen = torch.stack(errors).gather(0, ((1 - clip) * 20).round().long()[None])[0]
    assert (chosen <= best * 1.001).all()


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_scale_of_ones_gives_plain_rounding_bit_for_bit(scales: str, dtype: torch.dtype, workers: Workers) -> None:
    weight, _, _ = problem(dtype)
    made = awq.apply(weight, torch.ones(weight.shape[1]), group_size=64, scales=scales, workers=workers)
    plain = int4.quantize(weight, 64, scales, workers)
    assert torch.equal(made.packed, plain.packed)
    assert torch.equal(made.scale, plain.scale)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_same_alpha_gives_the_codes_of_the_formula(alpha: float, dtype: torch.dtype, workers: Workers) -> None:
    weight, x, _ = problem(dtype)
    w_mean = torch.from_numpy(numpy_mean([weight], 128)).float()
    scale = awq.channel_scale(x.abs().mean(0), w_mean, alpha)
    expected = numpy_scale(x.abs().mean(0).double().numpy(), w_mean.double().numpy(), alpha)
    np.testing.assert_allclose(scale.numpy(), expected, rtol=2e-5)
    made = awq.apply(weight, scale, group_size=128, scales="modelopt", workers=workers)
    codes, steps = numpy_quantized(weight.float().numpy() * scale.numpy(), 128)
    assert np.array_equal(int4.unpack(made.packed).numpy(), codes)
    assert np.array_equal(made.scale.numpy(), steps)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("scales", SCALES)
def test_workers_do_not_change_a_bit(scales: str, clip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x, _ = problem(torch.bfloat16)
    weight = weight.repeat(12, 1)  # several blocks of rows
    made = []
    for threads in (1, 3):
        with Workers(threads) as pool:
            found = awq.search(
                [weight, weight[:64]], x, x.abs().mean(0), group_size=128, scales=scales, clip=clip, workers=pool
            )
            matrix = awq.apply(weight, found.scale, group_size=128, scales=scales, workers=pool, clip=found.clips[0])
            made.append((found, matrix))
    (first, one), (second, three) = made
    assert torch.equal(first.scale, second.scale)
    assert (first.alpha, first.error_before, first.error_after) == (
        second.alpha,
        second.error_before,
        second.error_after,
    )
    assert torch.equal(one.packed, three.packed)
    assert torch.equal(one.scale, three.scale)
    assert one.error == three.error


def test_channels_that_are_always_zero_stay_finite_and_do_not_disturb_the_others(workers: Workers) -> None:
    weight, x, _ = problem()
    x[:, 10:20] = 0
    weight[:, 30:40] = 0
    found = awq.search([weight], x, x.abs().mean(0), group_size=128, scales="mse", clip=True, workers=workers)
    made = awq.apply(weight, found.scale, group_size=128, scales="mse", workers=workers, clip=found.clips[0])
    assert ((found.scale >= 1e-4) & (found.scale <= 1e4)).all()
    assert not int4.unpack(made.packed)[:, 30:40].any()
    assert found.error_after < 0.7 * found.error_before


def test_activations_that_are_all_zero_leave_the_weights_as_they_are(workers: Workers) -> None:
    weight, x, _ = problem()
    found = awq.search(
        [weight], x * 0, torch.zeros(512), group_size=128, scales="modelopt", clip=False, workers=workers
    )
    assert torch.equal(found.scale, torch.ones(512))
    assert (found.alpha, found.error_before, found.error_after) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("clip", [False, True])
def test_a_single_row_of_activations_is_enough(clip: bool, workers: Workers) -> None:
    weight, x, _ = problem()
    found = awq.search([weight], x[:1], x[0].abs(), group_size=128, scales="modelopt", clip=clip, workers=workers)
    made = awq.apply(weight, found.scale, group_size=128, scales="modelopt", workers=workers, clip=found.clips[0])
    plain = int4.dequantize(*(lambda m: (m.packed, m.scale))(int4.quantize(weight, 128, "modelopt", workers)))
    assert output_error(weight, x[:1], restored(made, found.scale)) < output_error(weight, x[:1], plain)


def test_plain_rounding_is_kept_where_no_scale_helps(workers: Workers) -> None:
    weight = torch.randint(-7, 8, (64, 256), generator=torch.Generator().manual_seed(0)).float()
    weight[:, ::128] = 7  # on the grid already: any smoothing could only lose
    x = torch.randn(32, 256, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 10, 256)
    found = awq.search([weight], x, x.abs().mean(0), group_size=128, scales="modelopt", clip=False, workers=workers)
    assert torch.equal(found.scale, torch.ones(256))
    assert found.error_before == found.error_after


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(poison: float, workers: Workers) -> None:
    weight, x, _ = problem(torch.float16)
    weight[100, 300] = poison
    with pytest.raises(NotFiniteError):
        awq.search([weight], x, x.abs().mean(0), group_size=128, scales="mse", clip=False, workers=workers)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("clipped", [False, True])
def test_reported_error_is_that_of_the_models_own_weights(scales: str, clipped: bool, workers: Workers) -> None:
    """Not that of the scaled weights: only so can it be compared with plain rounding's."""
    weight, x, _ = problem(torch.bfloat16)
    weight = weight.repeat(12, 1)  # several blocks of rows
    found = awq.search([weight], x, x.abs().mean(0), group_size=128, scales=scales, clip=clipped, workers=workers)
    assert found.scale.max() > 2 * found.scale.min(), "nothing was scaled: this test would show nothing"
    made = awq.apply(weight, found.scale, group_size=128, scales=scales, workers=workers, clip=found.clips[0])
    wrong = restored(made, found.scale).double() - weight.double()
    assert made.error.relative == pytest.approx(float(wrong.norm() / weight.double().norm()), rel=1e-4)
