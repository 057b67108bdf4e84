"""What every client may ask of ``tensorrt_llm``, whichever engine of ours is behind it, and what none of them takes.

Defaults and meanings are TensorRT-LLM's (1.x, cpp/include/tensorrt_llm/executor/types, docs of SamplingConfig):
without ``runtime_top_k`` > 1 and without ``runtime_top_p`` > 0 the decoding is greedy, whatever the temperature;
``len_penalty`` is 0; ``early_stopping`` is true; ``seed`` is 0. It knows nothing of Triton and no engine: how options
are named and what an engine cannot do besides, the backend's ``specification.py`` says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tensors import RefusedError, scalar
from words import unflatten

_DRAFT = "a client's own draft tokens are not supported by this engine"
_PROMPT_TABLE = "prompt embedding tables are not supported by this engine"
_LORA = "LoRA adapters are not supported by this engine"
_ENCODER = "this model has no encoder"
_LOGITS = "this engine does not return logits"
_GUIDED = "guided decoding is not supported by this engine"
_LOOKAHEAD = "lookahead decoding is not supported by this engine"
_RETENTION = "KV cache retention settings are not supported by this engine"
UNSUPPORTED = {
    "draft_input_ids": _DRAFT,
    "draft_logits": _DRAFT,
    "draft_acceptance_threshold": _DRAFT,
    "bad_words_list": "bad words are not supported by this engine (client input bad_words)",
    "embedding_bias": "a bias on tokens is not supported by this engine (client input embedding_bias_words)",
    "return_context_logits": _LOGITS,
    "return_generation_logits": _LOGITS,
    "prompt_embedding_table": _PROMPT_TABLE,
    "prompt_vocab_size": _PROMPT_TABLE,
    "prompt_table_extra_ids": _PROMPT_TABLE,
    "lora_task_id": _LORA,
    "lora_weights": _LORA,
    "lora_config": _LORA,
    "decoder_input_ids": _ENCODER,
    "decoder_input_lengths": _ENCODER,
    "encoder_input_features": _ENCODER,
    "encoder_output_lengths": _ENCODER,
    "cross_attention_mask": _ENCODER,
    "skip_cross_attn_blocks": _ENCODER,
    "runtime_top_p_min": "top-p decay is not supported by this engine",
    "runtime_top_p_decay": "top-p decay is not supported by this engine",
    "runtime_top_p_reset_ids": "top-p decay is not supported by this engine",
    "beam_search_diversity_rate": "diverse beam search is not supported by this engine",
    "context_phase_params": "separate context and generation servers are not supported by this engine",
    "retention_token_range_starts": _RETENTION,
    "retention_token_range_ends": _RETENTION,
    "retention_token_range_priorities": _RETENTION,
    "retention_token_range_durations_ms": _RETENTION,
    "retention_decode_priority": _RETENTION,
    "retention_decode_duration_ms": _RETENTION,
    "return_perf_metrics": "this engine does not return performance metrics",
    "mrope_rotary_cos_sin": "multimodal positions are not supported by this engine",
    "mrope_position_deltas": "multimodal positions are not supported by this engine",
    "guided_decoding_guide_type": _GUIDED,
    "guided_decoding_guide": _GUIDED,
    "lookahead_window_size": _LOOKAHEAD,
    "lookahead_ngram_size": _LOOKAHEAD,
    "lookahead_verification_set_size": _LOOKAHEAD,
}
NEUTRAL = {"runtime_top_p_min": 1e-6, "runtime_top_p_decay": 1.0, "runtime_top_p_reset_ids": -1.0}
"""Values besides zero that ask for nothing. TensorRT-LLM's defaults."""


@dataclass(frozen=True)
class Limits:
    """What the engine was made for, in tokens, and what the server allows."""

    max_seq_len: int
    max_input_len: int
    vocab_size: int
    eos_ids: tuple[int, ...]
    max_sequences: int
    max_beam_width: int
    exclude_input: bool
    guided: bool = False
    """Whether answers can be held to a grammar."""
    adapters: int = 0
    """LoRA adapters beside the model."""


@dataclass(frozen=True)
class Specification:
    """One checked request."""

    prompt: np.ndarray
    """int64 [n]."""
    options: dict[str, Any]
    """For the engine, named as it names them."""
    seeds: tuple[int, ...]
    """One for each independent sequence."""
    beam_width: int
    streaming: bool
    stop_words: list[list[int]] = field(default_factory=list)
    pad_id: int = 0
    log_probs: bool = False
    include_prompt: bool = False
    count_input: bool = False
    count_output: bool = False
    count_drafts: bool = False


def prompt_ids(inputs: dict[str, np.ndarray], limits: Limits) -> np.ndarray:
    """int64 [n]: the ids of one prompt, within the limits."""
    ids = inputs.get("input_ids")
    if ids is None or ids.size == 0:
        raise RefusedError("input_ids: the prompt is empty")
    if ids.ndim > 1 and ids.shape[0] != 1:
        raise RefusedError(f"input_ids: a batch of {ids.shape[0]} prompts; send one request for each prompt")
    length = int(scalar(inputs, "input_lengths", ids.size))
    if not 1 <= length <= ids.size:
        raise RefusedError(f"input_lengths: {length}, but input_ids holds {ids.size} ids")
    if length > limits.max_input_len:
        raise RefusedError(
            f"input_ids: the prompt has {length} tokens, and this engine takes at most {limits.max_input_len}"
        )
    prompt = ids.reshape(-1)[:length].astype(np.int64)
    strange = prompt[(prompt < 0) | (prompt >= limits.vocab_size)]
    if strange.size:
        raise RefusedError(f"input_ids: {int(strange[0])} is not an id of this model (0 to {limits.vocab_size - 1})")
    return prompt


