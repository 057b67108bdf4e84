"""The matrices of one decoder layer, quantized in the order in which they are written.

Matrices that read the same input share one fp8 scale: TensorRT-LLM fuses q/k/v into one GEMM and gate/up into another,
and equal scales spare it a second rounding (modelopt's TensorRT-LLM export does the same). For the same reason they
share what scales their input's channels, and the scale of the input itself. It writes no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from toolchain import family
from toolchain.quantizers import NotFiniteError, WeightError, awq, fp8, gptq, int4, int8
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
    """Of what the tensors stand for, against the model's own weights."""
    source_bytes: int


@dataclass(frozen=True)
class Findings:
    """What calibration found for one layer."""

    statistics: LayerStatistics
    smoothing: Mapping[str, Smoothing]
    """By the first linear of each group of ``family.SHARED_INPUT``; empty unless input channels are scaled."""


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
            yield from _fp8(source, names, amax, scheme, workers)
        elif scheme.weights in ("int8", "int8_sq"):
            yield from _int8(source, names, findings.smoothing.get(group[0]) if findings else None, workers)
        else:
            yield from _int4(source, names, scheme, _rounding(group[0], scheme, workers, findings), workers)


def restore(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The tensors of one linear layer by suffix -> what they stand for: float32 [out, in], for a plain activation."""
    weight = tensors["weight"]
    if "weight_scale" not in tensors:
        return weight.float()
    if weight.dtype == torch.uint8:
        whole = int4.dequantize(weight, tensors["weight_scale"])
    elif weight.dtype == torch.int8:
        whole = int8.dequantize(weight, tensors["weight_scale"])
    else:
        whole = weight.float() * tensors["weight_scale"]
    return whole.mul_(tensors["pre_quant_scale"].float()) if "pre_quant_scale" in tensors else whole


def _fp8(
    source: Source, names: Sequence[str], input_amax: float | None, scheme: Scheme, workers: Workers
) -> Iterator[QuantizedMatrix]:
    separate = scheme.fp8_scales == "separate"
    largest = [_amax(source, name, workers) for name in names]
    for name, own in zip(names, largest, strict=True):
        scale = fp8.scale_of([own] if separate else largest)
        with _read(source, name) as weight:
            eight = fp8.cast(weight, scale, workers, twice=separate)
        tensors = {"weight": eight.code, "weight_scale": scale}
        if input_amax is not None:
            tensors["input_scale"] = fp8.scale_of([input_amax])
        yield QuantizedMatrix(name, tensors, eight.error, weight.nbytes)


@contextmanager
def _read(source: Source, name: str) -> Iterator[torch.Tensor]:
    """A matrix, given back afterwards; an ArtifactError names it where its numbers are not finite."""
    try:
        yield source.weight(f"{name}.weight")
    except NotFiniteError as error:
        raise source.not_finite(f"{name}.weight") from error
    source.release(f"{name}.weight")


def _amax(source: Source, name: str, workers: Workers) -> float:
    with _read(source, name) as weight:
        return fp8.amax(weight, workers)


def _int8(
    source: Source, names: Sequence[str], smoothing: Smoothing | None, workers: Workers
) -> Iterator[QuantizedMatrix]:
    beside = {}
    if smoothing and smoothing.pre_quant_scale is not None:
        beside = {"input_scale": int8.scale_of(smoothing.amax), "pre_quant_scale": smoothing.pre_quant_scale}
    for name in names:
        with _read(source, name) as weight:
            made = int8.quantize(weight, workers, by=smoothing.scale if smoothing else None)
        tensors = {"weight": made.code, "weight_scale": made.scale, **beside}
        yield QuantizedMatrix(name, tensors, made.error, weight.nbytes)


@dataclass(frozen=True)
class _Rounding:
    """How the matrices of one group become int4."""

    quantize: Callable[[torch.Tensor, int], int4.Int4Matrix]
    """Of a matrix and its place in the group."""
    input_scale: torch.Tensor | None = None
    """For e4m3 activations."""
    pre_quant_scale: torch.Tensor | None = None


def _rounding(group: str, scheme: Scheme, workers: Workers, findings: Findings | None) -> _Rounding:
    size, scales = scheme.group_size, scheme.scales
    if findings and scheme.gptq:
        factor = gptq.factor(findings.statistics.inputs[group].take_hessian())
        return _Rounding(
            lambda weight, _: gptq.quantize(weight, factor, group_size=size, scales=scales, workers=workers)
        )
    if findings and scheme.awq:
        one = findings.smoothing[group]
        return _Rounding(
            lambda weight, place: awq.apply(
                weight, one.scale, group_size=size, scales=scales, workers=workers, clip=one.clips[place]
            ),
            fp8.scale_of([one.amax]) if scheme.weights == "int4_fp8" else None,
            one.pre_quant_scale,
        )
    return _Rounding(lambda weight, _: int4.quantize(weight, size, scales, workers))


def _int4(
    source: Source, names: Sequence[str], scheme: Scheme, rounding: _Rounding, workers: Workers
) -> Iterator[QuantizedMatrix]:
    """One after the other; those of int4_fp8 are held until all of the group are known, since they share a scale."""
    if scheme.weights != "int4_fp8":
        for place, name in enumerate(names):
            yield _as_int4(source, name, _four(source, name, place, rounding), rounding)
        return
    made = [_four(source, name, place, rounding) for place, name in enumerate(names)]
    second = int4.e4m3_scale(made, workers)
    for name, four in zip(names, made, strict=True):
        yield _as_int4(source, name, four, rounding, second)


def _four(source: Source, name: str, place: int, rounding: _Rounding) -> int4.Int4Matrix:
    with _read(source, name) as weight:
        return rounding.quantize(weight, place)


def _as_int4(
    source: Source, name: str, four: int4.Int4Matrix, rounding: _Rounding, second: torch.Tensor | None = None
) -> QuantizedMatrix:
    optional = {
        "weight_scale_2": second,
        "input_scale": rounding.input_scale,
        "pre_quant_scale": rounding.pre_quant_scale,
    }
    tensors = {"weight": four.packed, "weight_scale": four.scale}
    tensors |= {suffix: tensor for suffix, tensor in optional.items() if tensor is not None}
    return QuantizedMatrix(name, tensors, four.error, source.checkpoint.tensors[f"{name}.weight"].nbytes)
