"""Sending prompts: closed and open loops, over one or several services, each request with all its times.

Latencies count from the scheduled time (no coordinated omission): in an open loop a request that waits for a free
slot of this client has been late since its arrival time. A request that fails is kept with its reason.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from toolchain.errors import RejectedError, ScalellmError
from toolchain.measuring.doors import Door, Session
from toolchain.measuring.prompts import Prompt
from toolchain.measuring.report import Load, Pattern, Request

SLOTS = 512
"""Requests that an open loop may have in flight for each service."""
_READY_S = 0.05
"""Between the last preparation and the first request."""


@dataclass(frozen=True)
class Task:
    """What is sent, where, and when."""

    prompts: Sequence[Prompt]
    load: Load
    pattern: Pattern
    requests: int
    """For each service."""
    stagger_s: float = 0.0
    """Closed loop, staggered: each service starts this much after the one before."""


@dataclass(frozen=True, slots=True)
class Raw:
    """A request's times on ``time.perf_counter()``'s clock, and what was said."""

    service: int
    prompt: int
    scheduled: float
    sent: float
    arrivals: tuple[float, ...]
    done: float
    text: str
    server_tokens: int | None
    error: str | None
    drafts: tuple[int, int] | None = None
    """(drafted, accepted) tokens, where the server says it."""


def poisson_times(rate_per_s: float, count: int, seed: int) -> list[float]:
    """``count`` arrival times in s from 0 on, exponential gaps of mean 1 / rate; the same for the same seed."""
    chance = random.Random(seed)
    gaps = [chance.expovariate(rate_per_s) for _ in range(count - 1)]
    return list(accumulate(gaps, initial=0.0))


def arrival_times(task: Task, services: int) -> list[list[float]]:
    """Of each service's requests in an open loop: bursts if simultaneous; staggered by 1/n of the mean gap."""
    assert task.load.rate_per_s
    times = poisson_times(task.load.rate_per_s, task.requests, task.load.seed)
    shift = 1 / task.load.rate_per_s / services if task.pattern == "staggered" else 0.0
    return [[time_ + number * shift for time_ in times] for number in range(services)]


def check(task: Task) -> None:
    """RejectedError for a load that is none."""
    if task.pattern == "one-at-a-time" and (task.load.kind == "open" or task.load.concurrency != 1):
        raise RejectedError("one at a time means concurrency 1 and no rate", hint="--concurrency 1")


def send(doors: Sequence[Door], task: Task, done: Callable[[], None] = lambda: None) -> list[Raw]:
    """All requests of a task, in the order of their scheduled times; ``done`` is called after each."""
    check(task)
    sessions = [_Sessions(door) for door in doors]
    try:
        if task.load.kind == "open":
            raw = _open_loop(sessions, task, done)
        elif task.pattern == "one-at-a-time":
            raw = _in_turn(sessions, task, done)
        else:
            raw = _closed_loop(sessions, task, done)
    finally:
        for pool in sessions:
            pool.close()
    return sorted(raw, key=lambda one: (one.scheduled, one.service, one.prompt))


