"""AWQ: scale up the input channels that matter before rounding, chosen by the error of the output on real activations.

W x = (W s) (x / s) for any s > 0 per input channel; rounding W s instead of W moves the error away from channels with
large activations (Lin et al., https://arxiv.org/abs/2306.00978). All matrices that read x share one s, so that 1/s fits
into the norm before them. Candidates for s are those of ModelOpt 0.47.0's awq_lite, as many in between, and s = 1, so
that the result never loses to plain rounding on the rows it was chosen by. It stores nothing and knows no layer: see
``smoothing``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from toolchain.quantizers import NotFiniteError, WeightError, int4, total
from toolchain.quantizers.int4 import Int4Matrix
from toolchain.quantizers.rows import Scratch, Workers

ALPHAS = tuple(step / 20 for step in range(21))
"""Every second one is of ModelOpt's grid (modelopt/torch/quantization/model_calib.py, awq_lite, alpha_step 0.1; 0.47.0,
2026-11). ModelOpt searches for each matrix and folds the mean of what it finds, which often lies in between."""

CLIPS = tuple(round(1 - step / 20, 2) for step in range(11))
"""1.0 down to 0.5, ModelOpt's grid (the same file, awq_clip). 1.0 comes first and wins ties."""

FEW_CLIPS = (1.0, 0.85, 0.75)
"""Those of CLIPS that are nearest to int4.CANDIDATES."""

_PLAIN = -1.0  # stands for s = 1 among the alphas
_SCALE_LIMITS = (1e-4, 1e4)  # awq_lite clamps to these before it normalizes
_TINY = torch.finfo(torch.float32).tiny

SCAN_ROWS, FINAL_ROWS = 128, 256
"""Alphas are narrowed down to the nearest 0.1 on 128 rows of x; that one, its neighbors at 0.05 and plain rounding are
compared on 256; clips look at all of x. Ours."""

MOST_OUTPUTS = 1024
"""Outputs of each matrix, at equal distances, whose error is summed in these comparisons. Ours: all alphas are compared
on the same outputs, so a sample tells them apart as the whole would; in a layer of Llama-2-13B it is a seventh."""

_STEPS = {"modelopt": int4._amax_over_seven, "mse": int4._least_squares}


@dataclass(frozen=True)
class AwqResult:
    """What to multiply the input channels of a group's matrices by."""

    scale: torch.Tensor
    """float32 [in], within 1e-4..1e4; all ones where plain rounding is best."""
    alpha: float
    """The weight of the activations against the weights in ``scale``; 0 where ``scale`` is one."""
    error_before: float
    """Relative error of the compared outputs with plain rounding, ||(Q(W) - W) x|| / ||W x|| over all matrices."""
    error_after: float
    """The same with ``scale`` (and ``clips``); at most ``error_before``."""
    clips: tuple[torch.Tensor | None, ...]
    """For each matrix what ``apply`` takes as ``clip``: float32 [out, in/group] of ``CLIPS``, or None."""


