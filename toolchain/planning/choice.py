"""Which device, formats and number of services are best for a goal: every option, ranked, and the Pareto set. Pure.

Options that keep the limits come first, then those of which nobody can tell, then those that break them; among equals
the goal decides. The order of the devices that one asks for changes nothing. It ranks speed, memory and money by
estimates; what a format does to the text it does not know.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import floor, inf, log10
from types import MappingProxyType
from typing import Any

from toolchain.device import Price, devices
from toolchain.planning.forecast import KIND
from toolchain.planning.load import VERDICTS, Load, Slo
from toolchain.planning.option import Asked, Option, options
from toolchain.planning.price_list import age_days
from toolchain.quantization import WEIGHTS

SAME_DIGITS = 3
"""Values that agree in so many digits count as equal: estimates are not better than that."""


@dataclass(frozen=True)
class Goal:
    """What is wanted most."""

    name: str
    title: str
    key: Callable[[Option], tuple[float, ...]]
    """Of options that fit and have estimates; less is better."""


def _ttft(one: Option) -> tuple[float, ...]:
    return (one.speed.sure_ttft_s, one.speed.unpacked_from_s is not None) if one.speed else (inf,)


def _throughput(one: Option) -> tuple[float, ...]:
    return (-one.speed.sure_tokens_per_s if one.speed else inf,)


def _density(one: Option) -> tuple[float, ...]:
    return (-one.services, -one.services * one.sequences)


def _cost(one: Option) -> tuple[float, ...]:
    return (-one.speed.sure_tokens_per_s / one.usd_per_hour if one.speed and one.usd_per_hour else inf,)


GOALS: Mapping[str, Goal] = MappingProxyType(
    {
        goal.name: goal
        for goal in (
            Goal("ttft", "the shortest time to the first token", _ttft),
            Goal("throughput", "the most output tokens per second", _throughput),
            Goal("density", "the most services, then the most sequences at once", _density),
            Goal("cost", "the most output tokens for a dollar", _cost),
        )
    }
)


@dataclass(frozen=True)
class BreakEven:
    """Up to which price the winner wins."""

    measure: str
    """``"tokens per dollar"`` or ``"economic score"``."""
    winner: str
    """An option's name, as ``rival``: the best one of another device."""
    usd_per_hour: float
    """The winner's price."""
    until_usd_per_hour: float
    rival: str
    rival_usd_per_hour: float


@dataclass(frozen=True)
class Choice:
    """Options for one model, best first."""

    goal: str
    load: Load
    slo: Slo
    today: datetime.date
    ranked: tuple[Option, ...]
    """Those that fit, best first, then those that do not."""
    pareto: tuple[Option, ...]
    """Those that no other beats in TTFT, tokens/s and price at once; for density, nor in services."""
    break_even: tuple[BreakEven, ...]

    @property
    def best(self) -> Option | None:
        """The first; None where nothing fits."""
        return self.ranked[0] if self.ranked and self.ranked[0].fits else None

    def to_json(self) -> dict[str, Any]:
        """The whole choice as plain JSON (``docs/choice.schema.json``)."""
        beaten = {one.name for one in self.pareto}

        def row(rank: int, one: Option) -> dict[str, Any]:
            age = age_days(one.price, self.today) if one.price else None
            return {"rank": rank, "pareto": one.name in beaten, **one.to_json(), "price_age_days": age}

        return {
            "estimates": KIND,
            "goal": self.goal,
            "load": asdict(self.load),
            "slo": asdict(self.slo),
            "today": self.today.isoformat(),
            "options": [row(rank, one) for rank, one in enumerate(self.ranked, 1)],
            "break_even": [asdict(one) for one in self.break_even],
        }


def choose(asked: Asked, names: Iterable[str], goal: str, today: datetime.date) -> Choice:
    """Every option on these devices, ranked for a goal (a name of ``GOALS``). ``today`` tells how old prices are."""
    every = [one for name in dict.fromkeys(names) for one in options(asked, name)]
    ranked = rank(every, GOALS[goal])
    return Choice(
        goal=goal,
        load=asked.load,
        slo=asked.slo,
        today=today,
        ranked=tuple(ranked),
        pareto=tuple(pareto(ranked, goal)),
        break_even=tuple(break_even(ranked)),
    )


