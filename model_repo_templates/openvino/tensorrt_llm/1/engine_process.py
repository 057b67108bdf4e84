"""The engine's own process: OpenVINO GenAI continuous batching, one loop, one pipe.

    python engine_process.py SOCKET_FD ENGINE_FOLDER SERVICES

It lives apart from Triton's Python process because ``ContinuousBatchingPipeline.step`` keeps Python's interpreter lock
for a whole step (openvino.genai 2026.4, src/python/py_continuous_batching_pipeline.cpp), and because an engine that
dies must not take the answers of the waiting clients with it. Between two steps the loop takes new requests and
cancels; after each step it sends one message with all new tokens. Nothing is logged for a token. It knows
nothing of Triton or text.

Messages in:  ("add", key, ids as bytes of int64, options)   ("cancel", key)   ("stop",)
Messages out: ("ready", details)   ("step", [(key, row, ids, log probs or None, finish or None, detail)], status)
              ``finish``: "stop" (end id), "length", "error" (``detail`` says what). ``row`` counts the beams. Otherwise
              ``detail`` is empty, or with speculative decoding (accepted, drafted) tokens of the request so far.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections import deque
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from drafting import Count, Drafting
from grammar import grammar
from pipeline import open_pipeline
from reading import Reading

_PR_SET_PDEATHSIG = 1
"""linux/prctl.h: the signal that this process gets when its parent dies."""
_RUNNING, _FINISHED, _IGNORED = (
    genai.GenerationStatus.RUNNING,
    genai.GenerationStatus.FINISHED,
    genai.GenerationStatus.IGNORED,
)


class Engine:
    """The requests in flight and the pipeline that steps them."""

    def __init__(self, folder: Path, passport: dict[str, Any]) -> None:
        runtime = passport["runtime"]
        scheduler = genai.SchedulerConfig()
        for name, value in {"max_num_seqs": passport["limits"]["max_batch_size"], **runtime["scheduler"]}.items():
            if not hasattr(scheduler, name):
                raise ValueError(f"engine.json: runtime.scheduler.{name} is unknown to this OpenVINO GenAI")
            setattr(scheduler, name, value)
        self._pipeline = open_pipeline(folder, passport, scheduler)
        self._drafting = Drafting.of(runtime)
        self._counts: dict[int, Count] = {}
        self._steps = self._drafted = self._accepted = 0
        self._leaving = 0
        """Blocks of cancelled requests, which are free after the next step."""
        self._max_sequences, self._max_blocks = scheduler.max_num_seqs, scheduler.num_kv_blocks
        self._eos_ids = list(passport["eos_token_ids"])
        self._vocab_size = int(passport.get("vocab_size", 0))
        self._waiting: deque[tuple[int, bytes, dict[str, Any]]] = deque()
        self._running: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._sequences = 0
        self._reading = Reading(reused=scheduler.enable_prefix_caching)
        self._unwanted: set[int] = set()
        """Cancelled while their prompts are read."""

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    def status(self) -> dict[str, Any]:
        """Requests that run and wait, how full the KV cache is (percent of its blocks; 0 blocks are unknown), steps so
        far, and what was drafted."""
        if not self._pipeline.has_non_finished_requests():
            self._pipeline.step()  # an empty one: it counts the blocks again, now without those of the last request
        usage = float(self._pipeline.get_metrics().cache_usage)
        kv = {"kv_usage_percent": round(usage, 2), "kv_blocks": self._max_blocks}
        drafts = {"drafted": self._drafted, "accepted": self._accepted} if self._drafting else {}
        return {"running": len(self._running), "waiting": len(self._waiting), **kv, "steps": self._steps, **drafts}

    def add(self, key: int, ids: bytes, options: dict[str, Any]) -> None:
        self._waiting.append((key, ids, options))

    def cancel(self, key: int) -> None:
        """Forget a request. Its blocks are freed in the step after its prompt has been read; no event follows."""
        if key in self._reading:
            self._unwanted.add(key)
            return
        entry = self._running.pop(key, None)
        count = self._counts.pop(key, None)
        self._leaving += count.blocks if count else 0
        if entry is not None:
            entry[0].cancel()
            self._sequences -= _width(entry[1])
        else:
            self._waiting = deque(item for item in self._waiting if item[0] != key)

    def step(self) -> list[tuple[Any, ...]]:
        """Start what fits, run one step, and return the events."""
        events = self._start_waiting()
        if self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            self._steps += 1
        self._leaving = 0
        for key in list(self._running):
            events.extend(self._events_of(key))
        return events

    def drain_cancelled(self) -> None:
        """One step for handles that were cancelled while nothing else runs, so that their KV blocks are freed."""
        while not self._running and self._pipeline.has_non_finished_requests():
            self._pipeline.step()

    def _start_waiting(self) -> list[tuple[Any, ...]]:
        events: list[tuple[Any, ...]] = []
        while self._waiting and self._has_room(*self._waiting[0]) and self._reading.may_begin(self._waiting[0][1]):
            key, ids, options = self._waiting.popleft()
            try:
                prompt = ov.Tensor(np.frombuffer(ids, dtype=np.int64).reshape(1, -1) + self._shift(options))
                handle = self._pipeline.add_request(key, prompt, self._configured(options))
            except Exception as error:
                events.append((key, 0, [], None, "error", str(error)))
                continue
            self._running[key] = (handle, options)
            self._reading.begin(key, ids)
            if self._drafting:
                self._counts[key] = Count(self._drafting, len(ids) // 8, options["max_new_tokens"])
            self._sequences += _width(options)
        return events

    def _has_room(self, _key: int, ids: bytes, options: dict[str, Any]) -> bool:
        """Whether a request can start now. With drafts only where the cache has room for all that it may become: a full
        cache makes GenAI take sequences back, and 2026.4.1 cannot do that to one with prompt lookup."""
        if self._sequences + _width(options) > self._max_sequences:
            return False
        if self._drafting is None or (not self._counts and not self._leaving):
            return True
        needed = Count(self._drafting, len(ids) // 8, options["max_new_tokens"]).blocks
        return needed + self._leaving + sum(count.blocks for count in self._counts.values()) <= self._max_blocks

    def _configured(self, options: dict[str, Any]) -> genai.GenerationConfig:
        """Options named as GenAI's own attributes. ``stop_token_ids`` empty: never end before ``max_new_tokens``."""
        config = genai.GenerationConfig()
        for name, value in options.items():
            if name not in ("early", "stop_token_ids", "guide", "adapter"):
                setattr(config, name, value)
        for name, value in (self._drafting.told(options) if self._drafting else {}).items():
            setattr(config, name, value)
        if "guide" in options:
            config.structured_output_config = grammar(*options["guide"])
        stops = options["stop_token_ids"]
        config.ignore_eos = not stops
        # add_request would add the model's own end ids to a config that has no eos_token_id, and refuses the -1 that
        # stands for none; with ignore_eos it does not matter which id it is.
        ends = [self._shift(options) + end for end in stops or self._eos_ids or [0]]
        config.eos_token_id = ends[0]
        config.stop_token_ids = set(ends)
        config.stop_criteria = genai.StopCriteria.EARLY if options.get("early") else genai.StopCriteria.HEURISTIC
        return config

    def _shift(self, options: dict[str, Any]) -> int:
        """What an adapter's ids are larger by: the graph reads from them whose tokens they are."""
        return int(options.get("adapter", 0)) * self._vocab_size

    def _events_of(self, key: int) -> list[tuple[Any, ...]]:
        handle, options = self._running[key]
        shift = self._shift(options)
        status = handle.get_status()
        rows: dict[int, tuple[list[int], list[float], Any]] = {}
        while handle.can_read():
            outputs = handle.read().items()
            ranked = sorted(outputs, key=lambda item: -item[1].score) if options.get("num_beams", 1) > 1 else outputs
            for row, (_, output) in enumerate(ranked):
                ids, probabilities, _reason = rows.setdefault(row, ([], [], None))
                ids.extend(token - shift for token in output.generated_ids)
                probabilities.extend(output.generated_log_probs)
                rows[row] = (ids, probabilities, output.finish_reason)
        if rows or status != _RUNNING:
            self._reading.over(key)
        if key in self._unwanted and key not in self._reading:
            self._unwanted.discard(key)
            self.cancel(key)
            return []
        told = self._count(key, sum(len(ids) for ids, _logs, _reason in rows.values()))
        if status == _RUNNING:
            return [(key, row, *_tokens(ids, logs, options), None, told) for row, (ids, logs, _) in rows.items() if ids]
        del self._running[key]
        self._counts.pop(key, None)
        self._sequences -= _width(options)
        if status != _FINISHED:
            return [(key, 0, [], None, "error", "the KV cache is too small for this request")]
        wanted = options.get("num_return_sequences", 1)
        rows = rows or {0: ([], [], genai.GenerationFinishReason.STOP)}
        return [(key, row, *_finished(ids, logs, reason, options), told) for row, (ids, logs, reason) in rows.items()][
            :wanted
        ]

    def _count(self, key: int, tokens: int) -> Any:
        """Tokens of one step of a request -> (accepted, drafted) so far; empty without speculative decoding."""
        count = self._counts.get(key)
        if count is None:
            return ""
        drafted, accepted = count.drafted, count.accepted
        count.step(tokens)
        self._drafted += count.drafted - drafted
        self._accepted += count.accepted - accepted
        return count.accepted, count.drafted


