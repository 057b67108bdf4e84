"""Text to token ids and back, in the gateway's process, by the files that ship to Triton.

What ``preprocessing`` and ``tensorrt_llm_bls`` do there: an endpoint over several replicas speaks ids to its workers,
so that an answer can go on elsewhere in the middle of a character. It knows nothing of Dynamo.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toolchain.fleet.wire import Ask
from toolchain.gateway.failures import ApiError, invalid, of_triton
from toolchain.gateway.shared import load_together

_FOLDERS = ("common/shared", "common/tensorrt_llm_bls/1")
_MODULES = ("tensors", "tokenizer", "prompts", "wiring", "answers", "detokenizer")
_APART = ("input_ids", "input_lengths", "request_output_len", "streaming", "num_return_sequences")
"""Tensors that the worker makes itself, or that are sent as several requests."""
OUTPUTS = frozenset({"text_output", "finish_reason", "num_input_tokens", "num_output_tokens", "output_log_probs"})
TRUE = frozenset({"true", "1", "yes"})


@dataclass(frozen=True)
class Parameters:
    """What the models of the repository were configured with, as far as text depends on it."""

    max_input_len: int
    vocab_size: int
    add_special: bool = True
    skip_special: bool = True

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Parameters:
        """From the parameters of a ``repository.Repository``."""
        flags = (str(found.get(name, "true")).lower() in TRUE for name in ("add_special_tokens", "skip_special_tokens"))
        return cls(int(found["max_input_len"]), int(found["vocab_size"]), *flags)


class Texts:
    """One model's tokenizer and what it takes to use it for requests. Safe in any thread."""

    def __init__(self, tokenizer: Path, parameters: Parameters) -> None:
        """Raises FileNotFoundError when the folder holds no tokenizer."""
        self._shared = load_together(_FOLDERS, _MODULES)
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
        wiring = self._shared["wiring"]
        arrays = {name: _array(value) for name, value in inputs.items()}
        try:
            prepared = self._prompts.prepare(wiring.to_preprocessing(arrays))
            tensors = wiring.to_engine(arrays, prepared, streaming=True)
        except self._shared["tensors"].RefusedError as error:
            raise _refused(str(error)) from None
        ids = tuple(int(one) for one in tensors["input_ids"].reshape(-1))
        plain = {name: _plain(array) for name, array in tensors.items() if name not in _APART}
        seed, count = int(inputs.get("seed", 0)), int(inputs.get("num_return_sequences", 1))
        seeds = [{"seed": [seed + index]} if "seed" in plain else {} for index in range(count)]
        return [Ask(ids, int(inputs["max_tokens"]), {**plain, **one}, len(ids)) for one in seeds]

    def answer(self, ask: Ask, index: int) -> TextAnswer:
        """What becomes of the ids of an Ask."""
        answers = self._shared["answers"].Answers(self._tokenizer, self._anchor, (), self._parameters.skip_special)
        return TextAnswer(answers, ask, index)


class TextAnswer:
    """One answer while it grows: ids in, events of ``tensorrt_llm_bls`` out."""

    def __init__(self, answers: Any, ask: Ask, index: int) -> None:
        self._answers, self._ask, self._index = answers, ask, index
        self.ids: list[int] = []
        """So far."""

    def push(self, ids: Sequence[int], logs: Sequence[float] | None) -> dict[str, Any]:
        """The event that these ids make."""
        self.ids.extend(ids)
        self._push(ids, logs)
        return self._event({"num_output_tokens": len(self.ids)})

    def finish(self) -> dict[str, Any]:
        """The last event: what was held back, and how it ended."""
        if not self.ids:
            self._push((), None)
        self._answers.finish()
        told = self._answers.summary(0, self._ask.max_tokens, self._ask.end_id)
        return self._event(
            {
                "finish_reason": told["finish_reason"][0].decode(),
                "num_output_tokens": int(told["num_output_tokens"].reshape(-1)[0]),
            }
        )

    def _push(self, ids: Sequence[int], logs: Sequence[float] | None) -> None:
        tensors: dict[str, np.ndarray[Any, Any]] = {
            "output_ids": np.array([[list(ids)]], dtype=np.int32).reshape(1, 1, -1),
            "sequence_length": np.array([[len(ids)]], dtype=np.int32),
        }
        if logs is not None:
            tensors["output_log_probs"] = np.array(logs, dtype=np.float32).reshape(1, 1, -1)
        self._answers.push(tensors)

    def _event(self, more: Mapping[str, Any]) -> dict[str, Any]:
        texts, tensors = self._answers.take(0)
        return {
            "text_output": texts[0],
            "sequence_index": self._index,
            "num_input_tokens": len(self._ask.ids),
            **{name: array.reshape(-1).tolist() for name, array in tensors.items()},
            **more,
        }


def _array(value: Any) -> np.ndarray[Any, Any]:
    """As Triton hands over what came as JSON: [1, n], texts as bytes."""
    values = value if isinstance(value, list) else [value]
    if any(isinstance(one, str) for one in values):
        return np.array([[one.encode() for one in values]], dtype=object)
    return np.array([values])


def _plain(array: np.ndarray[Any, Any]) -> list[Any]:
    """A flat list: Triton takes the shape from the model's configuration."""
    return [one.decode() if isinstance(one, bytes) else one for one in array.reshape(-1).tolist()]


def _refused(message: str) -> ApiError:
    """As if Triton had said it."""
    found = of_triton(400, message)
    return found if isinstance(found, ApiError) else invalid(message)