def rank(every: Iterable[Option], goal: Goal) -> list[Option]:
    """Best first. Among equals: fewer cautions, more sequences, the lower price, the name."""
    return sorted(every, key=lambda one: _order(one, goal))


def _order(one: Option, goal: Goal) -> tuple[Any, ...]:
    known = one.speed is not None
    kept = VERDICTS.index(one.speed.verdict) if one.speed and one.speed.verdict else 0
    if one.fits and known:
        values = tuple(rounded(value) for value in goal.key(one))
    elif one.fits:
        values = (float(one.weight_bytes),)
    else:
        memory = one.why_not.startswith("memory: ")
        values = (not memory, WEIGHTS[one.weights].bits if memory else 0)
    usd = inf if one.usd_per_hour is None else one.usd_per_hour
    held = -one.services * one.sequences
    place = list(devices()).index(one.device)
    return (not one.fits, not known, kept, values, len(one.cautions), held, usd, place, one.name)


def rounded(value: float) -> float:
    """To ``SAME_DIGITS`` digits."""
    if value == 0 or value in (inf, -inf):
        return value
    return round(value, SAME_DIGITS - 1 - floor(log10(abs(value))))


def objectives(one: Option, goal: str) -> tuple[float, ...]:
    """What the Pareto set weighs, less is better: TTFT, tokens/s, price (unknown: the most); for density services."""
    assert one.speed is not None
    usd = inf if one.usd_per_hour is None else one.usd_per_hour
    return (one.speed.sure_ttft_s, -one.speed.sure_tokens_per_s, usd, -one.services if goal == "density" else 0)


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether ``one`` is nowhere worse and somewhere better."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)


def pareto(ranked: Sequence[Option], goal: str) -> Iterator[Option]:
    """Those that no other dominates, in their order; of several with equal objectives the first."""
    able = [one for one in ranked if one.fits and one.speed]
    values = {one.name: objectives(one, goal) for one in able}
    seen: set[tuple[float, ...]] = set()
    for one in able:
        mine = values[one.name]
        if mine not in seen and not any(dominates(other, mine) for other in values.values()):
            seen.add(mine)
            yield one


def break_even(ranked: Sequence[Option]) -> Iterator[BreakEven]:
    """Of tokens per dollar, and of the economic score: up to which price the best device stays the best.

    Options that miss a limit do not count. Nothing where only one device has a price.
    """
    able = [one for one in ranked if one.fits and one.speed and one.speed.verdict not in ("missed", "unreachable")]
    worth = {one.name: one.speed.sure_tokens_per_s / one.usd_per_hour for one in able if one.speed and one.usd_per_hour}
    yield from _break_even("tokens per dollar", able, worth)
    scores = {
        one.name: one.services / (one.speed.sure_ttft_s * one.usd_per_hour)
        for one in able
        if one.score and one.speed and one.usd_per_hour
    }
    yield from _break_even("economic score", able, scores)


def _break_even(measure: str, able: Sequence[Option], worth: Mapping[str, float]) -> Iterator[BreakEven]:
    """Both measures are something divided by the price."""
    known = sorted((one for one in able if one.name in worth), key=lambda one: -worth[one.name])
    rival = next((one for one in known if one.device != known[0].device), None)
    if rival is None:
        return
    winner = known[0]
    assert winner.usd_per_hour is not None
    assert rival.usd_per_hour is not None
    until = winner.usd_per_hour * worth[winner.name] / worth[rival.name]
    yield BreakEven(measure, winner.name, winner.usd_per_hour, until, rival.name, rival.usd_per_hour)


def best_of_each(ranked: Sequence[Option]) -> list[Option]:
    """The first option of each device, in their order; where nothing fits, the one that the recipe asks for."""
    found: dict[str, Option] = {}
    for one in ranked:
        kept = found.setdefault(one.device, one)
        if not kept.fits and one.own:
            found[one.device] = one
    return list(found.values())


def priced(ranked: Iterable[Option]) -> dict[str, Price]:
    """Title of each device -> the price that counts for it."""
    return {one.title: one.price for one in ranked if one.price}