def max_tokens(inputs: dict[str, np.ndarray], prompt_tokens: int, limits: Limits) -> int:
    """How many tokens may be generated, within the limits."""
    asked = int(scalar(inputs, "request_output_len", 0))
    if asked < 1:
        raise RefusedError(f"request_output_len (client input max_tokens): {asked}, must be at least 1")
    if prompt_tokens + asked > limits.max_seq_len:
        raise RefusedError(
            f"request_output_len (client input max_tokens): {prompt_tokens} tokens of prompt and {asked} of "
            f"output are {prompt_tokens + asked}, and this engine takes at most {limits.max_seq_len} together"
        )
    return asked


def stop_ids(inputs: dict[str, np.ndarray], limits: Limits) -> list[int]:
    """Which ids end the answer. One of the model's own end ids stands for all of them (Llama 3 has several), another
    id for itself alone, and -1 for none."""
    end_id = int(scalar(inputs, "end_id", limits.eos_ids[0] if limits.eos_ids else -1))
    if end_id >= limits.vocab_size:
        raise RefusedError(
            f"end_id: {end_id} is not an id of this model (0 to {limits.vocab_size - 1}, or -1 for none)"
        )
    if end_id < 0:
        return []
    return list(limits.eos_ids) if end_id in limits.eos_ids else [end_id]


def sampling(inputs: dict[str, np.ndarray]) -> tuple[int, float, float] | None:
    """(top_k, top_p, temperature), 0 for a top_k or top_p that was not asked for; None for greedy decoding.

    Greedy unless top-k or top-p asks for more; a temperature of 0 is greedy too.
    """
    top_k = int(scalar(inputs, "runtime_top_k", 0))
    top_p = float(scalar(inputs, "runtime_top_p", 0.0))
    temperature = float(scalar(inputs, "temperature", 1.0))
    if top_k < 0:
        raise RefusedError(f"runtime_top_k (client input top_k): {top_k}, must be 0 or more")
    if not 0 <= top_p <= 1:
        raise RefusedError(f"runtime_top_p (client input top_p): {top_p:g}, must be within 0 and 1")
    if not 0 <= temperature < float("inf"):
        raise RefusedError(f"temperature: {temperature:g}, must be 0 or more")
    if temperature == 0 or top_k == 1 or (top_k == 0 and top_p == 0):
        return None
    return top_k, top_p, temperature


def repetition_penalty(inputs: dict[str, np.ndarray]) -> float:
    """1 asks for nothing."""
    repetition = float(scalar(inputs, "repetition_penalty", 1.0))
    if not 0 < repetition < float("inf"):
        raise RefusedError(f"repetition_penalty: {repetition:g}, must be more than 0")
    return repetition


def min_tokens(inputs: dict[str, np.ndarray], most: int) -> int:
    """0 asks for nothing."""
    least = int(scalar(inputs, "min_tokens", 0))
    if not 0 <= least <= most:
        raise RefusedError(f"min_tokens: {least}, must be within 0 and max_tokens ({most})")
    return least


def sequences(inputs: dict[str, np.ndarray], beam_width: int, limits: Limits) -> int:
    """How many answers are wanted. Of several without beams each has a seed of its own."""
    wanted = int(scalar(inputs, "num_return_sequences", 0)) or beam_width
    if beam_width == 1 and not 1 <= wanted <= limits.max_sequences:
        raise RefusedError(f"num_return_sequences: {wanted}, this engine takes 1 to {limits.max_sequences}")
    return wanted


def specification(
    inputs: dict[str, np.ndarray],
    limits: Limits,
    prompt: np.ndarray,
    options: dict[str, Any],
    *,
    beam_width: int = 1,
    wanted: int = 1,
) -> Specification:
    """The request, put together: what the engine is told, and how its answer goes back; ``wanted`` of ``sequences``."""
    streaming = bool(scalar(inputs, "streaming", False))
    seed = int(scalar(inputs, "seed", 0))
    exclude = bool(scalar(inputs, "exclude_input_in_output", limits.exclude_input))
    return Specification(
        prompt=prompt,
        options=options,
        seeds=tuple(seed + index for index in range(1 if beam_width > 1 else wanted)),
        beam_width=beam_width,
        streaming=streaming,
        stop_words=unflatten(inputs["stop_words_list"]) if inputs.get("stop_words_list") is not None else [],
        pad_id=max(int(scalar(inputs, "pad_id", 0)), 0),
        log_probs=bool(scalar(inputs, "return_log_probs", False)),
        include_prompt=not exclude and not streaming,
        count_input=bool(scalar(inputs, "return_num_input_tokens", False)),
        count_output=bool(scalar(inputs, "return_num_output_tokens", False)),
    )
