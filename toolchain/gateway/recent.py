"""The last five minutes of a gateway, in bounded memory: how many requests and tokens, and how quick they were.

    slot = 5 s; a window of 60 s is the present slot and the 11 before it

Times are counted in classes that are 4 % apart, as DDSketch does (Masson, Rim and Lee, VLDB 2019), so a quantile is
within 2 % of a time that was measured, whatever the number of requests. Nothing of a request but numbers is held. The
counters of ``/metrics`` go on for ever and are Prometheus' to difference; these are for the page, which has no memory.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

SLOT_S = 5
SLOTS = 60
_RATIO = 1.04
_SHORTEST_S, _LONGEST_S = 1e-5, 1e4


@dataclass
class _Slot:
    number: int
    requests: int = 0
    failed: int = 0
    tokens: int = 0
    ttft: Counter[int] = field(default_factory=Counter)
    itl: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True)
class Window:
    """What happened within some time. Milliseconds of nearest rank; None where nothing was measured."""

    requests: int
    failed: int
    """Answered with 5xx, or broken off by the engine."""
    requests_per_s: float
    tokens_per_s: float
    ttft_ms_p50: float | None
    ttft_ms_p90: float | None
    itl_ms_p50: float | None
    itl_ms_p90: float | None


@dataclass(frozen=True)
class Series:
    """One value a slot, the oldest first; the last slot is not over yet."""

    step_s: int
    requests_per_s: list[float]
    tokens_per_s: list[float]
    ttft_ms_p50: list[float | None]
    itl_ms_p50: list[float | None]


class Recent:
    """What a gateway's requests report; belongs to one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun_s = clock()
        self._slots: deque[_Slot] = deque(maxlen=SLOTS)

    @property
    def uptime_s(self) -> float:
        return self._clock() - self._begun_s

    def first_token(self, seconds: float) -> None:
        """From a request to its first token."""
        self._slot().ttft[_class_of(seconds)] += 1

    def tokens(self, count: int, apart_s: float | None = None) -> None:
        """``count`` tokens have come; ``apart_s`` each after the one before, where there was one."""
        slot = self._slot()
        slot.tokens += count
        if apart_s is not None and count:
            slot.itl[_class_of(apart_s)] += count

    def ended(self, *, failed: bool) -> None:
        """A request has been answered, in whatever way."""
        slot = self._slot()
        slot.requests += 1
        slot.failed += failed

    def window(self, seconds: int) -> Window:
        """The last ``seconds``, at most ``SLOT_S * SLOTS``, or all that there was of them."""
        now, slots = self.uptime_s, seconds // SLOT_S
        oldest = int(now // SLOT_S) - slots + 1
        found = [slot for slot in self._slots if slot.number >= oldest]
        span_s = max(1.0, min(now, now - oldest * SLOT_S))
        ttft, itl = _sum(slot.ttft for slot in found), _sum(slot.itl for slot in found)
        requests = sum(slot.requests for slot in found)
        return Window(
            requests=requests,
            failed=sum(slot.failed for slot in found),
            requests_per_s=requests / span_s,
            tokens_per_s=sum(slot.tokens for slot in found) / span_s,
            ttft_ms_p50=quantile_ms(ttft, 0.5),
            ttft_ms_p90=quantile_ms(ttft, 0.9),
            itl_ms_p50=quantile_ms(itl, 0.5),
            itl_ms_p90=quantile_ms(itl, 0.9),
        )

    def series(self) -> Series:
        """All slots, those before the beginning included: they are 0 and None."""
        now = int(self.uptime_s // SLOT_S)
        known = {slot.number: slot for slot in self._slots}
        slots = [known.get(number, _Slot(number)) for number in range(now - SLOTS + 1, now + 1)]
        return Series(
            step_s=SLOT_S,
            requests_per_s=[slot.requests / SLOT_S for slot in slots],
            tokens_per_s=[slot.tokens / SLOT_S for slot in slots],
            ttft_ms_p50=[quantile_ms(slot.ttft, 0.5) for slot in slots],
            itl_ms_p50=[quantile_ms(slot.itl, 0.5) for slot in slots],
        )

    def _slot(self) -> _Slot:
        number = int(self.uptime_s // SLOT_S)
        if not self._slots or self._slots[-1].number != number:
            self._slots.append(_Slot(number))
        return self._slots[-1]


def quantile_ms(counts: Counter[int], q: float) -> float | None:
    """The ``q`` quantile by nearest rank of what was counted, in milliseconds; None of nothing."""
    rank = math.ceil(q * counts.total())
    for number in sorted(counts):
        rank -= counts[number]
        if rank <= 0:
            return float(f"{1000 * _RATIO**number:.3g}")
    return None


def _class_of(seconds: float) -> int:
    return round(math.log(min(max(seconds, _SHORTEST_S), _LONGEST_S), _RATIO))


def _sum(counts: Iterable[Counter[int]]) -> Counter[int]:
    total: Counter[int] = Counter()
    for one in counts:
        total.update(one)
    return total
