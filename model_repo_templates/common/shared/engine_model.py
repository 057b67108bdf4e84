"""Triton model ``tensorrt_llm`` of our own: the tensors of TensorRT-LLM 1.x, and behind them whatever engine there is.

``execute`` only reads, checks and admits; it returns before anything is generated. The engine runs beside it, in a
process or a thread of its own; sender lanes give its tokens to the clients (``lanes.py``), and one thread looks every
0.2 s whose client has gone. When the engine dies, every waiting request gets an error, and every new one at once. It
does not know which engine it is: each backend's ``model.py`` says how one starts and what a request may ask of it.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import channel
import numpy as np
from asked import Limits, Specification
from generation import Generation
from lanes import Lane
from senders import Line, LineSender, Sender, TritonSender
from tensors import RefusedError, read, scalar

_LANES = 4
"""More lanes do not send faster: they share Python's lock."""
_POLL_S = 0.2
_FAILURES = {"error": "INTERNAL", "refused": "INVALID_ARG"}
_STATUS_FILE = "SCALELLM_STATUS_FILE"
"""Where the status is written when the configuration names no file: the environment variable of whoever serves."""

OnEvents = Callable[[list[tuple[Any, ...]], dict[str, Any]], None]
"""Takes the events of one step and the engine's status. An event is (key, row, ids, log probs or None, finish or None,
detail); ``finish`` is "stop" (an end id, which is not among the ids), "length", "error", or "refused" where it is the
request's own fault (``detail`` says what). Otherwise ``detail`` is empty, or (accepted, drafted) tokens so far."""


class RunningEngine(Protocol):
    """An engine that was started. ``dead`` is None, or in words why it is no more."""

    dead: str | None

    @property
    def pid(self) -> int: ...

    def send(self, *message: Any) -> None:
        """("add", key, ids as bytes of int64, options) or ("cancel", key); never waits."""

    def close(self) -> None:
        """Make it leave."""


