"""Where the memory of a device goes: one line a term, with the formula that gave it. Pure arithmetic.

It knows shapes, number formats and limits. It does not know recipes or backends' names, and it decides nothing:
``plan`` asks it and refuses what does not fit. With tp or pp it is the memory of the rank with the largest share.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, prod

from toolchain.device import Device
from toolchain.engine import Limits
from toolchain.family import LINEARS, LlamaConfig, kept_tensors, linear_shape
from toolchain.quantization import KvScheme, WeightScheme
from toolchain.units import GIB, MIB, format_bytes

CUDA_CONTEXT_BYTES = 551 * MIB
"""CUDA context and loaded libraries of one process: what ai-dynamo/aiconfigurator took for "other memory" before it
chose a larger safety margin (src/aiconfigurator/systems/l40s.yaml @ee962fc3, 2025)."""

RUNTIME_BYTES = 1 * GIB
"""Workspaces of TensorRT, cuBLAS and the decoder. Our assumption: with the context and the activations of 4096 tokens
of Llama-2-13B it comes to about 2 GiB, the reserve that fits published sequence counts. To be measured on a GPU."""

CPU_PROCESS_BYTES = 768 * MIB
"""Python, OpenVINO and Triton of one service on a CPU, without weights and cache. Our assumption."""

KV_FREE_FRACTION = 0.9
"""Share of the memory left over that the KV cache may take when the recipe names no size: TensorRT-LLM's default
``kv_cache_free_gpu_memory_fraction`` (tensorrtllm_backend README, 2024)."""

TOKENS_PER_BLOCK = 64
"""Paged KV is given out in blocks: 64 tokens were TensorRT-LLM's default in 0.10 to 0.17 and are what ``build_flags``
passes to every release; 32 is the later default, and OpenVINO's on CPUs."""

CPU_BLOCK_TOKENS = 32
"""Tokens in one block of OpenVINO's paged cache on a CPU (GenAI 2026.4.1)."""

CPU_FP8_BITS = 16
"""OpenVINO's CPU plugin has no FP8 kernel: the engine keeps FP8 weights as 16-bit numbers, which hold every e4m3 number
exactly. Measured with 2026.4.1 under bf16."""

PROCESS, CPU_PROCESS = "CUDA context", "process and libraries"
ONCE_A_PROCESS = (PROCESS, CPU_PROCESS)
"""The terms that two engines in one process share."""

DRAFT = "draft: "
"""How the terms of a draft model begin."""

RESERVE = "reserve"
"""The term of the device's memory that others have."""

WEIGHT_LINES = (
    *("attention weights", "MLP weights", "weight scales"),
    *("embedding", "head", "embedding or head", "norms", "norms and biases"),
)
"""The terms that are an engine's file too."""

LOGITS_COPIES = 2
"""fp32 logits and the copy that sampling sorts. Our assumption."""


@dataclass(frozen=True)
class MemoryLine:
    """One term, over all services of the device."""

    name: str
    bytes: int
    how: str


@dataclass(frozen=True)
class MemoryPlan:
    """All terms of one device, and what is left for keys and values."""

    lines: tuple[MemoryLine, ...]
    total: int
    available: int | None
    """What the device has; None where it is not known."""
    fits: bool
    kv_bytes_per_token: int
    max_kv_tokens: int
    """Tokens in the cache of one service."""
    sequences_at_full_length: int
    """Sequences of max_seq_len that the cache of one service holds at once; a window may leave less of each in it."""
    kv_bytes_per_sequence: int
    """What one of them takes."""
    services: int

    @property
    def free_bytes(self) -> int | None:
        """What stays free beside all of this; None where the device's memory is not known."""
        return None if self.available is None else max(0, self.available - self.total)

    @property
    def missing_bytes(self) -> int:
        """How much too large it is; 0 when it fits."""
        return 0 if self.available is None else max(0, self.total - self.available)


def linear_parameters(config: LlamaConfig) -> int:
    """Weights of the seven linears of every layer: 12 687 769 600 for Llama-2-13B."""
    return attention_parameters(config) + mlp_parameters(config)


