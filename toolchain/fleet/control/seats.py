"""How many replicas a node holds, and which part of its GPUs each of them has. Pure.

A recipe with ``services: N`` is planned for the Nth part of a GPU (of ``tp`` x ``pp`` GPUs, of a machine without one):
its cache and its threads stand in its model repository. So a replica takes one of N parts of so many GPUs, and no GPU
has more parts taken than it has, whichever versions share it. A recipe for a CPU that names no ``services`` says
nothing of its part: then the node says how many it holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from toolchain.fleet.deployment import MOST

SHARES = "shares"
"""Key of a version on the board: of each of its recipes, in order, the device and what a replica takes of it."""
_MOST_GPUS = 1024


@dataclass(frozen=True)
class Share:
    """What a recipe's plan gives one replica: one of ``services`` parts of so many GPUs; of the machine where it needs
    none.
    """

    gpus: int = 0
    services: int = 1

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Share:
        """Raises KeyError, TypeError or ValueError."""
        return cls(_number(told["gpus"], 0, _MOST_GPUS), _number(told["services"], 1, MOST))


Offers = tuple[tuple[str, Share], ...]
"""Of a version's recipes, in order: the device that each is for, and its share."""


@dataclass(frozen=True)
class Seat:
    """The place of one replica on its node: one of ``of`` parts of these GPUs; of the machine where there are none."""

    gpus: tuple[int, ...] = ()
    of: int = 1

    def told(self) -> dict[str, Any]:
        """As it stands on the board, beside the replica's name."""
        return {"gpus": list(self.gpus), "of": self.of}

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Seat:
        """The whole machine where nothing is said. Raises TypeError or ValueError."""
        gpus = tuple(_number(one, 0, _MOST_GPUS - 1) for one in told.get("gpus", ()))
        if len(set(gpus)) < len(gpus):
            raise ValueError(f"a GPU twice: {gpus}")
        return cls(gpus, _number(told.get("of", 1), 1, MOST))


WHOLE = Seat()
"""All of the machine: of a replica of which nothing else is said."""


@dataclass(frozen=True)
class Machine:
    """What of a node decides how many replicas it holds."""

    device: str = ""
    gpus: int = 0
    limit: int | None = None
    """Replicas at most, as its operator says."""
    own: Share | None = None
    """Of the recipe by which it builds its engine itself, whatever the endpoint's version."""
    turns: bool = False
    """Whether its replicas take all recipes in turn, as on the machine of the deployment; else the first one that is
    for its device.
    """

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Machine:
        """From what a node says of itself. Raises TypeError, KeyError or ValueError."""
        limit, own = told.get("room"), told.get("own")
        return cls(
            device=str(told.get("device", "")),
            gpus=_number(told.get("gpus", 0), 0, _MOST_GPUS),
            limit=None if limit is None else _number(limit, 0, _MOST_GPUS),
            own=None if own is None else Share.read(own),
            turns=bool(told.get("turns", False)),
        )

    def share(self, offers: Offers, number: int) -> Share:
        """What the replica of this number takes here."""
        if self.own is not None:
            return self.own
        fitting = [share for device, share in offers if self.turns or device == self.device] or [Share()]
        return fitting[(number - 1) % len(fitting)] if self.turns else fitting[0]

    def seat(self, share: Share, taken: Sequence[Seat]) -> Seat | None:
        """A free place for it beside those that are taken, where the least is taken; None where there is none."""
        if self.limit is not None and len(taken) >= self.limit:
            return None
        of = share.services
        if not share.gpus and of == 1:
            of = min(MOST, max(1, self.gpus) if self.limit is None else self.limit)
        found = [
            (_fullest(gpus, taken), gpus) for gpus in self._groups(share.gpus) if _fullest(gpus, taken) + _part(of) <= 1
        ]
        return Seat(min(found)[1], of) if found else None

    def room(self, offers: Offers) -> int:
        """How many replicas of a version an empty node holds at least, whichever of its recipes comes first."""
        return _room(self, offers)

    def _groups(self, size: int) -> list[tuple[int, ...]]:
        if not size:
            return [()]
        return [tuple(range(first, first + size)) for first in range(0, self.gpus - size + 1, size)]


def offers_of(version: Mapping[str, Any]) -> Offers:
    """Of one of the board's versions; none of one that an older head has written. Raises KeyError, TypeError or
    ValueError.
    """
    return tuple((str(one["device"]), Share.read(one)) for one in version.get(SHARES, ()))


def turns_of(offers: Offers) -> int:
    """After so many numbers each recipe has had its turn."""
    return max(1, len(offers))


@lru_cache(maxsize=1024)
def _room(machine: Machine, offers: Offers) -> int:
    return min(_filled(machine, offers, first) for first in range(1, turns_of(offers) + 1))


def _filled(machine: Machine, offers: Offers, number: int) -> int:
    """How many fit when the first one has this number; one that does not fit is left out."""
    taken: list[Seat] = []
    left_out = 0
    while left_out < turns_of(offers) and len(taken) < MOST:
        seat = machine.seat(machine.share(offers, number), taken)
        number += 1
        left_out = left_out + 1 if seat is None else 0
        taken += [] if seat is None else [seat]
    return len(taken)


def _fullest(gpus: tuple[int, ...], taken: Sequence[Seat]) -> Fraction:
    """How much is taken of the fullest of these GPUs; of the machine where there are none."""
    if not gpus:
        return sum((_part(one.of) for one in taken if not one.gpus), Fraction())
    return max(sum((_part(one.of) for one in taken if gpu in one.gpus), Fraction()) for gpu in gpus)


@lru_cache(maxsize=MOST)
def _part(of: int) -> Fraction:
    return Fraction(1, of)


def _number(told: Any, least: int, most: int) -> int:
    if type(told) is not int or not least <= told <= most:
        raise ValueError(f"not a number from {least} to {most}: {told!r}")
    return told