class EngineModel:
    """The one instance of the model."""

    def start_engine(
        self, folder: Path, parameters: dict[str, str], on_events: OnEvents, on_death: Callable[[str], None]
    ) -> RunningEngine:
        """Start the engine in ``folder``; returns when it can generate. Raises what Triton shall print."""
        raise NotImplementedError

    def specify(self, inputs: dict[str, np.ndarray], limits: Limits) -> Specification:
        """The request's tensors, by name -> what to generate. Raises RefusedError, naming the tensor."""
        raise NotImplementedError

    def initialize(self, args: dict[str, str]) -> None:
        """Returns after the engine has generated its first tokens, so that the first user waits for no compilation."""
        parameters = {
            key: value["string_value"] for key, value in json.loads(args["model_config"])["parameters"].items()
        }
        folder = Path(args["model_repository"]) / args["model_version"] / parameters["gpt_model_path"]
        self._limits = _limits(json.loads((folder / "engine.json").read_text(encoding="utf-8")), parameters)
        self._max_active = self._limits.max_sequences + int(parameters["max_queue_size"])
        status_file = parameters["status_file"] or os.environ.get(_STATUS_FILE, "")
        self._status_file = Path(status_file) if status_file else None
        self._status: dict[str, Any] = {}
        self._counts = {"finished": 0, "cancelled": 0}
        self._active: dict[int, tuple[Generation, int]] = {}
        """By the engine's key: the request, and which of its sequences."""
        self._keys = itertools.count(1000)
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._lanes = [Lane(index) for index in range(_LANES)]
        for lane in self._lanes:
            lane.start()
        self._engine = self.start_engine(folder, parameters, self._deliver, self._fail_all)
        self._housekeeper = threading.Thread(target=self._keep_house, name="housekeeping", daemon=True)
        self._housekeeper.start()
        self._listener = channel.listen(channel.name_of(args["model_name"]))
        threading.Thread(target=self._answer_calls, name="listener", daemon=True).start()

    def execute(self, requests: list[Any]) -> None:
        """Admit or refuse each request; the answers follow later."""
        for request in requests:
            sender = TritonSender(request)
            inputs = read(request)
            if not scalar(inputs, "stop", False):
                self._take(request.request_id(), inputs, sender)
            elif self._engine.dead is not None:
                sender.fail(self._engine.dead, "INTERNAL")
            else:
                self._stop(request.request_id())
                sender.end()

    def finalize(self) -> None:
        """Called by Triton after all responses are final."""
        self._closing.set()
        self._listener.close()
        self._housekeeper.join()
        self._engine.close()
        for lane in self._lanes:
            lane.close()
            lane.join()

    def _take(self, request_id: str, inputs: dict[str, np.ndarray], sender: Sender) -> None:
        try:
            self._admit(request_id, inputs, sender)
        except RefusedError as refused:
            sender.fail(str(refused), "INVALID_ARG")
        except _UnavailableError as unavailable:
            sender.fail(str(unavailable), unavailable.code)

    def _answer_calls(self) -> None:
        """The private line of ``tensorrt_llm_bls``: one connection for each of its instances."""
        while True:
            try:
                connection = channel.accept(self._listener)
            except OSError:
                return
            if connection is not None:
                threading.Thread(target=self._attend, args=(Line(connection),), name="line", daemon=True).start()

    def _attend(self, line: Line) -> None:
        """Messages in: ("ask", id, tensors), ("stop", id)."""
        try:
            while True:
                message = line.connection.recv()
                if message[0] == "ask":
                    self._take(message[1], message[2], LineSender(line, message[1]))
                else:
                    self._stop(message[1])
        except (EOFError, OSError):
            line.closed = True

    def _admit(self, request_id: str, inputs: dict[str, np.ndarray], sender: Sender) -> None:
        specification = self.specify(inputs, self._limits)
        generation = Generation(
            sender,
            specification,
            request_id=request_id,
            cancel_row=self._cancel_row,
            on_done=self._forget,
        )
        with self._lock:
            if self._engine.dead is not None:
                raise _UnavailableError(self._engine.dead, "INTERNAL")
            if len(self._active) + len(specification.seeds) > self._max_active:
                raise _UnavailableError(
                    f"{len(self._active)} requests are running or waiting, and this server takes {self._max_active}: "
                    "try again later",
                    "UNAVAILABLE",
                )
            self._start(generation, specification)

    def _start(self, generation: Generation, specification: Specification) -> None:
        prompt = specification.prompt.tobytes()
        for index, seed in enumerate(specification.seeds):
            key = next(self._keys)
            generation.keys.append(key)
            self._active[key] = (generation, index)
            self._engine.send("add", key, prompt, {**specification.options, "rng_seed": seed})

    def _stop(self, request_id: str) -> None:
        """TensorRT-LLM's way to cancel: a request with the same id and ``stop``. What was generated stays valid."""
        for generation in self._generations():
            if request_id and generation.request_id == request_id:
                self._abandon(generation, ("stopped",))

    def _abandon(self, generation: Generation, event: tuple[Any, ...]) -> None:
        generation.abandoned = True
        for key in generation.keys:
            self._engine.send("cancel", key)
        self._lane(generation).put(generation, event)

    def _cancel_row(self, generation: Generation, index: int) -> None:
        self._engine.send("cancel", generation.keys[index])

    def _forget(self, generation: Generation) -> None:
        with self._lock:
            for key in generation.keys:
                self._active.pop(key, None)
            self._counts["cancelled" if generation.abandoned else "finished"] += 1

    def _deliver(self, events: list[tuple[Any, ...]], status: dict[str, Any]) -> None:
        """The engine's events of one step, in the reader thread."""
        self._status = status or self._status
        for key, row, ids, log_probs, finish, detail in events:
            generation, index = self._active.get(key, (None, 0))
            if generation is None:
                continue
            if finish in _FAILURES:
                event: tuple[Any, ...] = ("failed", detail, _FAILURES[finish])
            else:
                event = ("tokens", index + row, ids, log_probs, finish, detail)
            self._lane(generation).put(generation, event)

    def _fail_all(self, reason: str) -> None:
        """The engine is dead. New requests are refused from now on, those in flight get an error."""
        for generation in self._generations():
            self._lane(generation).put(generation, ("failed", reason, "INTERNAL"))

    def _keep_house(self) -> None:
        written: dict[str, Any] | None = None
        while not self._closing.wait(_POLL_S):
            for generation in self._generations():
                if generation.is_cancelled():
                    event = ("failed", "the client cancelled this request", "CANCELLED")
                    self._abandon(generation, event)
            status = {**self._status, **self._counts, "active": len(self._active), "engine_pid": self._engine.pid}
            if self._status_file is not None and status != written:
                _write(self._status_file, status)
                written = status

    def _generations(self) -> list[Generation]:
        with self._lock:
            return list({id(generation): generation for generation, _index in self._active.values()}.values())

    def _lane(self, generation: Generation) -> Lane:
        return self._lanes[generation.keys[0] % _LANES]


class _UnavailableError(RuntimeError):
    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


def _limits(passport: dict[str, Any], parameters: dict[str, str]) -> Limits:
    limits = passport["limits"]
    return Limits(
        max_seq_len=limits["max_seq_len"],
        max_input_len=limits["max_input_len"],
        vocab_size=passport["vocab_size"],
        eos_ids=tuple(passport["eos_token_ids"]),
        max_sequences=limits["max_batch_size"],
        max_beam_width=min(int(parameters["max_beam_width"]), limits["max_batch_size"]),
        exclude_input=parameters["exclude_input_in_output"].lower() in {"true", "1"},
        guided=bool(passport["runtime"].get("guided_decoding")),
        adapters=len(passport["runtime"].get("lora", ())),
    )


def _write(path: Path, status: dict[str, Any]) -> None:
    """For people, tests and dashboards: what the engine is doing, as JSON."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(status) + "\n", encoding="utf-8")
    temporary.replace(path)
