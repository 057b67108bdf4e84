"""What cannot be exported, all of it said at once, before a byte is written.

Two kinds: shapes that do not divide over the ranks, and quantized tensors that TensorRT-LLM's fused matrices could only
take after a second rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from toolchain import family
from toolchain.backends.tensorrt_llm.export import INT8_FORMS, Export, kv_scale_names
from toolchain.errors import PlanError
from toolchain.family import linear_name, linear_shape
from toolchain.planning import loader

_CALIBRATE = "calibration: {data: builtin}   # in the recipe, then: scalellm quantize"

Problem = tuple[str, str]
"""What is wrong, and the next thing to type; the second may be empty."""


def check(export: Export) -> None:
    """Raises PlanError with every reason why this checkpoint cannot become a TensorRT-LLM checkpoint so."""
    problems = [*_words(export)]
    problems = problems or [*_dtypes(export), *_division(export), *_shapes(export), *_kv(export), *_scales(export)]
    if problems:
        raise PlanError(
            f"{export.checkpoint.path}: cannot become a TensorRT-LLM checkpoint: "
            + "; ".join(problem for problem, _ in problems),
            hint="\n".join(dict.fromkeys(hint for _, hint in problems if hint)),
        )


def _words(export: Export) -> Iterator[Problem]:
    split = export.split
    if split.tp < 1 or split.pp < 1:
        yield f"tp {split.tp} times pp {split.pp} is no number of GPUs", "Both are 1 or more."
    if export.kv not in ("fp16", "int8", "fp8"):
        yield f"kv: {export.kv!r} is no KV cache of TensorRT-LLM", "kv: fp16, int8 or fp8"
    if export.int8_form not in INT8_FORMS:
        yield f"int8_form: {export.int8_form!r} is not one of {', '.join(INT8_FORMS)}", ""


def _dtypes(export: Export) -> Iterator[Problem]:
    if not export.dtype:
        yield f"its dtype is {export.dtype_name}", "TensorRT-LLM computes in float16 or bfloat16: dtype float16"


def _division(export: Export) -> Iterator[Problem]:
    config, split = export.checkpoint.config, export.split
    if config.num_layers % split.pp:
        yield f"{config.num_layers} layers do not divide by pp {split.pp}", ""
    if config.num_heads % split.tp:
        yield f"{config.num_heads} attention heads do not divide by tp {split.tp}", ""
    small, large = sorted((config.num_kv_heads, split.tp))
    if large % small:
        yield f"neither of {config.num_kv_heads} key and value heads and tp {split.tp} divides the other", ""


def _shapes(export: Export) -> Iterator[Problem]:
    return loader.misfits(export.checkpoint.config, export.algo, export.group_size, export.split.tp)


def _kv(export: Export) -> Iterator[Problem]:
    checkpoint = export.checkpoint
    if export.kv == "int8" and checkpoint.kv_ranges is None:
        yield "kv: int8 needs the ranges of K and V, and this checkpoint was not calibrated", _CALIBRATE
    names = kv_scale_names(0)
    if export.kv == "fp8" and checkpoint.kv_ranges is None and not set(names) <= set(checkpoint.tensors):
        yield f"kv: fp8 needs scales, and {names[0]} is not in this checkpoint", "quantization: {kv: fp8}"


def _scales(export: Export) -> Iterator[Problem]:
    """What the parts of a fused matrix must agree in, and what TensorRT-LLM cannot do without."""
    checkpoint, scheme = export.checkpoint, export.scheme
    allowed = ("W4A16_AWQ", "W4A8_AWQ", "W8A8_SQ_PER_CHANNEL")
    if export.algo not in allowed and export.pre_quant_scales:
        yield f"it has pre_quant_scales, and TensorRT-LLM has none for {export.algo or '16-bit weights'}", ""
    for layer in range(checkpoint.config.num_layers):
        for group in family.SHARED_INPUT:
            names = [linear_name(layer, linear) for linear in group]
            if scheme.activations and (
                lost := [one for one in names if f"{one}.input_scale" not in checkpoint.tensors]
            ):
                yield f"{export.algo} needs {lost[0]}.input_scale, and it was not calibrated", _CALIBRATE
                return
            if scheme.scale == "matrix" and _differ(export, [f"{one}.weight_scale" for one in names]):
                yield (
                    f"{', '.join(names)} have different weight_scales; a fused matrix has one, and rounding a second "
                    "time is not done here",
                    "quantization: {weights: fp8, fp8_scales: shared}   # then: scalellm quantize",
                )
                return
            fused = names if group == family.ATTENTION_IN else names[:1]
            if _differ(export, [f"{one}.pre_quant_scale" for one in fused]):
                yield f"{', '.join(names)} have different pre_quant_scales; a fused matrix has one", ""
                return
            yield from _prequant_shapes(export, names)


def _differ(export: Export, names: list[str]) -> bool:
    """Whether some tensors are not all there with the same bytes; none of them there at all is equal, too."""
    there = [name for name in names if name in export.checkpoint.tensors]
    if len(there) < len(names):
        return bool(there)
    first = export.checkpoint.bytes_of(there[0])
    return not all(np.array_equal(first, export.checkpoint.bytes_of(name)) for name in there[1:])


def _prequant_shapes(export: Export, names: list[str]) -> Iterator[Problem]:
    for name in names:
        columns = linear_shape(export.checkpoint.config, name.split(".", 3)[3])[1]
        info = export.checkpoint.tensors.get(f"{name}.pre_quant_scale")
        if info and info.shape != (columns,):
            yield f"{info.file}: {info.name} has shape {list(info.shape)}, not [{columns}]", ""
