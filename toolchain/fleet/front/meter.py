"""Who served what: counts the tokens of every answer for the replica that gave them, and books them in the ledger.

The gateway counts what it has got itself. An item says which replica gave it; that name counts for the node to which
the head assigned it, so a node can give away its own tokens but take none of another's. Time counts while the board
shows an assigned replica ready: a node's time is shared by those of its replicas that are ready at once, so that its
price is earned once, and of GPU time a replica has its part of its GPUs: a third of one for one of three services.
Booked once an interval of the clock (UTC) and at the end; what ``kill -9`` loses is the interval that is open.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Protocol

from toolchain.errors import ScalellmError
from toolchain.fleet import wire
from toolchain.fleet.control.seats import Seat
from toolchain.ledger.record import Head, Usage

INTERVAL_S = 60
"""Divides a day, so that no interval belongs to two."""
_LONGEST_S = 10.0
"""Between two looks at the board; what a node said counts no longer, as on the board itself."""
_RATE_S = 10.0
"""Tokens a second are of so long."""
_NS_PER_MS = 1_000_000
_DEAREST, _MOST_GPUS = Decimal(10_000), 1024
"""Dollars an hour, and GPUs, of one node: beyond, somebody has mistyped."""
NODES = "nodes/"
READY = "ready"


class Book(Protocol):
    """What is used of a ``ledger.book.Ledger``."""

    @property
    def head(self) -> Head: ...

    def append(self, usages: Sequence[Usage]) -> Head: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Place:
    """Where a replica runs."""

    provider: str
    node: str
    device: str
    gpus: int
    price_per_hour: Decimal


NOWHERE = Place("unknown", "unknown", "", 0, Decimal(0))
"""Of a replica that the board has never shown."""


@dataclass
class Counts:
    """Of one replica."""

    node_ns: int = 0
    gpu_ns: int = 0
    requests: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    continued: int = 0


class Meter:
    """``answer`` from the gateway's thread; ``tick`` and ``close`` from the head's."""

    def __init__(
        self,
        ledger: Book | None,
        note: Callable[[str], None] = lambda _text: None,
        *,
        interval_s: int = INTERVAL_S,
        clock: Callable[[], float] = time.time,
        steady_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """``ledger``: None counts and books nothing. ``note`` is told when it cannot be written."""
        self._ledger, self._note = ledger, note
        self._interval_s, self._clock, self._steady_ns = interval_s, clock, steady_ns
        self._lock = threading.Lock()
        self._places: dict[str, Place] = {}
        self._open: dict[tuple[str, Place], Counts] = {}
        self._loose: dict[str, Counts] = {}
        """Of replicas that the board has not shown yet."""
        self._tokens: dict[str, int] = {}
        self._samples: deque[tuple[int, dict[str, int]]] = deque()
        self._begun_ms = self._now_ms()
        self._ticked_ns: int | None = None
        self._failed = False
        self._head = ledger.head if ledger is not None else None

    def answer(
        self, replica: str, *, requests: int = 0, tokens_in: int = 0, tokens_out: int = 0, continued: int = 0
    ) -> None:
        """A part of an answer has come from this replica."""
        with self._lock:
            place = self._places.get(replica)
            if place is None:
                counts = self._loose.setdefault(replica, Counts())
            else:
                counts = self._open.setdefault((replica, place), Counts())
            counts.requests += requests
            counts.tokens_in += tokens_in
            counts.tokens_out += tokens_out
            counts.continued += continued
            self._tokens[replica] = self._tokens.get(replica, 0) + tokens_out

    def booking(self, prompt_tokens: int, *, counted: bool = True) -> Booking:
        """Of one answer that begins. ``counted``: whether it is a request, or a further answer of one."""
        return Booking(self, prompt_tokens if counted else 0, int(counted))

    def tick(
        self, nodes: Mapping[str, Mapping[str, Any]], assigned: Mapping[str, Mapping[str, Seat]] | None = None
    ) -> None:
        """What the board shows under ``nodes/``, about once a second. ``assigned``: node -> the names of the replicas
        that it was given, and their places there; None trusts the nodes. What a node says that makes no sense counts
        for nothing.
        """
        with self._lock:
            now_ns = self._steady_ns()
            past_ns = 0 if self._ticked_ns is None else now_ns - self._ticked_ns
            self._ticked_ns = now_ns
            for key, said in nodes.items():
                node = key.removeprefix(NODES)
                with contextlib.suppress(KeyError, TypeError, ValueError, ArithmeticError):
                    given = None if assigned is None else assigned.get(node, {})
                    self._see(node, said, given, min(past_ns, int(_LONGEST_S * 1e9)))
            self._samples.append((now_ns, dict(self._tokens)))
            while len(self._samples) > 2 and now_ns - self._samples[1][0] >= _RATE_S * 1e9:
                self._samples.popleft()
        if self._now_ms() // 1000 // self._interval_s != self._begun_ms // 1000 // self._interval_s:
            self.flush()

    def flush(self) -> None:
        """Book what was counted; where the ledger cannot be written it is kept, to be booked later."""
        with self._lock:
            taken, begin_ms = self._open, self._begun_ms
            end_ms = self._begun_ms = max(self._now_ms(), begin_ms)
            rests = {
                key: Counts(counts.node_ns % _NS_PER_MS, counts.gpu_ns % _NS_PER_MS) for key, counts in taken.items()
            }
            self._open = {key: replace(rest) for key, rest in rests.items() if rest.node_ns or rest.gpu_ns}
        usages = _usages(taken, begin_ms, end_ms)
        if not usages or self._ledger is None:
            return
        try:
            self._head = self._ledger.append(usages)
            self._failed = False
        except ScalellmError as error:
            if not self._failed:
                self._note(f"{error.message}; what was used is kept and booked later")
            self._failed = True
            with self._lock:
                for key, counts in taken.items():
                    counts.node_ns -= rests[key].node_ns
                    counts.gpu_ns -= rests[key].gpu_ns
                    self._add(key, counts)
                self._begun_ms = begin_ms

    def close(self) -> None:
        """Books the rest, also of replicas that the board has never shown."""
        with self._lock:
            for replica, counts in self._loose.items():
                self._add((replica, NOWHERE), counts)
            self._loose = {}
        self.flush()
        if self._ledger is not None:
            self._ledger.close()

    def rates(self) -> dict[str, float]:
        """Tokens a second of each replica, over the last ten seconds."""
        with self._lock:
            if len(self._samples) < 2:
                return {}
            (begun_ns, first), (end_ns, last) = self._samples[0], self._samples[-1]
            span_s = max((end_ns - begun_ns) / 1e9, 0.1)
            return {replica: (count - first.get(replica, 0)) / span_s for replica, count in last.items()}

    @property
    def head(self) -> Head | None:
        """The ledger's newest record; None without a ledger."""
        return self._head

    def _see(self, node: str, said: Mapping[str, Any], given: Mapping[str, Seat] | None, past_ns: int) -> None:
        place = place_of(node, said)
        states = {str(one["name"]): one["state"] for one in said["replicas"]}
        if given is None:
            given = {str(one["name"]): Seat.read(one) for one in said["replicas"]}
        states = {name: state for name, state in states.items() if name in given}
        for name in states:
            self._places[name] = place
            if name in self._loose:
                self._add((name, place), self._loose.pop(name))
        ready = [name for name, state in states.items() if state == READY]
        for name in ready:
            counts, seat = self._open.setdefault((name, place), Counts()), given[name]
            counts.node_ns += past_ns // len(ready)
            counts.gpu_ns += past_ns * min(len(seat.gpus), place.gpus) // seat.of

    def _add(self, key: tuple[str, Place], more: Counts) -> None:
        counts = self._open.setdefault(key, Counts())
        counts.node_ns += more.node_ns
        counts.gpu_ns += more.gpu_ns
        counts.requests += more.requests
        counts.tokens_in += more.tokens_in
        counts.tokens_out += more.tokens_out
        counts.continued += more.continued

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)


