"""What the controller sees: the nodes as they tell of themselves, and the replicas that it has placed there. Pure.

It answers questions (what runs, what is ready, where another replica fits, what it costs) and decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from toolchain.fleet.control.seats import WHOLE, Machine, Offers, Seat, turns_of

READY = "ready"
_OVER = frozenset({"failed", "ended"})
"""States in which nothing of a replica runs any more."""


@dataclass(frozen=True)
class Told:
    """A replica, as its node tells of it."""

    name: str
    version: int
    state: str
    why: str = ""
    restarts: int = 0
    seat: Seat = WHOLE


@dataclass(frozen=True)
class NodeSeen:
    """A node, as it tells of itself."""

    name: str
    machine: Machine
    price_per_hour: float | None = None
    """US dollars, of the whole node while it runs at least one replica."""
    up: bool = True
    """Not while it takes its leave."""
    replicas: tuple[Told, ...] = ()

    @classmethod
    def of(cls, name: str, told: Mapping[str, Any]) -> NodeSeen:
        """From the board's ``nodes/<name>``. Raises KeyError, TypeError or ValueError for what makes no sense."""
        replicas = (
            Told(
                *(str(one["name"]), int(one["version"]), str(one["state"])),
                *(str(one.get("why", "")), int(one["restarts"]), Seat.read(one)),
            )
            for one in told["replicas"]
        )
        price = told.get("price_per_hour")
        if price is not None and not 0 <= float(price) < math.inf:
            raise ValueError(f"a price of {price}")
        return cls(
            name,
            machine=Machine.read(told),
            price_per_hour=None if price is None else float(price),
            up=told["state"] == "up",
            replicas=tuple(replicas),
        )


@dataclass(frozen=True)
class Placement:
    """A replica that is wanted of a node."""

    name: str
    node: str
    version: int
    since: float
    """When it was placed, or was last seen to be ready."""
    seat: Seat = WHOLE


@dataclass
class Sight:
    """Nodes and placements of one round; placements change while it is decided."""

    nodes: dict[str, NodeSeen]
    placed: dict[str, Placement]
    avoided: Mapping[str, float] = field(default_factory=dict)
    """Node -> until when nothing is placed there, because something failed there."""
    budget: float | None = None
    """US dollars per hour, of all nodes in use."""
    offers: Mapping[int, Offers] = field(default_factory=dict)
    """Version -> what its replicas take of a node."""

    def told(self, one: Placement) -> Told | None:
        """None where its node says nothing of it."""
        node = self.nodes.get(one.node)
        return next((told for told in node.replicas if told.name == one.name), None) if node else None

    def is_ready(self, one: Placement) -> bool:
        """Whether it takes requests."""
        told = self.told(one)
        return told is not None and told.state == READY

    def ready(self) -> int:
        """How many of the placed ones take requests."""
        return sum(map(self.is_ready, self.placed.values()))

    def live(self, node: str | None = None) -> int:
        """How many run or are to run, those that drain included; on one node, or on all."""
        return len([found for found in self._live() if node is None or found[0] == node])

    def draining(self) -> int:
        """How many still run on nodes that stay, though they are wanted no more."""
        wanted = {(one.node, one.name) for one in self.placed.values()}
        return len([found for found in self._live() if found not in wanted and self.nodes[found[0]].up])

    def _live(self) -> dict[tuple[str, str], Seat]:
        """Node and name of each that runs or is to run, and its place there."""
        live = {
            (node.name, told.name): told.seat
            for node in self.nodes.values()
            for told in node.replicas
            if told.state not in _OVER
        }
        for one in self.placed.values():
            told = self.told(one)
            if told is None or told.state not in _OVER:
                live[one.node, one.name] = one.seat
        return live

    def cost(self, *more: str) -> float:
        """US dollars per hour, of the nodes in use and of ``more``."""
        used = {node for node, _name in self._live()} | set(more)
        return sum(self._price(node) for node in used)

    def _price(self, name: str) -> float:
        """One that nobody knows is beyond every budget."""
        node = self.nodes.get(name)
        price = node.price_per_hour if node else 0.0
        return price if price is not None else 0.0 if self.budget is None else math.inf

    def within_budget(self, *more: str) -> bool:
        """Whether the nodes in use, and ``more``, may be paid."""
        return self.budget is None or self.cost(*more) <= self.budget

    def dearest(self) -> str | None:
        """The node in use with the highest price."""
        return max({one.node for one in self.placed.values()}, key=lambda name: (self._price(name), name), default=None)

    def share_of_price(self, node: NodeSeen, version: int) -> float:
        """US dollars per hour for each replica of the version that the node has room for; 0 where nobody knows."""
        return self._price(node.name) / max(1, self.room(node, version))

    def room(self, node: NodeSeen, version: int) -> int:
        """How many replicas of a version it holds while it holds no others."""
        return node.machine.room(self.offers.get(version, ()))

    def free(self, version: int, number: int) -> dict[str, Seat]:
        """Where the replica of this number and version would fit: a place on each node that has one."""
        found, live = {}, self._live()
        for node in self.nodes.values():
            share = node.machine.share(self.offers.get(version, ()), number)
            seat = node.machine.seat(share, [seat for (name, _), seat in live.items() if name == node.name])
            if node.up and seat is not None:
                found[node.name] = seat
        return found

    def numbers(self, version: int, first: int) -> range:
        """From which the next replica's may be taken, so that each recipe of the version has its turn."""
        return range(first, first + turns_of(self.offers.get(version, ())))

    def place_for(self, version: int, first: int, now: float, *, anywhere: bool = False) -> Placement | None:
        """Another replica, of the ``first`` number or a following one whose recipe fits: a second one on a node of its
        own, then the cheapest; None where none may have it. ``anywhere``: also where something has failed of late.
        """
        used = {one.node for one in self.placed.values() if self.nodes[one.node].up}

        def rank(name: str) -> tuple[bool, float, int, str]:
            return used == {name}, self.share_of_price(self.nodes[name], version), self.live(name), name

        for number in self.numbers(version, first):
            free = self.free(version, number)
            fits = [
                name for name in free if (anywhere or self.avoided.get(name, 0.0) <= now) and self.within_budget(name)
            ]
            if fits:
                name = min(fits, key=rank)
                return Placement(f"r{number}", name, version, now, free[name])
        return None
