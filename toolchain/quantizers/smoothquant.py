"""SmoothQuant: balance input channels between activations and weights, so that both can be rounded to 8 bits.

W x = (W / p) (p x) for any p > 0 per input channel (Xiao et al., https://arxiv.org/abs/2211.10438). With a = max |x|
and w = max |W| of a channel, p = w^(1 - alpha) / a^alpha; for alpha = 0.5 that makes p x and W / p equally large.
Formula and limits are those of ModelOpt 0.47.0 (modelopt/torch/quantization/model_calib.py, smoothquant), and so is the
mean over the matrices that read one input. It stores nothing and knows no layer: see ``smoothing``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from toolchain.quantizers import NotFiniteError, int8
from toolchain.quantizers.rows import Scratch, Workers

ALPHA = 0.5
"""The paper's value for most models. ModelOpt's own default of 1.0 moves all of the difficulty into the weights."""

ERROR_ROWS = 128
"""Rows of x that the errors of the output are measured on. Ours."""

_LIMITS = (1e-4, 1e4)  # ModelOpt clamps p to these
_NEVER_ACTIVE = 2.0**-31  # ModelOpt's bound on a; such a channel keeps p = 1


@dataclass(frozen=True)
class OutputErrors:
    """Relative errors of the output with int8 weights and int8 inputs, ||W' x' - W x|| / ||W x|| over all matrices."""

    before: float
    """Rounded as they are."""
    after: float
    """Balanced first."""


@torch.no_grad()
def balance(
    weights: Sequence[torch.Tensor], channel_amax: torch.Tensor, alpha: float, workers: Workers
) -> torch.Tensor:
    """Weights [out_i, in] of one dtype that read one input; max |x| [in] of each channel -> p [in] in that dtype.

    The mean over the matrices of each one's own p. Rounded to the dtype of the weights where ModelOpt rounds: max |W|
    raised to its power, p, and the mean. Raises NotFiniteError for NaN or infinity in a weight. The result does not
    depend on the number of workers.
    """
    activity = channel_amax.float()
    found = []
    for weight in weights:
        largest = _column_amax(weight, workers).pow(1 - alpha).float()
        scale = (largest / activity.pow(alpha)).masked_fill(activity <= _NEVER_ACTIVE, 1.0)
        found.append(scale.clamp(*_LIMITS).to(weight.dtype))
    return torch.stack(found).mean(0)


def _column_amax(weight: torch.Tensor, workers: Workers) -> torch.Tensor:
    """max |W| of each input channel: [in] in the dtype of W."""

    def block(part: slice, _scratch: Scratch) -> torch.Tensor:
        return torch.maximum(weight[part].amax(0), weight[part].amin(0).neg_())

    largest = torch.stack(workers.over_rows(weight, block)).amax(0)
    if not torch.isfinite(largest).all():
        raise NotFiniteError
    return largest


@torch.no_grad()
def output_errors(
    weights: Sequence[torch.Tensor], x: torch.Tensor, channel_amax: torch.Tensor, p: torch.Tensor, workers: Workers
) -> OutputErrors:
    """The errors on at most ``ERROR_ROWS`` rows of x [rows, in]; ``p`` [in] as it is stored."""
    rows = x[torch.arange(min(len(x), ERROR_ROWS), device=x.device) * len(x) // min(len(x), ERROR_ROWS)].float()
    balanced, one = p.float(), torch.ones_like(p, dtype=torch.float32)
    size = math.fsum(_squared(weight, rows, workers) for weight in weights)
    before, after = (
        math.fsum(_wrong(weight, rows, float((channel_amax.float() * by).max()), by, workers) for weight in weights)
        for by in (one, balanced)
    )
    return OutputErrors(math.sqrt(before / size), math.sqrt(after / size)) if size else OutputErrors(0.0, 0.0)


def _wrong(weight: torch.Tensor, rows: torch.Tensor, amax: float, by: torch.Tensor, workers: Workers) -> float:
    """||W' x' - W x||^2 as W' (x' - x) + (W' - W) x, so that bfloat16 products are exact enough."""
    step = int8.scale_of(amax)
    rounded = (rows * by / step).round_().clamp_(-int8.LARGEST, int8.LARGEST).mul_(step).div_(by)
    columns, moved = rows.bfloat16().T, (rounded - rows).bfloat16().T
    matrix = int8.quantize(weight, workers, by=by.reciprocal())

    def block(part: slice, scratch: Scratch) -> float:
        source = weight[part]
        stored = scratch("x", source, torch.float32).copy_(matrix.code[part]).mul_(matrix.scale[part, None]).mul_(by)
        output = scratch("bf16", source, torch.bfloat16).copy_(stored) @ moved
        wrong = scratch("bf16", source, torch.bfloat16).copy_(stored.sub_(source)) @ columns
        flat = output.float().add_(wrong).view(-1)
        return float(torch.dot(flat, flat))

    return math.fsum(workers.over_rows(weight, block))


def _squared(weight: torch.Tensor, rows: torch.Tensor, workers: Workers) -> float:
    """||W x||^2"""
    columns = rows.bfloat16().T

    def block(part: slice, scratch: Scratch) -> float:
        output = scratch("bf16", weight[part], torch.bfloat16).copy_(weight[part]) @ columns
        flat = output.float().view(-1)
        return float(torch.dot(flat, flat))

    return math.fsum(workers.over_rows(weight, block))
