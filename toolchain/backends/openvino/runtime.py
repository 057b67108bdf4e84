"""What OpenVINO GenAI's ContinuousBatchingPipeline is told when it loads the engine, as plain JSON.

Pure: it looks at no machine and imports no OpenVINO. The Triton model applies it:

    scheduler = openvino_genai.SchedulerConfig()
    for key, value in settings["scheduler"].items(): setattr(scheduler, key, value)
    pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", settings["properties"])

Names and meanings: https://docs.openvino.ai/2026/openvino-workflow/running-inference/inference-devices-and-modes/
cpu-device.html and openvino.genai scheduler_config.hpp, both 2026.4; numbers measured with 2026.4.1.
"""

from __future__ import annotations

from math import ceil
from typing import Any

from toolchain.errors import PlanError
from toolchain.planning.kv_window import KvWindow
from toolchain.planning.speculation import Speculation

BLOCK_TOKENS = 32
"""Tokens in one block of the paged cache on a CPU."""

STEP_TOKENS = 256
"""Most tokens in one step, also the scheduler's default. A step cannot be interrupted, so a long one stalls every
stream (256 tokens of Llama-2-13B in int4 take seconds on a small CPU); longer prompts are spread over several steps."""

_KV_PRECISION = {"int8": "u8", "fp16": "f16", "fp32": "f32"}
_PRECISION = {"auto": None, "f32": "f32", "bf16": "bf16"}


def settings(
    *,
    kv: str,
    cache_tokens: int,
    max_sequences: int,
    max_step_tokens: int,
    precision: str = "auto",
    activation_group: int = 0,
    threads: int | None = None,
    reuse: bool = True,
    window: KvWindow | None = None,
    speculation: Speculation | None = None,
) -> dict[str, Any]:
    """-> ``{"properties": {...}, "scheduler": {...}}``, with a window ``"eviction"``, and ``"draft"`` or ``"lookup"``.

    ``kv`` is ``int8``, ``fp16`` or ``fp32``; ``cache_tokens`` is rounded up to blocks of 32, all of which the
    sequences in flight can fill. ``precision``: with ``auto`` OpenVINO takes bf16 where the CPU has it; an fp32 cache
    needs f32 arithmetic (OpenVINO refuses to load otherwise), so it implies it. Activations of int4 and int8 layers
    are rounded to 8 bits, one scale for each ``activation_group`` channels of a token; with 0 they stay at that
    precision, which OpenVINO's own default does not do (it is no longer W4A16 or W8A16).

    With drafts a step is what the plan says, because it must hold all that is checked. A prompt is then cut with prompt
    lookup and not with a draft model: GenAI 2026.4.1 gives wrong tokens the other way round (measured, both).

    Raises PlanError for a cache that OpenVINO does not have.
    """
    if kv not in _KV_PRECISION:
        raise PlanError(
            f"kv_cache.dtype: openvino has no {kv} cache",
            hint=f"On a cpu choose one of {', '.join(_KV_PRECISION)}.",
        )
    properties: dict[str, Any] = {
        "KV_CACHE_PRECISION": _KV_PRECISION[kv],
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": activation_group,
    }
    hint = "f32" if kv == "fp32" else _PRECISION[precision]
    if hint:
        properties["INFERENCE_PRECISION_HINT"] = hint
    if threads:
        properties["INFERENCE_NUM_THREADS"] = threads
    scheduler = {
        "num_kv_blocks": ceil(cache_tokens / BLOCK_TOKENS),
        "max_num_batched_tokens": max_step_tokens if speculation else min(max_step_tokens, STEP_TOKENS),
        "max_num_seqs": max_sequences,
        "dynamic_split_fuse": speculation is None or speculation.lookup > 0,
        "enable_prefix_caching": reuse,
    }
    return {"properties": properties, "scheduler": scheduler, **_eviction(window), **_drafting(speculation)}


def _eviction(window: KvWindow | None) -> dict[str, Any]:
    """The sizes of CacheEvictionConfig, in tokens."""
    if window is None:
        return {}
    sizes = {"start_size": window.start, "recent_size": window.recent, "max_cache_size": window.tokens}
    return {"eviction": sizes}


def _drafting(speculation: Speculation | None) -> dict[str, Any]:
    """What is drafted in a step, and from what: a draft model's engine, or the sequence itself."""
    if speculation is None:
        return {}
    if speculation.lookup:
        return {"lookup": {"tokens": speculation.tokens, "ngram": speculation.lookup}}
    return {"draft": {"tokens": speculation.tokens}}


def kv_bytes_per_token(*, kv: str, num_layers: int, num_kv_heads: int, head_dim: int) -> float:
    """Bytes of cache for one token: of keys and values, over all layers.

    Two or four bytes an element, or for ``int8``: values one byte each and an f32 scale and zero point per token and
    head; keys one byte each and an f32 scale and zero point per *channel* and block of 32 tokens. Equal to
    ``PipelineMetrics.cache_size_in_bytes`` / (32 num_kv_blocks) as OpenVINO GenAI 2026.4.1 reports it.
    """
    if kv != "int8":
        return num_layers * num_kv_heads * 2 * head_dim * {"fp16": 2, "fp32": 4}[kv]
    keys = head_dim + 8 * head_dim / BLOCK_TOKENS
    return num_layers * num_kv_heads * (keys + head_dim + 8)
