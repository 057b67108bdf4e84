"""The matrices of one decoder layer, quantized in the order in which they are written.

Matrices that read the same input share one fp8 scale: TensorRT-LLM fuses q/k/v into one GEMM and gate/up into another,
and equal scales spare it a second rounding (modelopt's TensorRT-LLM export does the same). It writes no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from toolchain import family
from toolchain.quantizers import NotFiniteError, WeightError, awq, fp8, gptq, int4
from toolchain.quantizers.layout import Scheme
from toolchain.quantizers.rows import Workers
from toolchain.quantizers.smoothing import Smoothing
from toolchain.quantizers.source import Source
from toolchain.quantizers.statistics import LayerStatistics


@dataclass(frozen=True)
class QuantizedMatrix:
    """One linear layer: ``name`` (``model.layers.3.mlp.up_proj``) and its tensors by suffix, in writing order."""

    name: str
    tensors: dict[str, torch.Tensor]
    error: WeightError
    source_bytes: int


@dataclass(frozen=True)
class Findings:
    """What calibration found for one layer."""

    statistics: LayerStatistics
    smoothing: Mapping[str, Smoothing]
    """By the first linear of each group of ``family.SHARED_INPUT``; empty unless the method is awq."""


def quantize_layer(
    source: Source, layer: int, scheme: Scheme, workers: Workers, findings: Findings | None = None
) -> Iterator[QuantizedMatrix]:
    """Every matrix of ``family.LINEARS``. ArtifactError, naming tensor and file, for NaN or infinity in one.

    With method gptq the Hessians in ``findings`` are given up on the way, since they are larger than the weights.
    """
    for group in family.SHARED_INPUT:
        names = [family.linear_name(layer, linear) for linear in group]
        if scheme.weights == "fp8":
            amax = findings.statistics.inputs[group[0]].amax if findings else None
            yield from _eight(source, names, amax, scheme, workers)
        else:
            rounding = _rounding(group[0], scheme, workers, findings)
            for place, name in enumerate(names):
                yield _four(source, name, place, rounding)


def restore(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The tensors of one linear layer by suffix -> what they stand for: float32 [out, in], for a plain activation."""
    weight = tensors["weight"]
    if weight.dtype == torch.uint8:
        whole = int4.dequantize(weight, tensors["weight_scale"])
        return whole.mul_(tensors["pre_quant_scale"].float()) if "pre_quant_scale" in tensors else whole
    return weight.float() * tensors["weight_scale"] if "weight_scale" in tensors else weight.float()


def _eight(
    source: Source, names: Sequence[str], input_amax: float | None, scheme: Scheme, workers: Workers
) -> Iterator[QuantizedMatrix]:
    separate = scheme.fp8_scales == "separate"
    largest = [_amax(source, name, workers) for name in names]
    for name, own in zip(names, largest, strict=True):
        weight = source.weight(f"{name}.weight")
        scale = fp8.scale_of([own] if separate else largest)
        eight = fp8.cast(weight, scale, workers, twice=separate)
        tensors = {"weight": eight.code, "weight_scale": scale}
        if input_amax is not None:
            tensors["input_scale"] = fp8.scale_of([input_amax])
        source.release(f"{name}.weight")
        yield QuantizedMatrix(name, tensors, eight.error, weight.nbytes)


def _amax(source: Source, name: str, workers: Workers) -> float:
    try:
        found = fp8.amax(source.weight(f"{name}.weight"), workers)
    except NotFiniteError as error:
        raise source.not_finite(f"{name}.weight") from error
    source.release(f"{name}.weight")
    return found


Rounding = Callable[[torch.Tensor, int], tuple[int4.Int4Matrix, dict[str, torch.Tensor]]]
"""A matrix and its place in its group -> what becomes of it, and the tensors beside it."""


def _rounding(group: str, scheme: Scheme, workers: Workers, findings: Findings | None) -> Rounding:
    """How the matrices of one group become int4."""
    size, scales = scheme.group_size, scheme.scales
    if findings and scheme.method == "gptq":
        factor = gptq.factor(findings.statistics.inputs[group].take_hessian())
        return lambda weight, _: (
            gptq.quantize(weight, factor, group_size=size, scales=scales, workers=workers),
            {},
        )
    if findings and scheme.method == "awq":
        one = findings.smoothing[group]
        beside = {} if one.pre_quant_scale is None else {"pre_quant_scale": one.pre_quant_scale}
        return lambda weight, place: (
            awq.apply(
                weight,
                one.scale,
                group_size=size,
                scales=scales,
                workers=workers,
                clip=one.clips[place],
            ),
            beside,
        )
    return lambda weight, _: (int4.quantize(weight, size, scales, workers), {})


def _four(source: Source, name: str, place: int, rounding: Rounding) -> QuantizedMatrix:
    weight = source.weight(f"{name}.weight")
    try:
        four, beside = rounding(weight, place)
    except NotFiniteError as cause:
        raise source.not_finite(f"{name}.weight") from cause
    source.release(f"{name}.weight")
    return QuantizedMatrix(
        name, {"weight": four.packed, "weight_scale": four.scale, **beside}, four.error, weight.nbytes
    )
