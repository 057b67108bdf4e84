"""What goes into a round of the controller, what it keeps for the next one, and what comes out of it. Plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from toolchain.fleet.control.scaling import Scale
from toolchain.fleet.control.seats import Offers
from toolchain.fleet.control.sight import Placement


@dataclass(frozen=True)
class Wish:
    """The endpoint as it is wanted."""

    scale: Scale
    current: int
    """The version that is known to be good."""
    next: int | None = None
    """The version that is to replace it."""
    max_unavailable: int = 0
    start_s: float = 600.0
    """How long a replica may take until it is ready, or may be down."""
    budget: float | None = None
    """US dollars per hour."""
    offers: Mapping[int, Offers] = field(default_factory=dict)
    """Version -> what its replicas take of a node."""

    @property
    def floor(self) -> int:
        """So many take requests at least, as far as it is up to the controller."""
        return max(0, self.scale.min - self.max_unavailable)


@dataclass(frozen=True)
class Memory:
    """What is kept from one round to the next."""

    placed: Mapping[str, Placement] = field(default_factory=dict)
    number: int = 0
    """Of the replica that was named last."""
    wanted: Mapping[int, float] = field(default_factory=dict)
    """See ``scaling.desired``."""
    failures: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    """Node -> how often something failed there in a row, and until when it is left alone."""
    proven: int | None = None
    """The new version, once a replica of it takes requests."""
    ready: frozenset[str] = frozenset()
    nodes: frozenset[str] = frozenset()
    desired: int = -1
    waits: str = ""
    """What a round waits for that may take a person."""

    @classmethod
    def restored(cls, placed: Iterable[Placement], now: float) -> Memory:
        """After a restart of the controller, from what it had assigned."""
        found = {one.name: replace(one, since=now) for one in placed}
        numbers = [int(name[1:]) for name in found if name[1:].isdigit()]
        wanted = dict.fromkeys(range(1, len(found) + 1), now)
        return cls(found, max(numbers, default=0), wanted, nodes=frozenset(one.node for one in found.values()))


@dataclass(frozen=True)
class Event:
    """Something that people want to read later."""

    kind: str
    text: str
    node: str = ""
    replica: str = ""


@dataclass(frozen=True)
class Decision:
    """What a round comes to."""

    assigned: Mapping[str, tuple[Placement, ...]]
    """Of every node that is seen."""
    current: int
    next: int | None
    desired: int
    memory: Memory
    events: tuple[Event, ...]
