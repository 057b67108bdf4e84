"""One request in flight: tokens come in from the engine, responses go out, exactly one is final.

An answer always ends with a response that has tensors, if only empty ones: Triton 2.51 hands an error in the middle of
a stream to a BLS caller as a response without any, so that this is how ``tensorrt_llm_bls`` knows one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from asked import Specification
from senders import Sender
from stop_words import StopMatcher


@dataclass
class _Row:
    """One returned sequence: what was sent, what waits to be sent."""

    matcher: StopMatcher
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    waiting_log_probs: list[float] = field(default_factory=list)
    """Of ids that the matcher holds back."""
    cumulative: float = 0.0
    sent_tokens: int = 0
    ended: bool = False
    drafts: tuple[int, int] = (0, 0)
    """(accepted, drafted) tokens so far."""


class Generation:
    """The state of one request. ``absorb`` and ``flush`` are called by its lane only; ``is_cancelled`` by anyone."""

    def __init__(
        self,
        sender: Sender,
        specification: Specification,
        *,
        request_id: str,
        cancel_row: Callable[[Generation, int], None],
        on_done: Callable[[Generation], None],
    ) -> None:
        self.specification = specification
        self.request_id = request_id
        self.keys: list[int] = []
        """The engine's keys: one for each independent sequence."""
        self.done = False
        self.abandoned = False
        """Set when someone stopped it: for the statistics."""
        self._sender = sender
        self._lock = threading.Lock()
        self._cancel_row, self._on_done = cancel_row, on_done
        self._first_sent = False
        rows = max(len(specification.seeds), int(specification.options.get("num_return_sequences", 1)))
        self._rows = [_Row(StopMatcher(specification.stop_words)) for _ in range(rows)]
        self._failure: tuple[str, str] | None = None

    def is_cancelled(self) -> bool:
        """Whether the client has gone. A round trip to Triton of 0.1 ms: not for the hot path."""
        with self._lock:
            return not self.done and self._sender.is_cancelled()

    def absorb(self, event: tuple[Any, ...]) -> bool:
        """("tokens", row, ids, log probs or None, finish or None, (accepted, drafted) or empty), ("stopped",) or
        ("failed", text, code).

        True when it should be sent at once: first tokens, the end, an error.
        """
        if event[0] == "failed":
            self._failure = (event[1], event[2])
            return True
        if event[0] == "stopped":
            for row in self._rows:
                row.ended = True
            return True
        _, index, ids, log_probs, finish, drafts = event
        row = self._rows[index]
        if row.ended:
            return False
        row.drafts = drafts or row.drafts
        self._take(row, index, ids, log_probs, finish)
        ended = all(row.ended for row in self._rows)
        return ended or (not self._first_sent and self.specification.streaming and bool(row.ids))

    def flush(self) -> None:
        """Send what there is: pieces when streaming, else everything at the end. Nothing after the final response."""
        if self.done:
            return
        if self._failure is not None:
            with self._lock:
                self.done = True
                self._sender.fail(*self._failure)
            self._on_done(self)
            return
        ended = all(row.ended for row in self._rows)
        if not ended and not self.specification.streaming:
            return
        ready = [index for index, row in enumerate(self._rows) if row.ids or (ended and row.sent_tokens == 0)]
        if self.specification.beam_width > 1:
            self._send(self._response(list(range(len(self._rows))), 0), final=True)
            return
        for position, index in enumerate(ready):
            self._send(self._response([index], index), final=ended and position == len(ready) - 1)
        if ended and not ready:
            self._send(self._response([len(self._rows) - 1], len(self._rows) - 1), final=True)

    def _take(self, row: _Row, index: int, ids: list[int], log_probs: list[float] | None, finish: str | None) -> None:
        row.waiting_log_probs.extend(log_probs or ())
        certain = row.matcher.push(ids)
        if finish is not None and not row.matcher.stopped:
            certain += row.matcher.finish()
        row.ids.extend(certain)
        if log_probs is not None:
            row.log_probs.extend(row.waiting_log_probs[: len(certain)])
            row.waiting_log_probs = row.waiting_log_probs[len(certain) :]
        row.ended = finish is not None or row.matcher.stopped
        if row.matcher.stopped and finish is None:
            self._cancel_row(self, index)

    def _response(self, indices: list[int], sequence_index: int) -> dict[str, np.ndarray]:
        """The waiting tokens of these rows: output_ids int32 [1, rows, longest], padded."""
        spec, rows = self.specification, [self._rows[index] for index in indices]
        prompt = spec.prompt.tolist() if spec.include_prompt else []
        ids = [prompt + row.ids for row in rows]
        width = max(map(len, ids))
        table = np.full((1, len(rows), width), spec.pad_id, dtype=np.int32)
        log_probs = np.zeros((1, len(rows), max(len(row.ids) for row in rows)), dtype=np.float32)
        for place, (row, row_ids) in enumerate(zip(rows, ids, strict=True)):
            table[0, place, : len(row_ids)] = row_ids
            log_probs[0, place, : len(row.log_probs)] = row.log_probs
            row.cumulative += float(np.sum(row.log_probs, dtype=np.float64))
            row.sent_tokens += len(row.ids)
            row.ids, row.log_probs = [], []
        tensors = {
            "output_ids": table,
            "sequence_length": np.array([[len(row_ids) for row_ids in ids]], dtype=np.int32),
            "batch_index": np.zeros((1, 1), dtype=np.int32),
            "sequence_index": np.full((1, 1), sequence_index, dtype=np.int32),
        }
        if spec.log_probs:
            tensors["output_log_probs"] = log_probs
            tensors["cum_log_probs"] = np.array([[row.cumulative for row in rows]], dtype=np.float32)
        if spec.count_input:
            tensors["num_input_tokens"] = np.full((1, 1), len(spec.prompt), dtype=np.int32)
        if spec.count_output:
            tensors["num_output_tokens"] = np.full((1, 1), sum(row.sent_tokens for row in rows), dtype=np.int32)
        return {**tensors, **_drafts(rows)} if spec.count_drafts else tensors

    def _send(self, tensors: dict[str, np.ndarray], *, final: bool) -> None:
        self._first_sent = True
        with self._lock:
            self.done = final
            self._sender.send(tensors, final=final)
        if final:
            self._on_done(self)


def _drafts(rows: list[_Row]) -> dict[str, np.ndarray]:
    """How many tokens were drafted for these rows, and how many of them the answer has."""
    accepted, drafted = (sum(row.drafts[place] for row in rows) for place in (0, 1))
    return {
        "acceptance_rate": np.full((1, 1), accepted / max(1, drafted), dtype=np.float32),
        "total_accepted_draft_tokens": np.full((1, 1), accepted, dtype=np.int32),
        "total_draft_tokens": np.full((1, 1), drafted, dtype=np.int32),
    }
