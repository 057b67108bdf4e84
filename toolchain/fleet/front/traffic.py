"""What the head and the front tell each other: where new requests go, and how much there is to do.

Lanes: replicas that can go on with each other's requests share one; the versions of an endpoint may be of several. The
head's thread steers, the gateway's thread counts; each value has one writer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from toolchain.fleet.control.scaling import Load
from toolchain.fleet.front.texts import Texts
from toolchain.gateway.settings import Model


@dataclass(frozen=True)
class Lane:
    """How requests are put to the replicas that share it."""

    name: str
    """Under which its workers register."""
    texts: Texts
    room: int
    """Requests that one replica takes at once."""
    model: Model | None = None
    """As clients see it; None where that of the gateway's settings is right."""


@dataclass(frozen=True)
class Course:
    """Where requests go just now, by the head."""

    lanes: Mapping[str, Lane]
    target: str
    """The lane of new requests."""
    replicas: int = 1
    """How many are wanted."""
    coming: bool = False
    """Whether a replica is on its way: then requests wait longer than they would for one that was lost."""
    asleep: bool = False
    """Whether there is none because nobody asked; the next request wakes one."""
    start_s: float = 600.0
    """How long a replica may take to come."""
    queue: int | None = None
    """How many requests may wait for a place; None: as the gateway's settings say."""

    @property
    def lane(self) -> Lane:
        return self.lanes[self.target]

    def patience_s(self, usual_s: float) -> float:
        """How long a request waits while no replica takes it."""
        return max(usual_s, self.start_s) if self.coming or self.asleep else usual_s


class Use:
    """One answer at work, or a request that waits: what it has in flight."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic, self._tokens = traffic, 0

    def add(self, tokens: int) -> None:
        """So many more, of its prompt or of its answer."""
        self._tokens += tokens
        self._traffic.tokens += tokens

    def end(self) -> None:
        """It has ended, whichever way."""
        self._traffic.tokens -= self._tokens
        self._tokens = 0


class Traffic:
    """Between one front and one head."""

    def __init__(self, course: Course | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.course = course or Course({}, "")
        self._clock = clock
        self.tokens = 0
        """Of prompts and answers so far, of all answers at work and requests that wait."""
        self.waiting = 0
        """Requests for which no replica is there."""
        self._at_work = 0
        """Answers, and requests that wait for their turn."""
        self._last_s = clock()

    @contextmanager
    def use(self, tokens: int) -> Iterator[Use]:
        """For the length of an answer with a prompt of so many tokens, or while a request waits for its turn."""
        use = Use(self)
        use.add(tokens)
        self._at_work += 1
        try:
            yield use
        finally:
            use.end()
            self._at_work -= 1
            self._last_s = self._clock()

    @contextmanager
    def wait(self) -> Iterator[None]:
        """While a request has no replica."""
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1
            self._last_s = self._clock()

    def load(self) -> Load:
        """For the head."""
        course, requests = self.course, self._at_work
        idle_s = 0.0 if requests or self.waiting else self._clock() - self._last_s
        room = course.lane.room if course.target in course.lanes else 0
        return Load(max(0, self.tokens), self.waiting, idle_s, requests, room)