@functools.cache
def attention_parameters(config: LlamaConfig) -> int:
    """Weights of q, k, v and o of every layer: 4 194 304 000 for Llama-2-13B."""
    return _parameters(config, "self_attn.")


@functools.cache
def mlp_parameters(config: LlamaConfig) -> int:
    """Weights of gate, up and down of every layer: 8 493 465 600 for Llama-2-13B."""
    return _parameters(config, "mlp.")


def _parameters(config: LlamaConfig, part: str) -> int:
    return config.num_layers * sum(prod(linear_shape(config, name)) for name in LINEARS if name.startswith(part))


def parameters(config: LlamaConfig) -> int:
    """All parameters: linears, embedding, head (where not tied), norms and biases: 13 015 864 320 for Llama-2-13B."""
    return linear_parameters(config) + embedding_parameters(config) + small_parameters(config)


def embedding_parameters(config: LlamaConfig) -> int:
    return config.vocab_size * config.hidden_size * (1 if config.tied_embeddings else 2)


def small_parameters(config: LlamaConfig) -> int:
    """What stays in the model's dtype beside the tables: norms and biases."""
    per_layer = sum(prod(shape) for shape in kept_tensors(config).values())
    return config.num_layers * per_layer + config.hidden_size


def scale_bytes(config: LlamaConfig, weights: WeightScheme, group_size: int, *, bytes_per_scale: int) -> int:
    """Bytes of the weights' scales: per group (int4), output channel (int8) or matrix (fp8).

    ``bytes_per_scale`` of int4: 4 in the checkpoint and on a CPU; 2 in a TensorRT-LLM engine, which casts them.
    """
    shapes = [linear_shape(config, linear) for linear in LINEARS]
    in_checkpoint = config.num_layers * sum(weights.scale_bytes(out, inner, group_size) for out, inner in shapes)
    return in_checkpoint * bytes_per_scale // 4 if weights.group_sizes else in_checkpoint


def weight_bytes(
    config: LlamaConfig, weights: WeightScheme, group_size: int = 128, *, bytes_per_scale: int = 4, dtype_bytes: int = 2
) -> int:
    """Bytes of the whole model: linears at their bits, their scales, and the rest in the model's dtype."""
    linears = linear_parameters(config) * (dtype_bytes * 8 if weights.quant_algo is None else weights.bits) // 8
    rest = (embedding_parameters(config) + small_parameters(config)) * dtype_bytes
    return linears + scale_bytes(config, weights, group_size, bytes_per_scale=bytes_per_scale) + rest


def kv_bytes_per_token(config: LlamaConfig, kv: KvScheme, *, tp: int = 1, pp: int = 1, cpu: bool = False) -> int:
    """layers x kv_heads x 2 x head_dim x bytes: 819 200 for Llama-2-13B in 16 bits. Of one rank with tp or pp.

    OpenVINO's u8 cache adds f32 scales and zero points: for values per token and head, for keys per channel and block.
    """
    pair = 2 * config.head_dim * kv.bytes_per_element
    if cpu and kv.quant_algo == "INT8":
        pair += 8 + ceil(8 * config.head_dim / CPU_BLOCK_TOKENS)
    return ceil(config.num_layers / pp) * ceil(config.num_kv_heads / tp) * pair


def unfused_attention_bytes(config: LlamaConfig, limits: Limits, *, tp: int = 1) -> int:
    """Scores of attention without a fused kernel: batch x heads x S^2 x (2 + 4) bytes, S = max_input_len.

    TensorRT-LLM cpp/tensorrt_llm/plugins/gptAttentionCommon @0.13.0.dev2024082000: a 16-bit and an fp32 copy of QK^T.
    """
    return limits.max_batch_size * ceil(config.num_heads / tp) * limits.max_input_len**2 * 6


