"""What quantize, convert and ``trtllm-build`` take at their peak: memory of the GPU, of the machine, and disk. Pure.

One line a term, each with the formula that gave it and where that comes from. What a *served* engine takes is in
``memory``. The memory of ``quantize`` depends on how its kernels are written and comes from ``quantizers.peaks``.
It looks at no machine: ``doctor`` holds these lines against one.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

from toolchain.family import LINEARS, LlamaConfig, linear_shape
from toolchain.planning.memory import (
    DRAFT,
    RESERVE,
    WEIGHT_LINES,
    linear_parameters,
    scale_bytes,
    small_parameters,
    weight_bytes,
)
from toolchain.planning.plan import Plan
from toolchain.units import MIB, format_bytes

Resource = Literal["vram", "ram", "disk"]

OURS = "toolchain/planning/memory.py"
BUILD_RAM_FACTOR = 2.5
"""Memory of the machine while ``trtllm-build`` runs, in checkpoint sizes. It loads a rank's weights, converts copies of
them and keeps the serialized engine. Derived from reports of builds that were killed: 7B (13.5 GB) died with 32 GB and
hundreds were taken for 70B (TensorRT-LLM issues 743, 577, 102). Not measured by us."""

CONVERT_RAM = 512 * MIB
"""Python, numpy and pieces of 4 MiB, beside the pages of one matrix (backends/tensorrt_llm/writer.py). Our bound."""


@dataclass(frozen=True)
class Peak:
    """One term: so many bytes of one resource, which one stage takes."""

    stage: str
    """``"quantize"``, ``"convert"`` or ``"trtllm-build"``."""
    resource: Resource
    bytes: int
    """Of vram: of one GPU. Of disk: what is there when the stage ends, with what earlier stages left."""
    how: str
    source: str


def peaks(plan: Plan) -> tuple[Peak, ...]:
    """The terms of a plan: disk of ``quantize``; of a TensorRT-LLM engine also all of ``convert`` and the builder."""
    quantized = _quantized_bytes(plan)
    hidden = _hidden_bytes(plan)
    how = f"the quantized checkpoint, {format_bytes(quantized)}"
    how += f", and {format_bytes(hidden)} of hidden states while it is made" if hidden else ""
    found = [Peak("quantize", "disk", quantized + hidden, how, OURS)]
    if plan.backend == "tensorrt_engine":
        found += _convert(plan, quantized)
        found += _builder(plan, quantized)
    return tuple(found)


def converted_bytes(plan: Plan) -> int:
    """Of the TensorRT-LLM checkpoint, all ranks, to about a thousandth: scales of single matrices are left out.

    Linears at their bits, K and V once more on each rank that shares them; int8 restored to 16 bits; scales per group
    or row in fp32; the embedding and the norms on each rank, the head split (contract of ``trtllm-build``).
    """
    config, scheme = plan.config, plan.weights
    restored = scheme.quant_algo in (None, "W8A16")
    bits = 16 if restored else scheme.bits
    copies = max(1, plan.tp // config.num_kv_heads)
    shared = 2 * config.num_layers * (copies - 1) * config.kv_size * config.hidden_size
    linears = (linear_parameters(config) + shared) * bits // 8
    scales = 0 if restored else scale_bytes(config, scheme, plan.group_size or 128, bytes_per_scale=4)
    scales = scales * (linear_parameters(config) + shared) // linear_parameters(config)
    return linears + scales + _smoothing(plan) + 2 * _kept_parameters(config, plan.tp)


def _kept_parameters(config: LlamaConfig, tp: int) -> int:
    """Embedding on each rank of the first stage, the head split over the last one's, norms and biases on each rank."""
    head = ceil(config.vocab_size / tp) * tp
    return (tp * config.vocab_size + head) * config.hidden_size + tp * small_parameters(config)


def _smoothing(plan: Plan) -> int:
    """Vectors that multiply the inputs: one for each of the five matrices of a layer, whole where it is cut by rows."""
    smoothed = plan.weights.name in ("int8_sq", "int4_fp8")
    if not smoothed and not (plan.weights.name == "int4" and plan.recipe.quantization.method == "awq"):
        return 0
    config = plan.config
    whole = 3 * config.hidden_size * plan.tp + config.q_size + config.intermediate_size
    return 2 * config.num_layers * whole


def _quantized_bytes(plan: Plan) -> int:
    config = plan.config
    group = plan.group_size or 128
    return weight_bytes(config, plan.weights, group, bytes_per_scale=4, dtype_bytes=config.dtype_bytes)


def _hidden_bytes(plan: Plan) -> int:
    """Three copies of what the samples are between two layers: before it, behind it, and one not yet removed."""
    given = plan.recipe.calibration
    return 3 * given.samples * given.tokens * plan.config.hidden_size * 2 if plan.calibrates else 0


def _convert(plan: Plan, quantized: int) -> list[Peak]:
    config, made = plan.config, converted_bytes(plan)
    largest = max(out * inner for out, inner in (linear_shape(config, name) for name in LINEARS))
    page = max(largest, config.vocab_size * config.hidden_size) * 2
    split = f" for tp {plan.tp} x pp {plan.pp}" if plan.tp * plan.pp > 1 else ""
    form = " with int8 weights restored to 16 bits" if plan.weights.quant_algo == "W8A16" else ""
    ram = f"{format_bytes(CONVERT_RAM)} and the pages of one matrix, {format_bytes(page)}; our bound"
    disk = f"the quantized and the TensorRT-LLM checkpoint, {format_bytes(made)}{split}{form}"
    source = "TensorRT-LLM models/convert_utils.py weight_only_quantize_dict" if form else OURS
    return [
        Peak("convert", "ram", CONVERT_RAM + page, ram, "toolchain/backends/tensorrt_llm/writer.py"),
        Peak("convert", "disk", quantized + made, disk, source),
    ]


def _builder(plan: Plan, quantized: int) -> list[Peak]:
    """One engine is built at a time, whatever ``services`` says; each rank on a GPU of its own."""
    made, ranks = converted_bytes(plan), plan.tp * plan.pp
    lines = {line.name: line.bytes // plan.services for line in plan.memory.lines if line.name != RESERVE}
    vram = sum(size for name, size in lines.items() if name != "KV cache" and not name.startswith(DRAFT))
    vram += sum(line.bytes for line in plan.memory.lines if line.name == RESERVE)
    engine = ranks * sum(lines.get(name, 0) for name in WEIGHT_LINES)
    why = ""
    if plan.weights.quant_algo == "W8A16":
        why = ": the builder rounds 16-bit weights to int8 as it loads them"
    squared = ", with S^2 of attention workspace" if "attention workspace" in lines else ""
    how = f"weights of a rank, activations and workspaces{squared}; a lower bound: kernels are timed beside them"
    return [
        Peak("trtllm-build", "vram", vram, how, "toolchain/planning/memory.py; TensorRT-LLM issues 346, 1543, 352"),
        Peak(
            "trtllm-build",
            "ram",
            int(BUILD_RAM_FACTOR * made),
            f"{BUILD_RAM_FACTOR} x TensorRT-LLM checkpoint of {format_bytes(made)}{why}; derived, not measured",
            "TensorRT-LLM issues 743, 577, 102",
        ),
        Peak(
            "trtllm-build",
            "disk",
            quantized + made + engine,
            f"both checkpoints and the engine, {format_bytes(engine)}; the repository links to its files",
            OURS,
        ),
    ]