@torch.no_grad()
def search(
    weights: Sequence[torch.Tensor],
    x: torch.Tensor,
    channel_mean: torch.Tensor,
    *,
    group_size: int,
    scales: str,
    clip: bool,
    workers: Workers,
) -> AwqResult:
    """Weights [out_i, in] of any float dtype that read the same x [rows, in]; mean |x| [in] over all of calibration.

    The group scales: amax/7 with scales="modelopt", with "mse" the best of FEW_CLIPS of that, with ``clip`` the best of
    CLIPS, both by the error of the *output*. The weights' own least squares would clip the very channels that AWQ has
    scaled up and gain nothing over plain rounding. Raises NotFiniteError for NaN or infinity in a weight. The result
    does not depend on the number of workers.
    """
    means = _weight_mean(weights, group_size, workers)
    strides = [max(1, len(weight) // MOST_OUTPUTS) for weight in weights]
    some = [weight[::stride] for weight, stride in zip(weights, strides, strict=True)]
    candidates = {_PLAIN: torch.ones_like(means)} | {a: channel_scale(channel_mean.float(), means, a) for a in ALPHAS}
    many = _spread(x, FINAL_ROWS)

    def weighed(errors: Iterable[float]) -> float:
        """Of the compared outputs of each matrix -> of all outputs of the group."""
        return math.fsum(error * stride for error, stride in zip(errors, strides, strict=True))

    def loss(rows: torch.Tensor, alpha: float, rule: str = "modelopt") -> float:
        return weighed(_loss(weight, rows, candidates[alpha], group_size, rule, workers) for weight in some)

    before = loss(many, _PLAIN, scales)
    factors = CLIPS if clip else FEW_CLIPS if scales == "mse" else ()
    alpha, after = _best_alpha(loss, _spread(x, SCAN_ROWS), many)
    clips: tuple[torch.Tensor | None, ...] = (None,) * len(weights)
    if factors:
        found = [_clip(weight, x, candidates[alpha], group_size, factors, workers) for weight in weights]
        after = weighed(
            _loss(weight, many, candidates[alpha], group_size, "modelopt", workers, factor[::stride])
            for weight, factor, stride in zip(some, found, strides, strict=True)
        )
        clips = tuple(found)
    if after >= before:
        alpha, after, clips = _PLAIN, before, (None,) * len(weights)
    size = weighed(_size(weight, many, workers) for weight in some)
    return AwqResult(
        scale=candidates[alpha],
        alpha=max(alpha, 0.0),
        error_before=math.sqrt(before / size) if size else 0.0,
        error_after=math.sqrt(after / size) if size else 0.0,
        clips=clips,
    )


def _best_alpha(
    loss: Callable[[torch.Tensor, float], float], few: torch.Tensor, many: torch.Tensor
) -> tuple[float, float]:
    """-> the best of ALPHAS and its loss on ``many`` rows: in steps of 0.2, then 0.1 and 0.05 around the best."""
    best = len(ALPHAS) // 2
    for step, rows in ((4, few), (2, few), (1, many)):
        places = range(0, len(ALPHAS), 4) if step == 4 else range(max(0, best - step), min(20, best + step) + 1, step)
        found = {place: loss(rows, ALPHAS[place]) for place in places}
        best = min(found, key=found.__getitem__)
    return ALPHAS[best], found[best]


@torch.no_grad()
def apply(
    weight: torch.Tensor,
    scale: torch.Tensor,
    *,
    group_size: int,
    scales: str,
    workers: Workers,
    clip: torch.Tensor | None = None,
) -> Int4Matrix:
    """[out, in] of any float dtype, the scale [in] (rounded as it will be stored) -> the int4 matrix of W * scale.

    ``clip`` is one of ``AwqResult.clips``: the group scales are then amax/7 * clip, whatever ``scales`` says. The error
    is that of W itself, with the scale taken back. A scale of ones without a clip gives the bits of ``int4.quantize``.
    """
    if clip is None:
        return int4.quantize(weight, group_size, scales, workers, by=scale.float())
    return _clipped(weight, scale.float(), clip, group_size, workers)


def _weight_mean(weights: Sequence[torch.Tensor], group_size: int, workers: Workers) -> torch.Tensor:
    """Mean over all rows of all matrices of |W| / max |W| of its group: float32 [in]. Raises NotFiniteError."""

    mean = torch.zeros(weights[0].shape[1], device=weights[0].device)
    for weight in weights:

        def block(part: slice, scratch: Scratch, weight: torch.Tensor = weight) -> torch.Tensor:
            source = weight[part]
            x = scratch("x", source, torch.float32).copy_(source).abs_()
            grouped = x.view(-1, group_size)
            largest = grouped.amax(-1, keepdim=True)
            if not torch.isfinite(largest.max()):
                raise NotFiniteError
            grouped.div_(largest.clamp_(min=_TINY))
            return x.sum(0)

        for partial in workers.over_rows(weight, block):
            mean += partial
    return mean.div_(sum(len(weight) for weight in weights))


def channel_scale(channel_mean: torch.Tensor, weight_mean: torch.Tensor, alpha: float) -> torch.Tensor:
    """s = x^alpha / w^(1 - alpha), clamped to 1e-4..1e4, divided by sqrt(max s * min s): float32 [in].

    The division changes no code; it centers s so that s and 1/s fit the model's dtype. A channel that is zero in x or
    in W is held by the clamp.
    """
    scale = channel_mean.pow(alpha) / (weight_mean.pow(1 - alpha) + _TINY)
    scale.clamp_(*_SCALE_LIMITS)
    return scale / (scale.max() * scale.min()).sqrt()


def _spread(x: torch.Tensor, most: int) -> torch.Tensor:
    """At most ``most`` rows at equal distances."""
    if len(x) <= most:
        return x
    return x[torch.arange(most, device=x.device) * len(x) // most]


def _loss(
    weight: torch.Tensor,
    rows: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    scales: str,
    workers: Workers,
    clip: torch.Tensor | None = None,
) -> float:
    """||(Q(W s) - W s) (x / s)||^2; the matrix product in bfloat16, three times as fast as float32 on a CPU."""
    columns = (rows.float() / scale).bfloat16().T

    def block(part: slice, scratch: Scratch) -> float:
        source = weight[part]
        x = torch.mul(source, scale, out=scratch("x", source, torch.float32)).view(-1, group_size)
        step = _STEPS[scales](x, scratch) if clip is None else _clipped_steps(x, clip[part], scratch)
        wrong = _wrong(x, step, scratch)
        return _output_norm(wrong.view(source.shape), columns, scratch)

    return math.fsum(workers.over_rows(weight, block))


def _size(weight: torch.Tensor, rows: torch.Tensor, workers: Workers) -> float:
    """||W x||^2"""
    columns = rows.bfloat16().T
    return math.fsum(workers.over_rows(weight, lambda part, scratch: _output_norm(weight[part], columns, scratch)))


def _output_norm(matrix: torch.Tensor, columns: torch.Tensor, scratch: Scratch) -> float:
    """[block, in], bfloat16 [in, rows] -> the squared norm of their product."""
    output = scratch("bf16", matrix, torch.bfloat16).copy_(matrix) @ columns
    flat = output.float().view(-1)
    return float(torch.dot(flat, flat))


def _wrong(x: torch.Tensor, step: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """[groups, group], group scales [groups, 1] -> code * scale - x, in a scratch buffer."""
    exact = torch.div(x, step, out=scratch("t", x, torch.float32))
    code = torch.round(exact, out=scratch("code", x, torch.float32)).clamp_(-8, 7)
    return code.sub_(exact).mul_(step)


def _clipped_steps(x: torch.Tensor, clip: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    return _STEPS["modelopt"](x, scratch).mul_(clip.reshape(-1, 1))


def _clip(
    weight: torch.Tensor,
    rows: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    factors: Sequence[float],
    workers: Workers,
) -> torch.Tensor:
    """For each group the one of ``factors`` whose own part of the output has the least error: float32 [out, in/group].

    That error is d (X^T X) d with d the group's rounding errors and X the group's own columns, however many rows.
    """
    columns = (rows.float() / scale).view(len(rows), -1, group_size).transpose(0, 1)
    gram = columns.transpose(1, 2) @ columns
    best = torch.ones(len(weight), len(gram), device=weight.device)

    def block(part: slice, scratch: Scratch) -> None:
        source = weight[part]
        x = torch.mul(source, scale, out=scratch("x", source, torch.float32)).view(-1, group_size)
        full = _STEPS["modelopt"](x, scratch)
        lowest = torch.full((len(x),), torch.inf, device=x.device)
        chosen = best[part].view(-1)
        for factor in factors:
            wrong = _wrong(x, full * factor, scratch)
            by_group = wrong.view(len(source), -1, group_size).transpose(0, 1)
            error = (by_group @ gram).mul_(by_group).sum(-1).T.reshape(-1)
            wins = error < lowest
            lowest = torch.where(wins, error, lowest)
            chosen.masked_fill_(wins, factor)

    workers.over_rows(weight, block)
    return best


def _clipped(
    weight: torch.Tensor, scale: torch.Tensor, clip: torch.Tensor, group_size: int, workers: Workers
) -> Int4Matrix:
    """[out, in], the scales of the input channels [in] and the factors [out, in/group] on amax/7."""
    packed = torch.empty(len(weight) // 2, weight.shape[1], dtype=torch.uint8, device=weight.device)
    steps, undo = torch.empty_like(clip), scale.reciprocal()

    def block(part: slice, scratch: Scratch) -> WeightError:
        source = weight[part]
        x = torch.mul(source, scale, out=scratch("x", source, torch.float32)).view(-1, group_size)
        step = _clipped_steps(x, clip[part], scratch)
        steps[part] = step.view(len(source), -1)
        exact = torch.div(x, step, out=scratch("t", x, torch.float32))
        code = torch.round(exact, out=scratch("code", x, torch.float32)).clamp_(-8, 7)
        packed[part.start // 2 : part.stop // 2] = int4.pack(code.to(torch.int8).view(source.shape))
        return int4.measured(code.sub_(exact), step, source, undo, x)

    return Int4Matrix(packed, steps, total(workers.over_rows(weight, block)))