def activation_bytes(config: LlamaConfig, max_num_tokens: int, *, tp: int = 1, element_bytes: int = 2) -> int:
    """max_num_tokens x the widest live set x bytes. Our model of it, not a measurement:

    attention keeps residual, normed input, q, k, v and the output; the MLP keeps residual, normed input, gate, up and
    their product. 2 x hidden + max(2 x q + 2 x kv, 3 x intermediate) / tp elements per token.
    """
    inner = max(2 * config.q_size + 2 * config.kv_size, 3 * config.intermediate_size)
    return max_num_tokens * (2 * config.hidden_size + ceil(inner / tp)) * element_bytes


def memory_plan(
    config: LlamaConfig,
    weights: WeightScheme,
    kv: KvScheme,
    limits: Limits,
    device: Device,
    *,
    tp: int = 1,
    pp: int = 1,
    services: int = 1,
    unfused_attention: bool = False,
    group_size: int = 128,
    kv_tokens: int | None = None,
    kv_pool_bytes: int | None = None,
    host_memory_bytes: int | None = None,
    sequence_tokens: int | None = None,
    draft: LlamaConfig | None = None,
    reserve_bytes: int = 0,
) -> MemoryPlan:
    """Every term of one device's memory, for all its services.

    ``kv_tokens`` or ``kv_pool_bytes`` fix the cache of one service; without them it gets what the limits can use, at
    most ``KV_FREE_FRACTION`` of what is left, and at least one sequence of max_seq_len (which then may not fit).
    ``host_memory_bytes`` is the memory of a device that does not state its own, the CPU. ``sequence_tokens`` is what a
    sequence of max_seq_len takes in the cache, where that is another number. ``draft`` is a second model in the same
    process, quantized alike, whose cache holds as many tokens. ``reserve_bytes`` of the device belong to others.
    """
    sequence = sequence_tokens or limits.max_seq_len
    fixed = list(_fixed(config, weights, limits, device, tp=tp, pp=pp, group_size=group_size))
    if unfused_attention:
        how = f"{limits.max_batch_size} sequences x heads x {limits.max_input_len}^2 x 6 B: no fused kernel on this SM"
        fixed.append(MemoryLine("attention workspace", unfused_attention_bytes(config, limits, tp=tp), how))
    per_token = kv_bytes_per_token(config, kv, tp=tp, pp=pp, cpu=device.is_cpu)
    draft_per_token = kv_bytes_per_token(draft, kv, tp=tp, pp=pp, cpu=device.is_cpu) if draft else 0
    if draft:
        lines_of_draft = _fixed(draft, weights, limits, device, tp=tp, pp=pp, group_size=group_size)
        fixed += [replace(line, name=DRAFT + line.name) for line in lines_of_draft if line.name not in ONCE_A_PROCESS]
    available = device.memory_bytes if device.memory_bytes is not None else host_memory_bytes
    free = None if available is None else (available - reserve_bytes) // services - sum(line.bytes for line in fixed)
    if kv_pool_bytes is not None:
        kv_tokens = kv_pool_bytes // (per_token + draft_per_token)
    tokens = _auto_tokens(limits, sequence, per_token + draft_per_token, free) if kv_tokens is None else kv_tokens
    caches = [("KV cache", per_token), (f"{DRAFT}KV cache", draft_per_token)][: 2 if draft else 1]
    each = f"{kv.name}; a sequence of {sequence} takes"
    fixed += [
        MemoryLine(name, tokens * size, f"{tokens} tokens x {size} B ({each} {format_bytes(sequence * size)})")
        for name, size in caches
    ]
    kept = [MemoryLine(RESERVE, reserve_bytes, "of the device, for a desktop or others")] if reserve_bytes else []
    lines = (*(_times(line, services) for line in fixed), *kept)
    total = sum(line.bytes for line in lines)
    return MemoryPlan(
        lines=lines,
        total=total,
        available=available,
        fits=(available is None or total <= available) and tokens >= sequence,
        kv_bytes_per_token=per_token,
        max_kv_tokens=tokens,
        sequences_at_full_length=tokens // sequence,
        kv_bytes_per_sequence=sequence * per_token,
        services=services,
    )


