"""What a client may ask of TensorRT-LLM's PyTorch runtime, in the words of its ``SamplingParams``. Nothing of Triton.

Names: tensorrt_llm/sampling_params.py @000a01de and later; all of them are in every release from 1.0 to 1.2. Stop words
are matched in the Triton model, which can hold back what may become one: the runtime takes them as text only.
"""

from __future__ import annotations

from typing import Any

import asked
import numpy as np
from asked import Limits, Specification
from tensors import RefusedError, refuse, scalar

UNSUPPORTED = {
    **asked.UNSUPPORTED,
    "len_penalty": "belongs to beam search, which this engine is not set up for (client input length_penalty)",
}


def specify(inputs: dict[str, np.ndarray], limits: Limits) -> Specification:
    """The request's tensors, by name -> what to generate. Raises RefusedError, naming the tensor.

    Options: ``sampling`` is ``SamplingParams``' but for the seed, ``stop_ids`` end the answer and are no part of it,
    ``streaming`` says whether the tokens are needed one by one.
    """
    refuse(inputs, UNSUPPORTED, asked.NEUTRAL)
    beam_width = int(scalar(inputs, "beam_width", 1))
    if beam_width != 1:
        raise RefusedError(f"beam_width: {beam_width}; this engine is not set up for beam search")
    prompt = asked.prompt_ids(inputs, limits)
    max_tokens = asked.max_tokens(inputs, len(prompt), limits)
    stop_ids = asked.stop_ids(inputs, limits)
    wanted = asked.sequences(inputs, beam_width, limits)
    options: dict[str, Any] = {"stop_ids": stop_ids}
    found = asked.specification(inputs, limits, prompt, options, wanted=wanted)
    options["streaming"] = found.streaming or bool(found.stop_words)
    options["sampling"] = {
        "max_tokens": max_tokens,
        "end_id": stop_ids[0] if stop_ids else -1,
        "pad_id": found.pad_id,
        "ignore_eos": not stop_ids,
        "detokenize": False,
        **({"stop_token_ids": stop_ids[1:]} if stop_ids[1:] else {}),
        **({"logprobs": 1} if found.log_probs else {}),
        **_sampling(inputs),
        **_penalties(inputs, max_tokens),
    }
    return found


def _sampling(inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    """Greedy is said as top_k 1: without it, a temperature alone would sample from the whole vocabulary."""
    chosen = asked.sampling(inputs)
    if chosen is None:
        return {"top_k": 1}
    top_k, top_p, temperature = chosen
    return {
        "temperature": temperature,
        **({"top_k": top_k} if top_k else {}),
        **({"top_p": top_p} if top_p else {}),
    }


def _penalties(inputs: dict[str, np.ndarray], max_tokens: int) -> dict[str, Any]:
    repetition, least = asked.repetition_penalty(inputs), asked.min_tokens(inputs, max_tokens)
    options: dict[str, Any] = {}
    if repetition != 1.0:
        options["repetition_penalty"] = repetition
    for name in ("presence_penalty", "frequency_penalty"):
        if value := float(scalar(inputs, name, 0.0)):
            options[name] = value
    if least:
        options["min_tokens"] = least
    return options