class _Sessions:
    """Open connections to one service; the one used last is taken first."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._idle: queue.LifoQueue[Session] = queue.LifoQueue()

    def prepare(self, count: int) -> None:
        """EndpointError when nobody is there."""
        for _ in range(count):
            self._idle.put(self._door.open())

    def ask(self, service: int, number: int, prompt: Prompt, scheduled: float) -> Raw:
        """Waits for the scheduled time, asks, and tells everything; raises nothing of ours."""
        arrivals, pieces, tokens, error, session = list[float](), list[str](), None, None, None
        drafts = None
        sent = scheduled

        def mark() -> None:
            nonlocal sent
            sent = time.perf_counter()

        if (left := scheduled - time.perf_counter()) > 0:
            time.sleep(left)
        try:
            try:
                session = self._idle.get_nowait()
            except queue.Empty:
                session = self._door.open()
            for piece in session.ask(prompt.text, prompt.max_tokens, mark):
                tokens = piece.tokens if piece.tokens is not None else tokens
                drafts = piece.drafts or drafts
                if piece.text:
                    pieces.append(piece.text)
                    arrivals += [] if piece.whole else [piece.at_s]
        except ScalellmError as failure:
            error = f"{type(failure).__name__}: {failure.message}"
        except Exception as failure:  # the instrument's own mistake must be in the report too, not end a thread
            error = f"{type(failure).__name__}: {failure}"
        ended = time.perf_counter()
        if error is None and not pieces:
            error = "EmptyAnswer: no text came"
        if session is not None:
            self._idle.put(session)
        said = "".join(pieces)
        return Raw(service, number, scheduled, sent, tuple(arrivals), ended, said, tokens, error, drafts)

    def close(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()


def _prompt(task: Task, number: int) -> tuple[int, Prompt]:
    index = number % len(task.prompts)
    return index, task.prompts[index]


def _in_turn(sessions: Sequence[_Sessions], task: Task, done: Callable[[], None]) -> list[Raw]:
    """First to each service, second to each, and so on: never two in flight."""
    for pool in sessions:
        pool.prepare(1)
    raw = []
    for number in range(task.requests):
        for service, pool in enumerate(sessions):
            raw.append(pool.ask(service, *_prompt(task, number), time.perf_counter()))
            done()
    return raw


def _closed_loop(sessions: Sequence[_Sessions], task: Task, done: Callable[[], None]) -> list[Raw]:
    """As many in flight as asked, for each service; the next goes out when one is answered."""
    assert task.load.concurrency
    workers = min(task.load.concurrency, task.requests)
    for pool in sessions:
        pool.prepare(workers)
    begin = time.perf_counter() + _READY_S
    gap = task.stagger_s if task.pattern == "staggered" else 0.0
    raw: list[Raw] = []  # append is atomic
    numbers = [iter(range(task.requests)) for _ in sessions]
    lock = threading.Lock()

    def work(service: int) -> None:
        scheduled = begin + service * gap
        while True:
            with lock:
                number = next(numbers[service], None)
            if number is None:
                return
            raw.append(sessions[service].ask(service, *_prompt(task, number), scheduled))
            done()
            scheduled = time.perf_counter()

    _together([partial(work, service) for service in range(len(sessions)) for _ in range(workers)])
    return raw


def _open_loop(sessions: Sequence[_Sessions], task: Task, done: Callable[[], None]) -> list[Raw]:
    """Each request at its arrival time, whatever became of those before it."""
    times = arrival_times(task, len(sessions))
    slots = min(SLOTS, task.requests)
    for pool in sessions:
        pool.prepare(min(slots, 16))
    raw: list[Raw] = []

    def one(service: int, number: int, scheduled: float) -> None:
        raw.append(sessions[service].ask(service, *_prompt(task, number), scheduled))
        done()

    def feed(service: int, begin: float) -> None:
        with ThreadPoolExecutor(slots, f"service-{service}") as pool:
            for number, after in enumerate(times[service]):
                if (left := begin + after - time.perf_counter()) > 0:
                    time.sleep(left)
                pool.submit(one, service, number, begin + after)

    begin = time.perf_counter() + _READY_S
    _together([partial(feed, service, begin) for service in range(len(sessions))])
    return raw


def _together(calls: Sequence[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def requests_of(raw: Sequence[Raw], prompts: Sequence[Prompt], count: Callable[[Raw], int]) -> tuple[Request, ...]:
    """Raw times -> the report's, from the first scheduled time on; ``count`` tells an answer's tokens."""
    zero = min(one.scheduled for one in raw)

    def since(at: float) -> float:
        return round(at - zero, 6)

    return tuple(
        Request(
            service=one.service,
            prompt=one.prompt,
            scheduled_s=since(one.scheduled),
            sent_s=since(one.sent),
            arrivals_s=tuple(since(at) for at in one.arrivals),
            done_s=since(one.done),
            input_tokens=prompts[one.prompt].input_tokens,
            output_tokens=count(one),
            server_output_tokens=one.server_tokens,
            drafts=one.drafts,
            error=one.error,
        )
        for one in raw
    )
