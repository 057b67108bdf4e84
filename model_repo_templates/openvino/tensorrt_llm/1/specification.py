"""What a client may ask of the OpenVINO engine, in the words of OpenVINO GenAI. It knows nothing of Triton.

What GenAI 2026.4 cannot do, or does differently from TensorRT-LLM, is refused by name.
"""

from __future__ import annotations

from typing import Any

import asked
import numpy as np
from asked import Limits, Specification
from guides import guide
from tensors import RefusedError, refuse, scalar

_PENALTY = (
    "not supported: OpenVINO GenAI 2026.4 makes tokens with a negative logit more likely instead of less; "
    "use repetition_penalty"
)
_GUIDED = "not supported by this engine: its recipe lacks guided_decoding: xgrammar"
_GUIDES = dict.fromkeys(("guided_decoding_guide_type", "guided_decoding_guide"), _GUIDED)
_LORA = "an engine of OpenVINO has its adapters from the recipe (lora); name one by lora_task_id"
UNSUPPORTED = {**asked.UNSUPPORTED, "presence_penalty": _PENALTY, "frequency_penalty": _PENALTY, **_GUIDES}
UNSUPPORTED |= {"lora_weights": _LORA, "lora_config": _LORA}


def specify(inputs: dict[str, np.ndarray], limits: Limits) -> Specification:
    """The request's tensors, by name -> what to generate. Raises RefusedError, naming the tensor."""
    taken = {*(_GUIDES if limits.guided else ()), *(("lora_task_id",) if limits.adapters else ())}
    refuse(inputs, {name: why for name, why in UNSUPPORTED.items() if name not in taken}, asked.NEUTRAL)
    prompt = asked.prompt_ids(inputs, limits)
    max_tokens = asked.max_tokens(inputs, len(prompt), limits)
    beam_width = int(scalar(inputs, "beam_width", 1))
    options = {
        "max_new_tokens": max_tokens,
        "stop_token_ids": asked.stop_ids(inputs, limits),
        **({"logprobs": 1} if scalar(inputs, "return_log_probs", False) else {}),
        **_sampling(inputs),
        **_penalties(inputs, max_tokens),
        **_adapter(inputs, limits),
    }
    if found := guide(inputs):
        options |= _guided(found, options, beam_width)
    wanted = asked.sequences(inputs, beam_width, limits)
    if beam_width > 1:
        streaming = bool(scalar(inputs, "streaming", False))
        options.update(_beams(inputs, options, beam_width, wanted, streaming, limits))
    return asked.specification(inputs, limits, prompt, options, beam_width=beam_width, wanted=wanted)


def _sampling(inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    chosen = asked.sampling(inputs)
    if chosen is None:
        return {}
    top_k, top_p, temperature = chosen
    options: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_p": top_p or 1.0}
    return {**options, "top_k": top_k} if top_k else options


def _penalties(inputs: dict[str, np.ndarray], max_tokens: int) -> dict[str, Any]:
    repetition, least = asked.repetition_penalty(inputs), asked.min_tokens(inputs, max_tokens)
    options: dict[str, Any] = {}
    if repetition != 1.0:
        options["repetition_penalty"] = repetition
    if least:
        options["min_new_tokens"] = least
    return options


def _adapter(inputs: dict[str, np.ndarray], limits: Limits) -> dict[str, Any]:
    """``lora_task_id``: 1 for the first adapter of the recipe, and so on; 0 for the model alone."""
    number = int(scalar(inputs, "lora_task_id", 0))
    if number > limits.adapters:
        raise RefusedError(f"lora_task_id: {number}, this engine has the adapters 1 to {limits.adapters}")
    return {"adapter": number} if number else {}


def _guided(found: tuple[str, str], options: dict[str, Any], beam_width: int) -> dict[str, Any]:
    """A grammar ends with an end id; GenAI keeps one state of it, not one a beam, and applies it before ``min_tokens``
    forbids the end id, which may leave no token at all."""
    if beam_width > 1:
        raise RefusedError("guided_decoding_guide_type: not supported together with beam_width")
    if not options["stop_token_ids"]:
        raise RefusedError("end_id: guided decoding needs an end id")
    if "min_new_tokens" in options:
        raise RefusedError("min_tokens: not supported together with guided decoding")
    return {"guide": found}


def _beams(
    inputs: dict[str, np.ndarray],
    options: dict[str, Any],
    beam_width: int,
    sequences: int,
    streaming: bool,
    limits: Limits,
) -> dict[str, Any]:
    """Beam search: GenAI scores raw log probabilities, so nothing that reshapes them can be combined with it."""
    if beam_width > limits.max_beam_width:
        raise RefusedError(f"beam_width: {beam_width}, this server takes at most {limits.max_beam_width}")
    if streaming:
        raise RefusedError("beam_width: beams are only known at the end; send the request without streaming")
    if not 1 <= sequences <= beam_width:
        raise RefusedError(f"num_return_sequences: {sequences}, must be within 1 and beam_width ({beam_width})")
    if not options["stop_token_ids"]:
        raise RefusedError("end_id: beam search needs an end id")
    if float(scalar(inputs, "temperature", 1.0)) != 1.0:
        raise RefusedError("temperature: not supported together with beam_width")
    for name, tensor in (
        ("do_sample", "runtime_top_k, runtime_top_p"),
        ("repetition_penalty", "repetition_penalty"),
        ("min_new_tokens", "min_tokens"),
    ):
        if name in options:
            raise RefusedError(f"{tensor}: not supported together with beam_width")
    return {
        "num_beams": beam_width,
        "num_return_sequences": sequences,
        "length_penalty": float(scalar(inputs, "len_penalty", 0.0)),
        "early": bool(scalar(inputs, "early_stopping", True)),
    }