class Booking:
    """One answer while it grows: its tokens are counted for the replica that gave them. The request and its prompt
    count where its first token came from.
    """

    def __init__(self, meter: Meter, tokens_in: int, requests: int) -> None:
        self._meter = meter
        self._tokens_in, self._requests = tokens_in, requests
        self._now = ""
        self._before: str | None = None

    def see(self, item: wire.Item) -> None:
        """An item of this answer has come."""
        self._now = wire.replica_of(item) or self._now
        count = len(item.get("token_ids") or ())
        if not count:
            return
        moved = self._before not in (None, self._now)
        self._meter.answer(
            self._now,
            requests=self._requests,
            tokens_in=self._tokens_in,
            tokens_out=count,
            continued=int(moved),
        )
        self._before, self._tokens_in, self._requests = self._now, 0, 0


def place_of(node: str, said: Mapping[str, Any]) -> Place:
    """From what a node says of itself on the board. Raises KeyError, TypeError, ValueError or ArithmeticError for what
    makes no sense.
    """
    price = Decimal(str(said.get("price_per_hour") or 0))
    gpus = int(said["gpus"])
    if not (price.is_finite() and 0 <= price <= _DEAREST and 0 <= gpus <= _MOST_GPUS):
        raise ValueError(f"{node}: {gpus} GPUs for {price} dollars an hour")
    return Place(str(said["provider"]), node, str(said["device"]), gpus, price)


def _usages(taken: Mapping[tuple[str, Place], Counts], begin_ms: int, end_ms: int) -> list[Usage]:
    """A record of each replica that was used or ready, by name."""
    found = []
    for (replica, place), counts in sorted(taken.items(), key=lambda one: one[0][0]):
        usage = Usage(
            begin_ms=begin_ms,
            end_ms=end_ms,
            **vars(place),
            replica=replica,
            node_ms=counts.node_ns // _NS_PER_MS,
            gpu_ms=counts.gpu_ns // _NS_PER_MS,
            requests=counts.requests,
            tokens_in=counts.tokens_in,
            tokens_out=counts.tokens_out,
            continued=counts.continued,
        )
        if usage.node_ms or usage.gpu_ms or usage.requests or usage.tokens_in or usage.tokens_out:
            found.append(usage)
    return found