def _fixed(
    config: LlamaConfig, weights: WeightScheme, limits: Limits, device: Device, *, tp: int, pp: int, group_size: int
) -> Iterator[MemoryLine]:
    """What one service takes before its KV cache."""
    dtype_bytes = config.dtype_bytes if device.is_cpu else 2
    bits = weights.bits if weights.quant_algo else dtype_bytes * 8
    why = f" / (tp {tp} x pp {pp})" if tp * pp > 1 else ""
    if device.is_cpu and weights.quant_algo == "FP8":
        bits, why = CPU_FP8_BITS, ", unpacked: OpenVINO multiplies no FP8 (with precision f32 twice that)"
    share = ceil(config.num_layers / pp) / config.num_layers / tp
    attention = ceil(attention_parameters(config) * bits / 8 * share)
    rest = ceil(linear_parameters(config) * bits / 8 * share) - attention
    yield MemoryLine("attention weights", attention, f"{attention_parameters(config)} x {bits} bits{why}")
    yield MemoryLine("MLP weights", rest, f"{mlp_parameters(config)} x {bits} bits{why}")
    bytes_per_scale = 4 if device.is_cpu or not weights.group_sizes else 2
    scales = scale_bytes(config, weights, group_size, bytes_per_scale=bytes_per_scale)
    if scales:
        shared = {"group": f"{group_size} input channels", "row": "output channel"}
        what = f"one per {shared.get(weights.scale, weights.scale)}"
        yield MemoryLine("weight scales", ceil(scales * share), f"{what}, {bytes_per_scale} B each")
    yield from _tables(config, dtype_bytes, tp=tp, pp=pp)
    small, what = small_parameters(config), "norms and biases" if config.biased else "norms"
    yield MemoryLine(what, small * dtype_bytes, f"{small} x {dtype_bytes} B")
    element_bytes = 4 if device.is_cpu else 2
    yield MemoryLine(
        "activations",
        activation_bytes(config, limits.max_num_tokens, tp=tp, element_bytes=element_bytes),
        f"{limits.max_num_tokens} tokens x (2 hidden + max(2 q + 2 kv, 3 intermediate)) x {element_bytes} B; our model",
    )
    logits = limits.max_batch_size * config.vocab_size * 4 * LOGITS_COPIES
    yield MemoryLine("logits", logits, f"{limits.max_batch_size} x {config.vocab_size} x 4 B x {LOGITS_COPIES}")
    if device.is_cpu:
        yield MemoryLine(CPU_PROCESS, CPU_PROCESS_BYTES, "our assumption")
    else:
        yield MemoryLine(PROCESS, CUDA_CONTEXT_BYTES, "551 MiB a process, aiconfigurator 2025")
        yield MemoryLine("runtime workspaces", RUNTIME_BYTES, "our assumption")


def _tables(config: LlamaConfig, dtype_bytes: int, *, tp: int, pp: int) -> Iterator[MemoryLine]:
    """The embedding, whole on each rank, and the head, split by tp; with pp a rank has one of them."""
    table = config.vocab_size * config.hidden_size * dtype_bytes
    how = f"{config.vocab_size} x {config.hidden_size} x {dtype_bytes} B"
    if pp > 1:
        yield MemoryLine("embedding or head", table, f"{how}; no rank has both")
        return
    yield MemoryLine("embedding", table, f"{how}; the head is the same" if config.tied_embeddings else how)
    if not config.tied_embeddings:
        yield MemoryLine("head", ceil(table / tp), f"{how} / {tp}" if tp > 1 else how)


def _auto_tokens(limits: Limits, sequence: int, per_token: int, free: int | None) -> int:
    """Cache tokens of one service: what the limits can use, in whole blocks, within the free memory."""
    sequence = ceil(sequence / TOKENS_PER_BLOCK) * TOKENS_PER_BLOCK
    useful = limits.max_batch_size * sequence
    if free is None:
        return useful
    room = int(max(0, free) * KV_FREE_FRACTION) // per_token // TOKENS_PER_BLOCK * TOKENS_PER_BLOCK
    return max(sequence, min(useful, room))


def _times(line: MemoryLine, services: int) -> MemoryLine:
    if services == 1:
        return line
    return MemoryLine(line.name, line.bytes * services, f"{services} services x {format_bytes(line.bytes)}: {line.how}")
