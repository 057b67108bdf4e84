"""Where the channel scales of AWQ and SmoothQuant go: into the norm before a matrix, or beside it.

W x = (W * s) (x / s) for any s > 0 per input channel. The weights carry s; the norm before q/k/v and before gate/up
carries 1/s in its own weights, at no cost; o_proj and down_proj come after no norm, so they keep 1/s as a tensor, the
``pre_quant_scale``. SmoothQuant's layout has that tensor for every matrix. Both are stored in the model's dtype, and it
is the stored, rounded numbers that the weights are scaled by, so that nothing is lost by the rounding. The layout is
that of ModelOpt's unified export. It searches nothing itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from toolchain import family
from toolchain.quantizers import NotFiniteError, awq, smoothquant
from toolchain.quantizers.layout import Scheme
from toolchain.quantizers.rows import Workers
from toolchain.quantizers.source import Source
from toolchain.quantizers.statistics import InputStatistics, LayerStatistics

_NORM_BEFORE = dict(zip((family.ATTENTION_IN[0], family.MLP_IN[0]), family.NORMS, strict=True))


@dataclass(frozen=True)
class Smoothing:
    """What is done to one group of ``family.SHARED_INPUT``."""

    scale: torch.Tensor
    """float32 [in]: what the weights' input channels are multiplied by."""
    norm: tuple[str, torch.Tensor] | None
    """The norm that takes 1/scale in, ``"input_layernorm.weight"``, and its new weights [in] in the model's dtype."""
    pre_quant_scale: torch.Tensor | None
    """Where it is in no norm: 1/scale [in], in the model's dtype."""
    amax: float
    """max |x / scale|, rounded as x is: what the matrices read now."""
    alpha: float
    error_before: float
    """Relative error of the group's output with plain rounding."""
    error_after: float
    clips: tuple[torch.Tensor | None, ...]
    """What ``awq.apply`` narrows the group scales of each matrix by."""


def smooth(
    source: Source, layer: int, scheme: Scheme, statistics: LayerStatistics, workers: Workers
) -> dict[str, Smoothing]:
    """Search the scales of each group of one layer. ArtifactError for NaN or infinity in the weights."""
    found = {}
    search = _awq if scheme.awq else _smoothquant
    for group in family.SHARED_INPUT:
        names = [f"{family.linear_name(layer, linear)}.weight" for linear in group]
        try:
            found[group[0]] = search(source, layer, group[0], names, scheme, statistics.inputs[group[0]], workers)
        except NotFiniteError as error:
            raise source.not_finite(names[0]) from error
        for name in names:
            source.release(name)
    return found


def _awq(
    source: Source,
    layer: int,
    group: str,
    names: Sequence[str],
    scheme: Scheme,
    seen: InputStatistics,
    workers: Workers,
) -> Smoothing:
    result = awq.search(
        [source.weight(name) for name in names],
        seen.sample,
        seen.channel_mean,
        group_size=scheme.group_size,
        scales=scheme.scales,
        clip=scheme.clip,
        workers=workers,
    )
    scale, norm, stored = _stored(source, layer, group, result.scale)
    by = scale.reciprocal() if stored is None else stored
    errors = result.error_before, result.error_after
    return Smoothing(scale, norm, stored, _reach(seen, by), result.alpha, *errors, result.clips)


def _smoothquant(
    source: Source,
    layer: int,
    group: str,
    names: Sequence[str],
    scheme: Scheme,
    seen: InputStatistics,
    workers: Workers,
) -> Smoothing:
    assert seen.channel_amax is not None
    weights = [source.weight(name) for name in names]
    alpha = scheme.smoothquant_alpha
    stored = smoothquant.balance(weights, seen.channel_amax, alpha, workers)
    errors = smoothquant.output_errors(weights, seen.sample, seen.channel_amax, stored, workers)
    scale, nothing = stored.float().reciprocal(), (None,) * len(weights)
    return Smoothing(scale, None, stored, _reach(seen, stored), alpha, errors.before, errors.after, nothing)


def _reach(seen: InputStatistics, by: torch.Tensor) -> float:
    assert seen.channel_amax is not None
    return float((seen.channel_amax.float() * by.float()).to(seen.channel_amax.dtype).max())


def _stored(
    source: Source, layer: int, group: str, wanted: torch.Tensor
) -> tuple[torch.Tensor, tuple[str, torch.Tensor] | None, torch.Tensor | None]:
    """The scale that is left once 1/wanted is stored in the model's dtype; the norm or the tensor that stores it."""
    if group in _NORM_BEFORE:
        name = f"{_NORM_BEFORE[group]}.weight"
        scale, folded = _fold(source.weight(f"model.layers.{layer}.{name}"), wanted)
        return scale, (name, folded), None
    dtype = source.weight(f"{family.linear_name(layer, group)}.weight").dtype
    stored = _within(wanted.reciprocal(), dtype)
    return stored.float().reciprocal(), None, stored


def _fold(norm: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A norm's weights [in] and the wanted scale -> the scale that the rounded division leaves, the new weights."""
    stored = _within(norm.float() / scale, norm.dtype)
    exact = norm.float() / stored.float()
    return torch.where(torch.isfinite(exact) & (exact > 0), exact, scale), stored


def _within(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded to ``dtype``, and kept off its infinity; its zero stays zero."""
    limits = torch.finfo(dtype)
    small = x.abs().clamp(limits.tiny, limits.max).copysign(x)
    return torch.where(x == 0, x, small).to(dtype)
