"""What the loader of TensorRT-LLM's PyTorch runtime would refuse, or take and compute wrongly, all said at once.

What it needs of each ``quant_algo`` is in ``facts/llmapi.yaml``, with the source. Names and shapes were checked as the
checkpoint was opened. It reads no weights, only scalars.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from toolchain import family, workspace
from toolchain.checkpoint import Checkpoint
from toolchain.errors import PlanError
from toolchain.family import layer_linears, linear_name, linear_shape
from toolchain.planning.plan import Plan

UNFOLDED = ("self_attn.o_proj", "mlp.down_proj")
"""Linears that no norm comes before, whose inputs AWQ scales by a ``pre_quant_scale``."""

STORED = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
"""safetensors' names of the dtypes."""

_ANEW = "scalellm quantize --recipe RECIPE   # from the unquantized model"

Problem = tuple[str, str]
"""What is wrong, and the next thing to type; the second may be empty."""


def check(checkpoint: Checkpoint, plan: Plan) -> None:
    """Raises PlanError with every reason why the runtime cannot serve this checkpoint as the plan says."""
    problems = [*_format(checkpoint, plan)] or [*_scales(checkpoint, plan), *_cache(checkpoint, plan)]
    if problems:
        raise PlanError(
            f"{checkpoint.path}: TensorRT-LLM's PyTorch runtime cannot serve this checkpoint: "
            + "; ".join(problem for problem, _ in problems),
            hint="\n".join(dict.fromkeys(hint for _, hint in problems if hint)),
        )


def algo_of(checkpoint: Checkpoint) -> str | None:
    """The checkpoint's ``quant_algo``; None for 16-bit weights."""
    return checkpoint.quantization.quant_algo if checkpoint.quantization else None


def lacks_unit_scales(checkpoint: Checkpoint) -> bool:
    """Whether the loader wants ``pre_quant_scale`` of o_proj and down_proj, and there are none: int4 without AWQ.

    Scales of 1 change no bit of what is computed, so that the engine can bring them.
    """
    if algo_of(checkpoint) != "W4A16_AWQ":
        return False
    return not any(name.endswith(".pre_quant_scale") for name in checkpoint.tensors)


def _rules(algo: str) -> Mapping[str, Any] | None:
    rules = workspace.facts("llmapi")["loader"].get(algo)
    return rules if isinstance(rules, dict) else None


def _format(checkpoint: Checkpoint, plan: Plan) -> Iterator[Problem]:
    """Whether there is a loader for it at all, and it is what the plan says."""
    algo = algo_of(checkpoint)
    if algo != plan.weights.quant_algo:
        yield f"its weights are {algo or 'not quantized'}, and the recipe says {plan.weights.name}", _ANEW
    if algo is not None and _rules(algo) is None:
        source = workspace.facts("llmapi")["loader"]["source"]
        yield f"there is no loader for {algo} ({source})", "Use weights: fp8, int4 or none, or backend: tensorrt_engine"
    group = checkpoint.quantization.group_size if checkpoint.quantization else None
    if plan.group_size is None or algo is None:
        return
    if group != plan.group_size:
        yield f"its groups are of {group}, and the recipe says {plan.group_size}", _ANEW
        return
    for linear in family.LINEARS:
        columns = linear_shape(checkpoint.config, linear)[1]
        shared = plan.tp if linear in UNFOLDED else 1
        if columns % (group * shared):
            over = f" over tp {shared}" if shared > 1 else ""
            yield f"{linear} has {columns} input features{over}, no multiple of the group size {group}", ""


def _scales(checkpoint: Checkpoint, plan: Plan) -> Iterator[Problem]:
    algo = algo_of(checkpoint)
    rules = _rules(algo) if algo else None
    if rules is None:
        return
    names = [linear_name(layer, linear) for layer, linear in layer_linears(checkpoint.config)]
    for suffix in rules["per_linear"]:
        lost = [name for name in names if f"{name}.{suffix}" not in checkpoint.tensors]
        if lost:
            yield f"{lost[0]}.{suffix} and {len(lost) - 1} more are missing", _ANEW
    yield from _smoothing(checkpoint, plan, wanted="pre_quant_scale" in rules["unfolded"])
    for suffix in rules["equal"]:
        yield from _unequal(checkpoint, suffix)
    yield from _scalars(checkpoint)


def _smoothing(checkpoint: Checkpoint, plan: Plan, *, wanted: bool) -> Iterator[Problem]:
    """``pre_quant_scale`` stands where the loader reads it, and nowhere else."""
    found = {name.removesuffix(".pre_quant_scale") for name in checkpoint.tensors if name.endswith(".pre_quant_scale")}
    places = {linear_name(layer, linear) for layer, linear in layer_linears(checkpoint.config) if linear in UNFOLDED}
    read = places if wanted else set()
    if unread := sorted(found - read):
        yield (
            f"{unread[0]}.pre_quant_scale and {len(unread) - 1} more are not read by the loader, so that the weights "
            "would be multiplied with inputs that they were not made for",
            _ANEW,
        )
    lost = sorted(read - found)
    if lost and not lacks_unit_scales(checkpoint):
        yield f"{lost[0]}.pre_quant_scale and {len(lost) - 1} more are missing", _ANEW
    if algo_of(checkpoint) == "W4A8_AWQ":
        dtypes = {checkpoint.tensors[f"{name}.pre_quant_scale"].dtype for name in found}
        if wrong := sorted(dtypes - {STORED[plan.dtype]}):
            yield f"its pre_quant_scales are {wrong[0]}, and W4A8 wants the dtype of the model, {plan.dtype}", ""


def _unequal(checkpoint: Checkpoint, suffix: str) -> Iterator[Problem]:
    """Matrices that are multiplied as one share a scalar."""
    for layer in range(checkpoint.config.num_layers):
        for group in family.SHARED_INPUT:
            names = [f"{linear_name(layer, linear)}.{suffix}" for linear in group]
            if all(name in checkpoint.tensors for name in names) and len({_scalar(checkpoint, n) for n in names}) > 1:
                yield f"{', '.join(names)} differ, and the loader asserts that they are equal", _ANEW
                return


def _scalars(checkpoint: Checkpoint) -> Iterator[Problem]:
    """A scale that is zero, negative or no number makes garbage without a word."""
    for info in checkpoint.tensors.values():
        if info.dtype == "F32" and info.nbytes == 4 and info.name.endswith(("_scale", "_scale_2")):
            value = _scalar(checkpoint, info.name)
            if not 0 < value < math.inf:
                yield f"{info.file}: {info.name} is {value:g}, no scale", _ANEW
                return


def _cache(checkpoint: Checkpoint, plan: Plan) -> Iterator[Problem]:
    """The cache that the folder states is the one that the runtime uses, unless it is told FP8."""
    stated = checkpoint.quantization.kv_cache_quant_algo if checkpoint.quantization else None
    if plan.kv.name == "int8":
        yield "there is no INT8 cache for a quantized checkpoint", "Use kv_cache dtype: fp8 (SM 8.9 and newer) or fp16"
    if stated not in (None, "FP8") or (stated == "FP8" and plan.kv.name != "fp8"):
        yield f"its cache is {stated}, and the recipe says {plan.kv.name}", _ANEW


def _scalar(checkpoint: Checkpoint, name: str) -> float:
    value = checkpoint.bytes_of(name).view(np.dtype("<f4"))
    return float(value.reshape(-1)[0])
