"""Text to token ids and back, in the gateway's process, by the files that ship to Triton.

What ``preprocessing`` and ``tensorrt_llm_bls`` do there: an endpoint over several replicas speaks ids to its workers,
so that an answer can go on elsewhere in the middle of a character. It knows nothing of Dynamo.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toolchain.fleet.wire import Ask, listed
from toolchain.fleet.worker.dialect import SHARED
from toolchain.gateway.failures import refused
from toolchain.gateway.shared import load_together

_MODULES = ("tensors", "tokenizer", "prompts", "wiring", "answers", "detokenizer", "speculation")
_APART = ("input_ids", "input_lengths", "request_output_len", "streaming", "num_return_sequences")
"""Tensors that the worker makes itself, or that are sent as several requests."""
_HERE = "an endpoint over several replicas"
_LOGITS = f"{_HERE} does not pass logits on"
_TABLE = f"{_HERE} does not pass prompt tables on"
_WEIGHTS = f"{_HERE} takes adapters by lora_task_id, not their weights"
NOT_HERE = {
    "beam_width": f"{_HERE} gives no beams",
    "return_context_logits": _LOGITS,
    "return_generation_logits": _LOGITS,
    "prompt_embedding_table": _TABLE,
    "prompt_vocab_size": _TABLE,
    "lora_weights": _WEIGHTS,
    "lora_config": _WEIGHTS,
}
"""Inputs of ``tensorrt_llm_bls`` that one Triton may take, and an endpoint does not -> why."""
_NEUTRAL = {"beam_width": 1.0}
OUTPUTS = frozenset(
    {"text_output", "finish_reason", "num_input_tokens", "num_output_tokens", "output_log_probs", "cum_log_probs"}
)
TRUE = frozenset({"true", "1", "yes"})
Event = dict[str, Any]


@dataclass(frozen=True)
class Parameters:
    """What the models of the repository were configured with, as far as text depends on it."""

    max_input_len: int
    vocab_size: int
    add_special: bool = True
    skip_special: bool = True
    exclude_input: bool = True
    max_answers: int = 64
    """Of one prompt: as many as an engine has places."""
    draft_tokens: int = 0
    """That a draft engine beside the engine writes for one step; 0 without one."""

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Parameters:
        """From the parameters of a ``repository.Repository``."""
        names = ("add_special_tokens", "skip_special_tokens", "exclude_input_in_output")
        special, skip, exclude = (str(found.get(name, "true")).lower() in TRUE for name in names)
        most = int(found.get("triton_max_batch_size", cls.max_answers))
        drafts = int(found.get("num_draft_tokens", 0)) if found.get("tensorrt_llm_draft_model_name") else 0
        limits = int(found["max_input_len"]), int(found["vocab_size"])
        return cls(*limits, special, skip, exclude, most, drafts)


class Texts:
    """One model's tokenizer and what it takes to use it for requests. Safe in any thread."""

    def __init__(self, tokenizer: Path, parameters: Parameters) -> None:
        """Raises FileNotFoundError when the folder holds no tokenizer."""
        self._shared = load_together(SHARED, _MODULES)
        self._tokenizer = self._shared["tokenizer"].Tokenizer(tokenizer)
        self._anchor = self._shared["detokenizer"].Anchor(self._tokenizer)
        self._parameters = parameters
        self._prompts = self._shared["prompts"].Prompts(
            self._tokenizer,
            max_input_len=parameters.max_input_len,
            special=parameters.add_special,
            vocab_size=parameters.vocab_size,
        )

    def asks(self, inputs: Mapping[str, Any]) -> list[Ask]:
        """The inputs of ``tensorrt_llm_bls`` as JSON -> one Ask for each answer that is wanted; sampled ones differ by
        their seeds, as the engines themselves do it. Raises ApiError for what is refused.
        """
        arrays = {name: _array(value) for name, value in inputs.items()}
        try:
            (tensors, drafts), count = self._tensors(arrays), self._count(inputs)
        except self._shared["tensors"].RefusedError as error:
            raise refused(str(error)) from None
        ids = tuple(int(one) for one in tensors["input_ids"].reshape(-1))
        plain = {name: _plain(array) for name, array in tensors.items() if name not in _APART}
        seed = int(_one(inputs, "seed", 0))
        seeds = [{"seed": [seed + index]} if "seed" in plain else {} for index in range(count)]
        tokens = int(_one(inputs, "max_tokens", 0))
        return [Ask(ids, tokens, {**plain, **one}, len(ids), drafts) for one in seeds]

    def _tensors(self, arrays: dict[str, np.ndarray[Any, Any]]) -> tuple[dict[str, np.ndarray[Any, Any]], int]:
        """The inputs of ``tensorrt_llm``, and how many tokens a step may draft. Raises RefusedError."""
        wiring, tensors = self._shared["wiring"], self._shared["tensors"]
        tensors.refuse(arrays, NOT_HERE, _NEUTRAL)
        if (prompts := arrays["text_input"].size) != 1:
            raise tensors.RefusedError(f"text_input: a batch of {prompts} prompts; send one request for each prompt")
        prepared = self._prompts.prepare(wiring.to_preprocessing(arrays))
        found: dict[str, np.ndarray[Any, Any]] = wiring.to_engine(arrays, prepared, streaming=True)
        speculation, most = self._shared["speculation"], self._parameters.draft_tokens
        drafts = speculation.Drafts(None, most, 0) if most else None
        return found, speculation.tokens_to_draft(arrays, found, drafts)

    def _count(self, inputs: Mapping[str, Any]) -> int:
        """How many answers are wanted. Raises RefusedError."""
        count, most = int(_one(inputs, "num_return_sequences", 0)) or 1, self._parameters.max_answers
        if not 1 <= count <= most:
            text = f"num_return_sequences: {count}, this engine takes 1 to {most}"
            raise self._shared["tensors"].RefusedError(text)
        return count

    def answer(self, ask: Ask, index: int, inputs: Mapping[str, Any]) -> TextAnswer:
        """What becomes of the ids of an Ask, which is the ``index``-th of ``asks(inputs)``."""
        stops = [str(one) for one in listed(inputs.get("stop_words")) if one]
        make, skip = self._shared["answers"].Answer, self._parameters.skip_special
        streaming = bool(_one(inputs, "stream", False))
        told = bool(_one(inputs, "exclude_input_in_output", self._parameters.exclude_input))
        before = "" if told or streaming else self._tokenizer.decode(list(ask.ids))
        made = functools.partial(make, self._tokenizer, self._anchor, stops, skip)
        return TextAnswer(made, ask, index, streaming=streaming, before=before)


