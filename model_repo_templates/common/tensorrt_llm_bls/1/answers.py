"""One request's answer while it grows: ids in, text out, for each returned sequence. It knows nothing of Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from detokenizer import Anchor, Decoder, Stream
from stop_text import StopText

_GROWING = ("output_log_probs", "output_ids")
"""Tensors that come in pieces, along the last axis; of all others the last one counts."""


class Answer:
    """One sequence (or one beam): its text so far, and what the engine said besides."""

    def __init__(self, tokenizer: Decoder, anchor: Anchor, stop_words: Sequence[str], skip_special: bool) -> None:
        self._stream = Stream(tokenizer, anchor, skip_special=skip_special)
        self._stop = StopText(stop_words)
        self._text: list[str] = []
        self._extra: dict[str, Any] = {}
        self._last_id: int | None = None
        self.tokens = 0
        """How many the engine gave, without those after a stop word."""

    @property
    def stopped(self) -> bool:
        """Whether a stop word has come: what follows is not part of the answer."""
        return self._stop.stopped

    def push(self, ids: Sequence[int], extra: dict[str, np.ndarray]) -> None:
        """New ids and the tensors that came with them."""
        if self.stopped:
            return
        self._text.append(self._stop.push(self._stream.push(ids)))
        self.tokens += len(ids)
        self._last_id = ids[-1] if len(ids) else self._last_id
        for name, array in extra.items():
            if name in _GROWING:
                self._extra.setdefault(name, []).append(array)
            else:
                self._extra[name] = array

    def finish_reason(self, max_tokens: int, end_id: int) -> str:
        """``"length"`` where the engine gave all the tokens that were asked for, else ``"stop"``."""
        ended = self.stopped or self._last_id == end_id
        return "length" if self.tokens >= max_tokens and not ended else "stop"

    def finish(self) -> None:
        """The engine is done: what was held back is part of the text after all."""
        if not self.stopped:
            self._text.append(self._stop.push(self._stream.finish()))
        if not self.stopped:
            self._text.append(self._stop.finish())

    def take(self) -> tuple[str, dict[str, np.ndarray]]:
        """The text and tensors since the last ``take``."""
        text, self._text = "".join(self._text), []
        extra = {name: self._extra.pop(name) for name in _GROWING if name in self._extra}
        return text, {**self._extra, **{name: np.concatenate(arrays, axis=-1) for name, arrays in extra.items()}}


class Answers:
    """All sequences of one request, by (sequence index, beam)."""

    def __init__(self, tokenizer: Decoder, anchor: Anchor, stop_words: Sequence[str], skip_special: bool) -> None:
        self._make = lambda: Answer(tokenizer, anchor, stop_words, skip_special)
        self._answers: dict[int, list[Answer]] = {}

    def push(self, tensors: dict[str, np.ndarray]) -> int:
        """One response of ``tensorrt_llm``: output_ids [1, beams, n], sequence_length [1, beams] and more. Returns the
        sequence index. With log probabilities come the ids that they are of."""
        lengths = tensors["sequence_length"].reshape(-1).tolist()
        rows = tensors["output_ids"].reshape(len(lengths), -1)
        index = int(tensors["sequence_index"].reshape(-1)[0]) if "sequence_index" in tensors else 0
        beams = self._answers.setdefault(index, [self._make() for _ in lengths])
        extra = {name: array for name, array in tensors.items() if name not in ("output_ids", "sequence_length")}
        for beam, row, length in zip(beams, rows, lengths, strict=True):
            ids = {"output_ids": row[:length].reshape(1, 1, -1)} if "output_log_probs" in extra else {}
            beam.push(row[:length].tolist(), {**extra, **ids})
        return index

    def finish(self) -> None:
        for beam in self._beams():
            beam.finish()

    @property
    def all_stopped(self) -> bool:
        """Whether every sequence has met a stop word, so that the engine may stop."""
        return bool(self._answers) and all(beam.stopped for beam in self._beams())

    @property
    def indices(self) -> list[int]:
        return sorted(self._answers)

    def take(self, index: int) -> tuple[list[str], dict[str, np.ndarray]]:
        """One text a beam, and the tensors, since the last ``take`` of this sequence."""
        taken = [beam.take() for beam in self._answers[index]]
        extra = {name: array for _text, tensors in taken for name, array in tensors.items()}
        return [text for text, _tensors in taken], extra

    def summary(self, index: int, max_tokens: int, end_id: int) -> dict[str, np.ndarray]:
        """How a sequence ended: finish_reason [beams], and num_output_tokens [1, 1] over its beams."""
        beams = self._answers[index]
        reasons = [beam.finish_reason(max_tokens, end_id).encode() for beam in beams]
        return {
            "finish_reason": np.array(reasons, dtype=object),
            "num_output_tokens": np.array([[sum(beam.tokens for beam in beams)]], dtype=np.int32),
        }

    def _beams(self) -> list[Any]:
        return [beam for beams in self._answers.values() for beam in beams]
