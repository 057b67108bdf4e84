"""Speculative decoding: a small engine drafts tokens, the engine itself checks them all in one step.

    sequence -> draft: up to N tokens -> engine: those that it would have written too, and one of its own

Each step is a request of its own with the whole sequence, whose keys and values both engines look up in their caches.
The tensors are those of NVIDIA's own ``tensorrt_llm_bls`` (tensorrtllm_backend, v0.12.0 to v0.19.0, read 2026-11):
``draft_input_ids`` and ``request_output_len`` = drafted + 1. It knows nothing of Triton.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from tensors import RefusedError, refuse, says_nothing, scalar
from words import unflatten

Tensors = dict[str, np.ndarray]


class Engine(Protocol):
    """What is needed of the door to an engine; ``doors.Door`` fits."""

    def generate(self, request_id: str, tensors: Tensors, wanted: list[str]) -> Iterator[Tensors]: ...

    def stop(self, request_id: str) -> None: ...


_ONCE = "its meaning would change where an answer is made in several requests"
_ALONE = {
    "beam_width": "beams are not drafted",
    "num_return_sequences": "several sequences are not drafted",
    "return_log_probs": "drafted tokens have no probabilities of their own",
    "return_context_logits": "drafted tokens have no logits of their own",
    "return_generation_logits": "drafted tokens have no logits of their own",
    "repetition_penalty": _ONCE,
    "presence_penalty": _ONCE,
    "frequency_penalty": _ONCE,
    "min_tokens": _ONCE,
    "bad_words_list": _ONCE,
    "embedding_bias": _ONCE,
    "guided_decoding_guide_type": _ONCE,
    "guided_decoding_guide": _ONCE,
    "prompt_embedding_table": _ONCE,
}
"""Inputs of the engine with which it answers without the draft, and why."""
_NEUTRAL = {"beam_width": 1.0, "num_return_sequences": 1.0, "repetition_penalty": 1.0}
_LOGITS = {"use_draft_logits": "drafts are compared by their tokens here, not by logits"}
_SHARED = ("end_id", "pad_id", "stop_words_list")
"""What the draft is told besides the sequence. It writes greedily: that is what the engine will most likely say."""
_SAMPLING = ("runtime_top_k", "runtime_top_p", "temperature")
_OF_FIRST = ("arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns")
"""Outputs that count from the first step; of all others the last one does."""


@dataclass(frozen=True)
class Drafts:
    """The draft engine of this server."""

    door: Engine
    tokens: int
    """Drafted for one step, at most: the engine is built for so many."""
    longest: int
    """Tokens of a sequence that the draft engine can hold."""


def tokens_to_draft(inputs: Tensors, tensors: Tensors, drafts: Drafts | None) -> int:
    """How many tokens a step of this request drafts; 0: the engine answers alone.

    ``inputs`` are the client's, ``tensors`` the engine's. RefusedError for ``use_draft_logits``, for more than the
    engine is built for, and where ``num_draft_tokens`` is asked for and cannot be.
    """
    refuse(inputs, _LOGITS)
    asked = scalar(inputs, "num_draft_tokens", None)
    if drafts is None:
        refuse(inputs, {"num_draft_tokens": "speculative decoding with a draft model is not set up on this server"})
        return 0
    tokens = drafts.tokens if asked is None else int(asked)
    if not 0 <= tokens <= drafts.tokens:
        raise RefusedError(f"num_draft_tokens: {tokens}, and this server's engine is built for 0 to {drafts.tokens}")
    alone = _alone(tensors) if tokens else ""
    if alone and asked is not None:
        raise RefusedError(f"num_draft_tokens: not together with {alone}")
    return 0 if alone else tokens


def _alone(tensors: Tensors) -> str:
    """The first thing in a request that excludes a draft, and why."""
    if len(tensors["input_ids"]) > 1:
        return "a batch: one prompt a request is drafted"
    for name, why in _ALONE.items():
        array = tensors.get(name)
        if array is not None and not _empty(name, array):
            return f"{name}: {why}"
    return ""


def _empty(name: str, array: np.ndarray) -> bool:
    if name == "bad_words_list":
        return not unflatten(array[0])
    return says_nothing(array, _NEUTRAL.get(name, 0.0))


class Speculation:
    """One request. ``generate`` and ``stop`` are those of a door, so that the relay need not know."""

    def __init__(
        self, engine: Engine, drafts: Drafts, tokens: int, names: Callable[[Tensors], Tensors] = lambda tensors: tensors
    ) -> None:
        """``tokens`` to draft in a step, 0 for none; ``names``: newest names of inputs -> those of the engines."""
        self._engine, self._drafts, self._tokens, self._names = engine, drafts, tokens, names
        self._lock = threading.Lock()
        self._busy: Engine | None = None
        self._stopped = False
        self._drafted = self._accepted = 0

    def stop(self, request_id: str) -> None:
        """End early, at any time and from any thread; ``generate`` then ends by itself."""
        with self._lock:
            self._stopped, busy = True, self._busy
        if busy is not None:
            busy.stop(request_id)

    def generate(self, request_id: str, tensors: Tensors, wanted: list[str]) -> Iterator[Tensors]:
        """The engine's inputs by their newest names -> its responses, each with the tokens that are new, and how many
        drafted tokens were accepted so far."""
        if self._tokens == 0:
            yield from self._whole(request_id, tensors, wanted)
            return
        prompt = tensors["input_ids"].reshape(-1)[: scalar(tensors, "input_lengths", None)].tolist()
        ids, left = list(prompt), int(scalar(tensors, "request_output_len", 0))
        stop_words = unflatten(tensors["stop_words_list"][0]) if "stop_words_list" in tensors else []
        first: Tensors = {}
        while self._room(len(ids), left) > 0:
            draft = self._draft(request_id, tensors, ids, self._room(len(ids), left))
            outputs = self._check(request_id, tensors, ids, draft, wanted)
            if outputs is None:
                return
            new, ended = _cut(ids, _tokens(outputs), stop_words)
            self._drafted += len(draft)
            self._accepted += _common(new, draft)
            ids, left = [*ids, *new], left - len(new)
            first = first or {name: outputs[name] for name in _OF_FIRST if name in outputs}
            yield {**outputs, **first, **_row(new), **self._counted(outputs, len(prompt), len(ids) - len(prompt))}
            if ended or new == draft[: len(new)]:  # no token of the engine's own: it has nothing more to say
                return
        done = len(ids) - len(prompt)
        if left > 0:
            asked = {**self._seeded(tensors, len(ids)), **_sequence(ids, left, tensors["streaming"])}
            for outputs in self._whole(request_id, asked, wanted):
                done += len(_tokens(outputs))
                yield {**outputs, **self._counted(outputs, len(prompt), done)}

    def _room(self, length: int, left: int) -> int:
        """Tokens to draft next. The engine adds one to them; a sequence too long for the draft gets none."""
        return min(self._tokens, left - 1, self._drafts.longest - length)

    def _draft(self, request_id: str, tensors: Tensors, ids: list[int], count: int) -> list[int]:
        asked = {name: tensors[name] for name in _SHARED if name in tensors}
        asked |= {"runtime_top_k": _scalar(1), "min_tokens": _scalar(count)}  # not to end: the engine decides that
        responses = self._ask(self._drafts.door, request_id, {**asked, **_sequence(ids, count)}, _IDS)
        return [token for response in responses for token in _tokens(response)][:count]

    def _check(
        self, request_id: str, tensors: Tensors, ids: list[int], draft: list[int], wanted: list[str]
    ) -> Tensors | None:
        """The engine's answer to a draft; None when it was stopped."""
        asked = {**self._seeded(tensors, len(ids)), **_sequence(ids, len(draft) + 1)}
        if draft:
            asked["draft_input_ids"] = np.array([draft], dtype=np.int32)
        responses = self._ask(self._engine, request_id, asked, wanted)
        return responses[-1] if responses else None

    def _whole(self, request_id: str, tensors: Tensors, wanted: list[str]) -> Iterator[Tensors]:
        """What the engine writes without a draft, as it comes."""
        if not self._begin(self._engine):
            return
        try:
            for outputs in self._engine.generate(request_id, self._names(tensors), wanted):
                yield {**outputs, **self._told()}
        finally:
            self._end()

    def _ask(self, door: Engine, request_id: str, tensors: Tensors, wanted: list[str]) -> list[Tensors]:
        """All responses of one engine; none when the request was stopped before or in the middle."""
        if not self._begin(door):
            return []
        try:
            responses = list(door.generate(request_id, self._names(tensors), wanted))
        finally:
            self._end()
        return [] if self._stopped else responses

    def _begin(self, door: Engine) -> bool:
        with self._lock:
            if not self._stopped:
                self._busy = door
            return not self._stopped

    def _end(self) -> None:
        with self._lock:
            self._busy = None

    def _seeded(self, tensors: Tensors, length: int) -> Tensors:
        """Every request begins the engine's random numbers anew, so each step of a sampled answer has its own seed."""
        if all(name not in tensors for name in _SAMPLING):
            return tensors
        seed = (int(scalar(tensors, "seed", 0)) + length) % 2**64
        return {**tensors, "seed": np.array([[seed]], dtype=np.uint64)}

    def _counted(self, outputs: Tensors, prompt: int, done: int) -> Tensors:
        """What the client is told of drafts, and the lengths of the whole answer in place of the step's."""
        lengths = {"num_input_tokens": prompt, "num_output_tokens": done}
        return {**self._told(), **{name: _scalar(number) for name, number in lengths.items() if name in outputs}}

    def _told(self) -> Tensors:
        return {
            "acceptance_rate": np.array([[self._accepted / max(1, self._drafted)]], dtype=np.float32),
            "total_accepted_draft_tokens": _scalar(self._accepted),
            "total_draft_tokens": _scalar(self._drafted),
        }