class TextAnswer:
    """One answer while it grows: ids in, events of ``tensorrt_llm_bls`` out."""

    def __init__(
        self, make: Callable[[], Any], ask: Ask, index: int, *, streaming: bool = True, before: str = ""
    ) -> None:
        """``make``: an empty ``answers.Answer``; ``before``: the text in front of an answer given as a whole."""
        self._make, self._ask, self.index = make, ask, index
        self._streaming, self._before = streaming, before
        self.metrics: Event = {}
        """What its engine last said of drafts, cache and times."""
        self.ids: list[int] = []
        """So far."""
        self.begin()

    def begin(self) -> None:
        """Empty, also where it was begun before."""
        self._growing = self._make()
        self._logs_sum = 0.0
        self.metrics.clear()
        self.ids.clear()

    @property
    def told(self) -> bool:
        """Whether its client may have seen a part of it."""
        return self._streaming and bool(self.ids)

    @property
    def stopped(self) -> bool:
        """Whether a stop word has come: what follows is not part of the answer."""
        return bool(self._growing.stopped)

    def push(self, ids: Sequence[int], logs: Sequence[float] | None) -> Event:
        """The event that these ids make; empty where the answer is wanted as a whole."""
        self.ids.extend(ids)
        self._push(ids, logs)
        return self._event({"num_output_tokens": len(self.ids)}) if self._streaming else {}

    def finish(self) -> Event:
        """The last event: what was held back, or everything, and how it ended."""
        self._growing.finish()
        reason = self._growing.finish_reason(self._ask.max_tokens, self._ask.end_id)
        return self._event({"finish_reason": reason, "num_output_tokens": self._growing.tokens})

    def _push(self, ids: Sequence[int], logs: Sequence[float] | None) -> None:
        tensors: dict[str, np.ndarray[Any, Any]] = {}
        if logs is not None:
            tensors["output_ids"] = np.array(ids, dtype=np.int32)
            tensors["output_log_probs"] = np.array(logs, dtype=np.float32)
            self._logs_sum += float(np.sum(tensors["output_log_probs"], dtype=np.float64))
            tensors["cum_log_probs"] = np.array([self._logs_sum], dtype=np.float32)
        self._growing.push(ids, tensors)

    def _event(self, more: Event) -> Event:
        text, tensors = self._growing.take()
        return {
            "text_output": self._before + text,
            "batch_index": 0,
            "sequence_index": self.index,
            "num_input_tokens": len(self._ask.ids),
            **{name: array.tolist() for name, array in tensors.items()},
            **self.metrics,
            **more,
        }


def _one(inputs: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """The single value of an input."""
    found = listed(inputs.get(name))
    return found[0] if found else otherwise


def _array(value: Any) -> np.ndarray[Any, Any]:
    """As Triton hands over what came as JSON: [1, n], texts as bytes."""
    values = value if isinstance(value, list) else [value]
    if any(isinstance(one, str) for one in values):
        return np.array([[one.encode() for one in values]], dtype=object)
    return np.array([values])


def _plain(array: np.ndarray[Any, Any]) -> list[Any]:
    """A flat list: Triton takes the shape from the model's configuration."""
    return [one.decode() if isinstance(one, bytes) else one for one in array.reshape(-1).tolist()]
