"""What the controller sees: the nodes as they tell of themselves, and the replicas that it has placed there. Pure.

It answers questions (what runs, what is ready, where another replica fits, what it costs) and decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

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


@dataclass(frozen=True)
class NodeSeen:
    """A node, as it tells of itself."""

    name: str
    room: int
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
                str(one["name"]), int(one["version"]), str(one["state"]), str(one.get("why", "")), int(one["restarts"])
            )
            for one in told["replicas"]
        )
        price = told.get("price_per_hour")
        if price is not None and not 0 <= float(price) < math.inf:
            raise ValueError(f"a price of {price}")
        return cls(
            name,
            room=int(told["room"]),
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


@dataclass
class Sight:
    """Nodes and placements of one round; placements change while it is decided."""

    nodes: dict[str, NodeSeen]
    placed: dict[str, Placement]
    avoided: Mapping[str, float] = field(default_factory=dict)
    """Node -> until when nothing is placed there, because something failed there."""
    budget: float | None = None
    """US dollars per hour, of all nodes in use."""

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
        return len({found for found in self._live() if node is None or found[0] == node})

    def draining(self) -> int:
        """How many still run on nodes that stay, though they are wanted no more."""
        wanted = {(one.node, one.name) for one in self.placed.values()}
        return len({found for found in self._live() if found not in wanted and self.nodes[found[0]].up})

    def _live(self) -> Iterable[tuple[str, str]]:
        for one in self.placed.values():
            told = self.told(one)
            if told is None or told.state not in _OVER:
                yield one.node, one.name
        for node in self.nodes.values():
            for told in node.replicas:
                if told.state not in _OVER:
                    yield node.name, told.name

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

    def place_for(self, now: float, *, anywhere: bool = False) -> str | None:
        """The node for another replica: a second one on a node of its own, then the cheapest; None where none may
        have it. ``anywhere``: also where something has failed of late.
        """
        used = {one.node for one in self.placed.values() if self.nodes[one.node].up}
        fits = [
            node
            for node in self.nodes.values()
            if node.up
            and self.live(node.name) < node.room
            and (anywhere or self.avoided.get(node.name, 0.0) <= now)
            and self.within_budget(node.name)
        ]

        def rank(node: NodeSeen) -> tuple[bool, float, int, str]:
            return used == {node.name}, self._price(node.name) / node.room, self.live(node.name), node.name

        return min(fits, key=rank).name if fits else None
