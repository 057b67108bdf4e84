"""The controller's decisions: how many replicas, of which version, on which nodes. Pure: no clock, no board, no thread.

What it holds to, of its own doing:

* never more than ``max`` replicas, those that still drain included; while a version is replaced, at most one more than
  the load wants (the surge), and never above ``max`` either;
* never fewer than ``min - max_unavailable`` that take requests; what fails or is lost is replaced;
* never more replicas on a node than it has room for: of no GPU are more parts taken than it has, those that still
  drain and those of another version included;
* the nodes in use never cost more than the budget. Money comes before the number of replicas: a node whose price has
  risen beyond it is given up.

An update first runs one replica of the new version (the trial). When it takes requests, which it does only after its
gate, the others follow one by one: first one more, then one old less; where there is no place for one more, first one
old less, if ``max_unavailable`` lets it. A replica of the new version that fails ends the update: the old version comes
back by the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from toolchain.fleet.control.rounds import Decision, Event, Memory, Wish
from toolchain.fleet.control.scaling import Load, desired
from toolchain.fleet.control.sight import NodeSeen, Placement, Sight, Told

_AVOID_S = (2.0, 5.0, 10.0, 30.0, 60.0)
"""How long a node on which something failed is left alone, by how often in a row."""
_CRASHES = 3
"""Restarts of the worker that a new version has before it is taken for a bad one."""


def decide(wish: Wish, nodes: Iterable[NodeSeen], load: Load, now: float, memory: Memory) -> Decision:
    """One round. ``now``: seconds of any clock that does not go back."""
    return _Round(wish, nodes, now, memory).decide(load)


class _Round:
    def __init__(self, wish: Wish, nodes: Iterable[NodeSeen], now: float, memory: Memory) -> None:
        self.wish, self.now, self.memory = wish, now, memory
        self.current, self.next = wish.current, wish.next
        self.proven = memory.proven if memory.proven == wish.next else None
        self.number, self.failures = memory.number, dict(memory.failures)
        avoided = {node: until for node, (_times, until) in self.failures.items()}
        seen = {node.name: node for node in nodes}
        self.sight = Sight(seen, dict(memory.placed), avoided, wish.budget, wish.offers)
        self.events: list[Event] = []
        self.desired = 0
        self.waits = ""

    @property
    def placed(self) -> dict[str, Placement]:
        return self.sight.placed

    def decide(self, load: Load) -> Decision:
        self._see_nodes()
        self._judge()
        self._within_budget()
        number, wanted = desired(load, self.wish.scale, self.memory.wanted, self.now)
        self.desired = max(number, 1) if self.proven is not None else number
        blocked = self._add()
        self._remove(blocked)
        self._finish()
        if self.desired != self.memory.desired:
            found = f"load: {load.tokens} tokens in flight, of {load.requests} requests"
            self._say("scaled", f"replicas wanted: {self.desired} ({found})")
        if self.waits and self.waits != self.memory.waits:
            self._say("waits", self.waits)
        return self._decision(wanted)

    def _decision(self, wanted: Mapping[int, float]) -> Decision:
        memory = Memory(
            placed=dict(self.placed),
            number=self.number,
            wanted=wanted,
            failures=self.failures,
            proven=self.proven if self.next is not None else None,
            ready=frozenset(one.name for one in self.placed.values() if self.sight.is_ready(one)),
            nodes=frozenset(self.sight.nodes),
            desired=self.desired,
            waits=self.waits,
        )
        assigned = {
            name: tuple(one for one in self.placed.values() if one.node == name) for name in sorted(self.sight.nodes)
        }
        return Decision(assigned, self.current, self.next, self.desired, memory, tuple(self.events))

    def _say(self, kind: str, text: str, one: Placement | None = None, node: str = "") -> None:
        self.events.append(Event(kind, text, one.node if one else node, one.name if one else ""))

    # what has happened

    def _see_nodes(self) -> None:
        for name in sorted(set(self.sight.nodes) - self.memory.nodes):
            self._say("joined", f"node {name} is there", node=name)
        for name in sorted(self.memory.nodes - set(self.sight.nodes)):
            self._say("gone", f"node {name} says nothing any more", node=name)
        for one in [one for one in self.placed.values() if one.node not in self.sight.nodes]:
            del self.placed[one.name]
            self._say("lost", f"replica {one.name} was on {one.node}, which is gone", one)

    def _judge(self) -> None:
        """Which have failed, and which are ready."""
        for one in list(self.placed.values()):
            told = self.sight.told(one)
            if self.sight.is_ready(one):
                self._is_ready(one)
            if why := self._failed(one, told):
                del self.placed[one.name]
                self._say("failed", f"replica {one.name} (version {one.version}) on {one.node}: {why}", one)
                self._blame(one, why)

    def _is_ready(self, one: Placement) -> None:
        self.placed[one.name] = replace(one, since=self.now)
        if one.version != self.next:
            self.failures.pop(one.node, None)
        elif self.proven is None:
            self.proven = self.next
            self._say("proven", f"version {self.next}: its first replica has passed and takes requests", one)
        if one.name not in self.memory.ready:
            self._say("ready", f"replica {one.name} (version {one.version}) on {one.node} takes requests", one)

    def _failed(self, one: Placement, told: Told | None) -> str:
        """Why a replica is given up; empty where it is not."""
        if told is not None and told.state in ("failed", "ended"):
            return told.why or "it has ended"
        if told is not None and one.version == self.next and told.restarts >= _CRASHES:
            return f"its worker was started again {told.restarts} times"
        if self.now - one.since > self.wish.start_s:
            return f"not ready for {self.wish.start_s:g} s" + (f": {told.why}" if told and told.why else "")
        return ""

    def _blame(self, one: Placement, why: str) -> None:
        if one.version == self.next:
            self._say("rolled back", f"version {self.next} is given up, version {self.current} stays: {why}", one)
            self.next = self.proven = None
            return
        times, _until = self.failures.get(one.node, (0, 0.0))
        until = self.now + _AVOID_S[min(times, len(_AVOID_S) - 1)]
        self.failures[one.node] = times + 1, until
        self.sight.avoided = {**self.sight.avoided, one.node: until}

    def _within_budget(self) -> None:
        """Where prices have risen: the dearest nodes are given up."""
        while not self._affordable() and (node := self.sight.dearest()) is not None:
            for one in [one for one in self.placed.values() if one.node == node]:
                self._drop(one, f"node {node} is beyond the budget of ${self.wish.budget:g}/h")

    def _affordable(self) -> bool:
        """By what is wanted; what drains is paid until it has ended."""
        only = Sight(self._without_told(), self.placed, budget=self.wish.budget)
        return only.within_budget()

    def _without_told(self) -> dict[str, NodeSeen]:
        return {name: replace(node, replicas=()) for name, node in self.sight.nodes.items()}

    # what is to happen

    @property
    def _goal(self) -> int:
        """The version that is to stay."""
        return self.next if self.next is not None and self.proven is not None else self.current

    def _on_goal(self) -> list[Placement]:
        nodes = self.sight.nodes
        return [one for one in self.placed.values() if one.version == self._goal and nodes[one.node].up]

    def _trial(self) -> bool:
        """Whether the new version has still to show itself."""
        return self.next is not None and self.proven is None

    def _stale(self) -> list[Placement]:
        """Those that another one is to replace: of another version, or on a node that takes its leave."""
        keep = {one.name for one in self._on_goal()}
        on_trial = self.next if self._trial() else None
        return [one for one in self.placed.values() if one.name not in keep and one.version != on_trial]

    def _limit(self) -> int:
        """How many may live in this round."""
        updating = self.next is not None or any(one.version != self._goal for one in self.placed.values())
        return min(self.wish.scale.max, self.desired + 1) if updating else self.wish.scale.max

    def _add(self) -> bool:
        """Whether the update's next step had no place. A trial comes before all but those that must be."""
        if not self._trial():
            return not self._fill(self.desired)
        blocked = False
        if not any(one.version == self.next for one in self.placed.values()):
            self._fill(self.wish.floor)
            assert self.next is not None
            blocked = not self._start(self.next, anywhere=True)
        if not blocked:
            self._fill(self.desired)
        return blocked

    def _fill(self, number: int) -> bool:
        """Whether there are so many of the version that stays."""
        while len(self._on_goal()) < number:
            if not self._start(self._goal):
                return False
        return True

    def _start(self, version: int, *, anywhere: bool = False) -> bool:
        """Whether there was a place for it."""
        if self.sight.live() >= self._limit():
            return False
        one = self.sight.place_for(version, self.number + 1, self.now, anywhere=anywhere)
        if one is None:
            self.waits = self._why_no_place(version)
            return False
        self.number = int(one.name[1:])
        self.placed[one.name] = one
        self._say("started", f"replica {one.name} (version {version}) is wanted on {one.node}", one)
        return True

    def _why_no_place(self, version: int) -> str:
        sight = self.sight
        nodes = {node for number in sight.numbers(version, self.number + 1) for node in sight.free(version, number)}
        if not nodes:
            return f"no node has room for another replica of version {version}"
        if not any(sight.within_budget(node) for node in nodes):
            return f"another replica would cost more than ${self.wish.budget:g}/h"
        return "the nodes with room are left alone for some seconds, because a replica has failed there"

    def _remove(self, blocked: bool) -> None:
        sight, stale = self.sight, self._stale()
        for one in stale:
            if not sight.is_ready(one):
                self._drop(one, "another one takes its place")
        self._reduce(lambda: len(self._on_goal()) - self.desired, self._on_goal, "fewer are wanted")
        self._reduce(lambda: len(self.placed) - self.wish.scale.max, self._any_stale_first, "there are more than max")
        self._reduce(lambda: min(len(self._stale()), sight.ready() - self.desired), self._stale, "it is replaced")
        victims = self._on_goal() if self._trial() else self._stale()
        if blocked and victims and not sight.draining():
            self._make_room(victims)

    def _make_room(self, victims: list[Placement]) -> None:
        """One old less, so that one new has its place; none where even an empty node has none."""
        version = self.next if self.next is not None else self.current
        if not any(node.up and self.sight.room(node, version) for node in self.sight.nodes.values()):
            self.waits = self._why_no_place(version)
            return
        one = min(victims, key=self._worth)
        ready = self.sight.ready() - self.sight.is_ready(one)
        left = len(victims) - 1 if self._trial() else ready
        if left >= self.wish.floor and (ready >= self.wish.floor or not self.sight.is_ready(one)):
            self._drop(one, "it makes room for the new version")
        elif not self.waits:
            self.waits = "the update needs a place: replicas.max or max_unavailable must be one more"

    def _any_stale_first(self) -> list[Placement]:
        return self._stale() or list(self.placed.values())

    def _reduce(self, excess: Callable[[], int], victims: Callable[[], list[Placement]], why: str) -> None:
        """Drops the least worth while there are too many; one that takes requests only above the floor."""
        while excess() > 0 and (found := victims()):
            one = min(found, key=self._worth)
            if self.sight.is_ready(one) and self.sight.ready() - 1 < self.wish.floor:
                return
            self._drop(one, why)

    def _worth(self, one: Placement) -> tuple[bool, float, int]:
        """The least is dropped first: what is not ready, then what is dear, then what came last."""
        node = self.sight.nodes[one.node]
        price = (node.price_per_hour or 0.0) / max(1, self.sight.room(node, one.version))
        return self.sight.is_ready(one), -price, -int(one.name[1:])

    def _drop(self, one: Placement, why: str) -> None:
        del self.placed[one.name]
        self._say("drained", f"replica {one.name} (version {one.version}) on {one.node} is drained: {why}", one)

    def _finish(self) -> None:
        """The update is over when nothing of another version is left and the new one takes requests."""
        if self.next is None or self.proven is None:
            return
        if all(one.version == self.next for one in self.placed.values()) and self.sight.ready():
            self._say("updated", f"version {self.next} has taken the place of version {self.current}")
            self.current, self.next, self.proven = self.next, None, None
