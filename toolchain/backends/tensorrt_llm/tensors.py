"""Every tensor of a rank's file, and which bytes of the checkpoint it is made of. It writes nothing.

Names and shapes: TensorRT-LLM's checkpoint format as its loader reads it (models/modeling_utils.py
``preprocess_weights``, quantization/layers.py, 0.12 to 1.2) and as nvidia-modelopt 0.47.0 writes it. Per matrix, with
out and in those of the rank:

    quant_algo            weight                     weights_scaling_factor   beside them
    none                  16 bits [out, in]          -                        -
    FP8                   F8_E4M3 [out, in]          F32 [1]                  activation_scaling_factor F32 [1]
    W8A16                 16 bits, or I8 [out, in]   -, or F32 [out]          -
    W8A8_SQ_PER_CHANNEL   I8 [out, in]               F32 [out]                activation_, prequant_scaling_factor
    W4A16_AWQ             I8 [out/2, in]             F32 [out, in/group]      prequant_scaling_factor, or none at all
    W4A8_AWQ              I8 [out/2, in]             F32 [out, in/group]      both, weights_scaling_factor_2 F32 [1]

``prequant_scaling_factor`` [in] has the engine's dtype and multiplies the input. Scales multiply codes; none is a
reciprocal. int4 keeps its bytes: two output rows in a byte, the even one in the low nibble, two's complement.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from toolchain.backends.tensorrt_llm.export import Export
from toolchain.backends.tensorrt_llm.numbers import ONES
from toolchain.backends.tensorrt_llm.split import MODULES, NORMS, ROW_PARALLEL
from toolchain.family import linear_name, linear_shape
from toolchain.safetensors_file import DTYPE_BYTES, TensorPlan


@dataclass(frozen=True)
class Slice:
    """[start, stop) of a tensor along ``axis``, 0 or 1: its bytes as they are, or its numbers cast to ``dtype``."""

    source: str
    axis: int
    start: int
    stop: int
    dtype: str = ""


@dataclass(frozen=True)
class Restored:
    """The same of an I8 matrix, each code times the scale of its row, in ``dtype``."""

    source: str
    scale: str
    axis: int
    start: int
    stop: int
    dtype: str


@dataclass(frozen=True)
class Constant:
    """``count`` times the same few bytes."""

    data: bytes
    count: int = 1


Part = Slice | Restored | Constant


@dataclass(frozen=True)
class Tensor(TensorPlan):
    """One tensor to be written: its parts one behind the other, joined along axis 0."""

    parts: tuple[Part, ...]


def rank_tensors(export: Export, stage: int, tp_rank: int) -> list[Tensor]:
    """What the file of a rank holds, in the order of writing. It is the same order on all ranks of a stage."""
    config, split = export.checkpoint.config, export.split
    found: list[Tensor] = []
    if stage == 0:
        found.append(_whole(export, "transformer.vocab_embedding.weight", "model.embed_tokens.weight"))
    for place, layer in enumerate(split.layers(config, stage)):
        prefix = f"transformer.layers.{place}"
        for new, old in NORMS.items():
            found.append(_whole(export, f"{prefix}.{new}.weight", f"model.layers.{layer}.{old}.weight"))
        for module in MODULES:
            found.extend(_Matrix(export, f"{prefix}.{module}", layer, module, tp_rank).tensors())
        scale = export.kv_scale(layer)
        if scale is not None:
            found.append(_scalar(f"{prefix}.attention.kv_cache_scaling_factor", scale))
    if stage == split.pp - 1:
        found.append(_whole(export, "transformer.ln_f.weight", "model.norm.weight"))
        found.append(_head(export, tp_rank))
    return found


def _whole(export: Export, name: str, source: str) -> Tensor:
    shape = export.checkpoint.tensors[source].shape
    return Tensor(name, export.dtype, shape, (Slice(source, 0, 0, shape[0], export.dtype),))


def _scalar(name: str, value: np.float32) -> Tensor:
    return Tensor(name, "F32", (1,), (Constant(np.array(value, "<f4").tobytes()),))


def _head(export: Export, tp_rank: int) -> Tensor:
    """``lm_head``; a tied one is the embedding again, since TensorRT-LLM shares the two by itself where it can."""
    tied = export.checkpoint.config.tied_embeddings
    source = "model.embed_tokens.weight" if tied else "lm_head.weight"
    width = export.checkpoint.tensors[source].shape[1]
    start, stop, padding = export.split.vocabulary(export.checkpoint.config, tp_rank)
    parts: list[Part] = [Slice(source, 0, start, stop, export.dtype)]
    if padding:
        parts.append(Constant(bytes(width * DTYPE_BYTES[export.dtype]), padding))
    return Tensor("lm_head.weight", export.dtype, (stop - start + padding, width), tuple(parts))


@dataclass(frozen=True)
class _Matrix:
    """One of ``MODULES`` on one rank."""

    export: Export
    name: str
    layer: int
    module: str
    tp_rank: int

    def tensors(self) -> Iterator[Tensor]:
        yield self._weight()
        scheme = self.export.scheme
        if scheme.scale == "matrix":
            yield self._largest("weights_scaling_factor", "weight_scale")
        elif scheme.scale and not self.export.restores_int8:
            yield self._scales()
        if scheme.activations:
            yield self._largest("activation_scaling_factor", "input_scale")
            if scheme.group_sizes:
                yield self._largest("weights_scaling_factor_2", "weight_scale_2")
        if self.export.pre_quant_scales:
            yield self._prequant()
        if MODULES[self.module][0] in self.export.checkpoint.config.biased:
            yield self._bias()

    @property
    def _linears(self) -> list[str]:
        return [linear_name(self.layer, linear) for linear in MODULES[self.module]]

    @property
    def _spans(self) -> list[tuple[int, int]]:
        config, split = self.export.checkpoint.config, self.export.split
        return [split.span(config, linear, self.tp_rank) for linear in MODULES[self.module]]

    @property
    def _axis(self) -> int:
        return 1 if self.module in ROW_PARALLEL else 0

    def _weight(self) -> Tensor:
        if self.export.restores_int8:
            dtype = self.export.dtype
            parts = tuple(
                Restored(f"{linear}.weight", f"{linear}.weight_scale", self._axis, start, stop, dtype)
                for linear, (start, stop) in zip(self._linears, self._spans, strict=True)
            )
            return Tensor(f"{self.name}.weight", dtype, self._joined("weight", parts), parts)
        packed = bool(self.export.scheme.group_sizes)
        kept = "" if self.export.algo else self.export.dtype
        sliced = self._slices("weight", self._axis, divide=2 if packed and self._axis == 0 else 1, dtype=kept)
        dtype = "I8" if packed else kept or self._stored("weight")
        return Tensor(f"{self.name}.weight", dtype, self._joined("weight", sliced), sliced)

    def _scales(self) -> Tensor:
        """[out] is cut with the outputs only, [out, in/group] with the inputs too."""
        grouped = bool(self.export.scheme.group_sizes)
        if self._axis == 0 or grouped:
            parts = self._slices("weight_scale", self._axis, divide=self.export.group_size if self._axis else 1)
        else:
            parts = self._all("weight_scale")
        return Tensor(f"{self.name}.weights_scaling_factor", "F32", self._joined("weight_scale", parts), parts)

    def _bias(self) -> Tensor:
        dtype = self.export.dtype
        parts = self._all("bias", dtype) if self._axis else self._slices("bias", 0, dtype=dtype)
        return Tensor(f"{self.name}.bias", dtype, self._joined("bias", parts), parts)

    def _prequant(self) -> Tensor:
        """The one vector that all parts share; ones where the norm before them has the scales."""
        start, stop = 0, linear_shape(self.export.checkpoint.config, MODULES[self.module][0])[1]
        if self._axis:
            start, stop = self._spans[0]
        source = f"{self._linears[0]}.pre_quant_scale"
        part: Part = Slice(source, 0, start, stop, self.export.dtype)
        if source not in self.export.checkpoint.tensors:
            part = Constant(ONES[self.export.dtype].to_bytes(2, "little"), stop - start)
        return Tensor(f"{self.name}.prequant_scaling_factor", self.export.dtype, (stop - start,), (part,))

    def _largest(self, name: str, suffix: str) -> Tensor:
        return _scalar(f"{self.name}.{name}", self.export.scalar(f"{linear}.{suffix}" for linear in self._linears))

    def _stored(self, suffix: str) -> str:
        return self.export.checkpoint.tensors[f"{self._linears[0]}.{suffix}"].dtype

    def _slices(self, suffix: str, axis: int, divide: int = 1, dtype: str = "") -> tuple[Slice, ...]:
        return tuple(
            Slice(f"{linear}.{suffix}", axis, start // divide, stop // divide, dtype)
            for linear, (start, stop) in zip(self._linears, self._spans, strict=True)
        )

    def _all(self, suffix: str, dtype: str = "") -> tuple[Slice, ...]:
        names = [f"{linear}.{suffix}" for linear in self._linears]
        return tuple(Slice(name, 0, 0, self.export.checkpoint.tensors[name].shape[0], dtype) for name in names)

    def _joined(self, suffix: str, parts: tuple[Slice, ...] | tuple[Restored, ...]) -> tuple[int, ...]:
        """The shape of some slices, joined along axis 0."""
        first = list(self.export.checkpoint.tensors[f"{self._linears[0]}.{suffix}"].shape)
        if parts[0].axis:
            first[1] = parts[0].stop - parts[0].start
        else:
            first[0] = sum(part.stop - part.start for part in parts)
        return tuple(first)