_IDS = ["output_ids", "sequence_length"]


def _sequence(ids: list[int], count: int, streaming: np.ndarray | None = None) -> Tensors:
    """The sequence so far, and how many tokens are asked for."""
    return {
        "input_ids": np.array([ids], dtype=np.int32),
        "input_lengths": _scalar(len(ids)),
        "request_output_len": _scalar(count),
        "streaming": np.array([[False]]) if streaming is None else streaming,
        "exclude_input_in_output": np.array([[True]]),
    }


def _scalar(number: int) -> np.ndarray:
    return np.array([[number]], dtype=np.int32)


def _row(ids: list[int]) -> Tensors:
    return {"output_ids": np.array([[ids]], dtype=np.int32).reshape(1, 1, -1), "sequence_length": _scalar(len(ids))}


def _tokens(outputs: Tensors) -> list[int]:
    """output_ids [1, 1, n] -> the tokens that count."""
    found: list[int] = outputs["output_ids"].reshape(-1)[: int(outputs["sequence_length"].reshape(-1)[0])].tolist()
    return found


def _common(new: list[int], draft: list[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(new, draft, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(new), len(draft)))


def _cut(ids: list[int], new: list[int], words: list[list[int]]) -> tuple[list[int], bool]:
    """New tokens up to the first stop word, and whether there is one: a step may run past it, a single token cannot."""
    before = ids[-max(map(len, words), default=1) :]
    for count in range(1, len(new) + 1):
        text = [*before, *new[:count]]
        if any(text[-len(word) :] == word for word in words):
            return new[:count], True
    return new, False