def _width(options: dict[str, Any]) -> int:
    return int(options.get("num_beams", 1))


def _tokens(ids: list[int], log_probs: list[float], options: dict[str, Any]) -> tuple[list[int], list[float] | None]:
    return ids, (log_probs if options.get("logprobs") else None)


def _finished(ids: list[int], log_probs: list[float], reason: Any, options: dict[str, Any]) -> tuple[Any, ...]:
    """The last event of a row. The end id is not part of the answer, as with TensorRT-LLM."""
    stopped = reason == genai.GenerationFinishReason.STOP
    if ids and ids[-1] in options["stop_token_ids"]:
        ids, log_probs, stopped = ids[:-1], log_probs[:-1], True
    return *_tokens(ids, log_probs, options), "stop" if stopped else "length"


def share_cores(properties: dict[str, Any], services: int, cores: int) -> None:
    """Of several services each takes its part of the machine's cores, unless its recipe says how many. Not pinned: each
    process would pin its threads to the same first cores.
    """
    if services > 1:
        properties.setdefault("INFERENCE_NUM_THREADS", max(1, cores // services))
        properties.setdefault("ENABLE_CPU_PINNING", False)


def warm_up(engine: Engine, vocab_size: int, max_tokens: int) -> None:
    """Generate a little, alone and in a batch, so that the first user does not wait for kernels being compiled."""
    count = max(1, min(4, max_tokens // 2))
    prompt = (np.arange(max(1, min(24, max_tokens - count)), dtype=np.int64) % vocab_size).tobytes()
    options = {"max_new_tokens": count, "stop_token_ids": []}
    for keys in ([1], [2, 3]):
        for key in keys:
            engine.add(key, prompt, options)
        while engine.busy:
            for event in engine.step():
                if event[4] == "error":
                    raise RuntimeError(event[5])


def serve(connection: Connection, engine: Engine) -> None:
    """The loop. Returns on ("stop",) or when the other side is gone; an exception of the pipeline ends the process."""
    while True:
        while not engine.busy or connection.poll():
            message = connection.recv()
            if message[0] == "stop":
                return
            if message[0] == "add":
                engine.add(*message[1:])
            else:
                engine.cancel(message[1])
            if not engine.busy:
                engine.drain_cancelled()
                connection.send(("step", [], engine.status()))
        events = engine.step()
        if events or not engine.busy:
            connection.send(("step", events, engine.status()))


def main(argv: list[str]) -> None:
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
    for ignored in (signal.SIGINT, signal.SIGTERM):  # The stub says when: running answers are finished first.
        signal.signal(ignored, signal.SIG_IGN)
    connection = Connection(int(argv[1]))
    folder = Path(argv[2])
    passport = json.loads((folder / "engine.json").read_text(encoding="utf-8"))
    share_cores(passport["runtime"].setdefault("properties", {}), int(argv[3]), len(os.sched_getaffinity(0)))
    engine = Engine(folder, passport)
    warm_up(engine, passport["vocab_size"], passport["limits"]["max_seq_len"])
    connection.send(("ready", {"pid": os.getpid()}))
    try:
        serve(connection, engine)
    except (EOFError, ConnectionError):
        return


if __name__ == "__main__":
    main(sys.argv)
