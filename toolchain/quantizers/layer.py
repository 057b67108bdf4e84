"""The matrices of one decoder layer, quantized in the order in which they are written.

Matrices that read the same input share one fp8 scale: TensorRT-LLM fuses q/k/v into one GEMM and gate/up into another,
and equal scales spare it a second rounding (modelopt's TensorRT-LLM export does the same). It writes no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from toolchain import family
from toolchain.quantizers import NotFiniteError, WeightError, fp8, int4
from toolchain.quantizers.layout import Scheme
from toolchain.quantizers.rows import Workers
from toolchain.quantizers.source import Source


@dataclass(frozen=True)
class QuantizedMatrix:
    """One linear layer: ``name`` (``model.layers.3.mlp.up_proj``) and its tensors by suffix, in writing order."""

    name: str
    tensors: dict[str, torch.Tensor]
    error: WeightError
    source_bytes: int


def quantize_layer(source: Source, layer: int, scheme: Scheme, workers: Workers) -> Iterator[QuantizedMatrix]:
    """Every matrix of ``family.LINEARS``. ArtifactError, naming tensor and file, for NaN or infinity in one."""
    for group in family.SHARED_INPUT:
        names = [family.linear_name(layer, linear) for linear in group]
        shared = _shared_scale(source, names, workers) if scheme.weights == "fp8" else torch.tensor(1.0)
        for name in names:
            yield _quantize(source, name, shared, scheme, workers)


def _shared_scale(source: Source, names: Sequence[str], workers: Workers) -> torch.Tensor:
    largest = []
    for name in names:
        try:
            largest.append(fp8.amax(source.weight(f"{name}.weight"), workers))
        except NotFiniteError as error:
            raise source.not_finite(f"{name}.weight") from error
        source.release(f"{name}.weight")
    return fp8.scale_of(largest)


def _quantize(source: Source, name: str, shared: torch.Tensor, scheme: Scheme, workers: Workers) -> QuantizedMatrix:
    weight = source.weight(f"{name}.weight")
    nbytes = weight.nbytes
    try:
        if scheme.weights == "fp8":
            eight = fp8.cast(weight, shared, workers)
            tensors, error = {"weight": eight.code, "weight_scale": shared}, eight.error
        else:
            four = int4.quantize(weight, scheme.group_size, scheme.scales, workers)
            tensors, error = {"weight": four.packed, "weight_scale": four.scale}, four.error
    except NotFiniteError as cause:
        raise source.not_finite(f"{name}.weight") from cause
    source.release(f"{name}.weight")
    return QuantizedMatrix(name, tensors, error, nbytes)
