"""The controller's promises, over any order of events that hypothesis thinks of, and its steps one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.fleet.control.decisions import decide
from toolchain.fleet.control.rounds import Decision, Event, Memory, Wish
from toolchain.fleet.control.scaling import Load, Scale
from toolchain.fleet.control.seats import Machine, Offers, Seat, Share
from toolchain.fleet.control.sight import NodeSeen, Told

BAD = 100
"""Versions from here on never become ready."""
NODES = {"a": (0.2, 2), "b": (0.3, 1), "c": (0.9, 3)}
"""Price per hour, room."""
GPUS = {"a": 1, "b": 2, "c": 3}
ONE, TWO, THREE, PAIR = Share(1, 1), Share(1, 2), Share(1, 3), Share(2, 1)


def wish(least: int = 1, most: int = 4, **changes: Any) -> Wish:
    return replace(Wish(Scale(least, most, 100, 30.0), current=1, start_s=60.0), **changes)


@dataclass
class World:
    """Nodes that do as they are told, one step a second."""

    wish: Wish = field(default_factory=wish)
    nodes: dict[str, tuple[float, int]] = field(default_factory=lambda: dict(NODES))
    load: Load = field(default_factory=lambda: Load(idle_s=1000.0))
    memory: Memory = field(default_factory=Memory)
    now: float = 1000.0
    machines: dict[str, Machine] = field(default_factory=dict)
    """Where a node is more than its room."""
    replicas: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict)
    """(node, name) -> version and state."""
    seats: dict[tuple[str, str], Seat] = field(default_factory=dict)
    away: set[str] = field(default_factory=set)
    """Nodes that cannot be reached; their replicas go on."""
    leaving: set[str] = field(default_factory=set)
    events: list[Event] = field(default_factory=list)
    checks: list[Callable[[World, Decision], None]] = field(default_factory=list)

    def seen(self) -> list[NodeSeen]:
        return [
            NodeSeen(name, self.machine(name, room), price, name not in self.leaving, self.told(name))
            for name, (price, room) in self.nodes.items()
            if name not in self.away
        ]

    def machine(self, name: str, room: int) -> Machine:
        return self.machines.get(name, Machine(limit=room))

    def told(self, node: str) -> tuple[Told, ...]:
        return tuple(
            Told(name, *state, seat=self.seats[where, name])
            for (where, name), state in self.replicas.items()
            if where == node
        )

    def ready(self) -> int:
        return len([1 for (node, _), (_, state) in self.replicas.items() if node not in self.away and state == "ready"])

    def decide(self) -> Decision:
        """One round of the controller, and its nodes hear of it."""
        found = decide(self.wish, self.seen(), self.load, self.now, self.memory)
        for check in self.checks:
            check(self, found)
        self.memory, self.events = found.memory, [*self.events, *found.events]
        self.wish = replace(self.wish, current=found.current, next=found.next)
        for node, placements in found.assigned.items():
            names = {one.name: one.version for one in placements}
            self.seats |= {(node, one.name): one.seat for one in placements}
            for key in [key for key in self.replicas if key[0] == node and key[1] not in names]:
                version, state = self.replicas[key]
                self.replicas[key] = version, "ended" if state == "failed" else "draining"
            for name, version in names.items():
                self.replicas.setdefault((node, name), (version, "starting"))
        return found

    def step(self, seconds: float = 1.0) -> Decision:
        """What starts is ready, or has failed; what drains has ended; then a round."""
        self.now += seconds
        for key, (version, state) in list(self.replicas.items()):
            if key[0] in self.leaving or state in ("draining", "ended"):
                del self.replicas[key]
            elif state == "starting":
                self.replicas[key] = version, "failed" if version >= BAD else "ready"
        self.replicas = {key: one for key, one in self.replicas.items() if one[1] != "ended"}
        return self.decide()

    def settle(self, rounds: int = 12) -> Decision:
        for _ in range(rounds):
            found = self.step()
        return found

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def running(self) -> list[tuple[str, int]]:
        return sorted((node, version) for (node, _), (version, state) in self.replicas.items() if state == "ready")


# one by one


def test_the_first_goes_to_the_cheapest_node_and_the_second_elsewhere() -> None:
    world = World(wish(2))
    world.settle()
    assert world.running() == [("a", 1), ("b", 1)]
    world.wish = wish(4)
    world.settle()
    assert world.running() == [("a", 1), ("a", 1), ("b", 1), ("c", 1)]


def test_what_is_lost_with_its_node_is_replaced_and_ended_when_it_comes_back() -> None:
    world = World(wish(2))
    world.settle()
    world.away.add("a")
    world.settle()
    assert world.ready() == 2
    assert "lost" in world.kinds()
    world.away.clear()
    world.settle()
    assert world.ready() == 2
    assert len(world.replicas) == 2


def test_a_node_that_takes_its_leave_is_replaced() -> None:
    world = World(wish(2))
    world.settle()
    world.leaving.add("b")
    world.settle()
    assert world.running() == [("a", 1), ("c", 1)]


def test_load_adds_replicas_at_once_and_takes_them_back_after_the_idle_time() -> None:
    world = World(wish(1, 4))
    world.settle()
    world.load = Load(tokens=290, idle_s=0)
    world.settle(3)
    assert world.ready() == 3
    world.load = Load(tokens=10, idle_s=0)
    world.settle(25)
    assert world.ready() == 3
    world.load = Load(tokens=290, idle_s=0)
    world.settle(25)
    world.load = Load(tokens=10, idle_s=0)
    world.settle(28)
    assert world.ready() == 3, "counted from the last time that they were needed"
    world.settle(5)
    assert world.ready() == 1
    assert world.kinds().count("scaled") == 3


def test_a_little_more_than_the_target_adds_none() -> None:
    world = World(wish(1, 4))
    world.load = Load(tokens=200, idle_s=0)
    world.settle()
    world.load = Load(tokens=219, idle_s=0)
    assert world.settle().desired == 2
    world.load = Load(tokens=221, idle_s=0)
    assert world.settle().desired == 3


def test_requests_that_wait_for_a_place_add_replicas_however_short_they_are() -> None:
    world = World(wish(1, 4), load=Load(tokens=10, idle_s=0, requests=8, room=8))
    world.settle()
    assert world.ready() == 1
    world.load = replace(world.load, requests=9)
    world.settle()
    assert world.ready() == 2, "for eight there is room, and one waits"
    world.load = replace(world.load, requests=33)
    world.settle()
    assert world.ready() == 4
    world.load = replace(world.load, tokens=350, requests=8)
    world.settle(40)
    assert world.ready() == 4, "their tokens want four"


def test_idle_replicas_all_go_and_a_waiting_request_brings_one_back() -> None:
    world = World(wish(0, 3), load=Load(tokens=5, idle_s=0))
    world.settle()
    assert world.ready() == 1
    for second in range(40):
        world.load = Load(idle_s=second)
        world.step()
    assert world.replicas == {}
    world.load = Load(tokens=7, waiting=1, idle_s=0)
    world.settle(3)
    assert world.ready() == 1


def test_nothing_is_started_beyond_the_budget() -> None:
    world = World(wish(4, 4, budget=0.55))
    world.settle()
    assert world.running() == [("a", 1), ("a", 1), ("b", 1)]
    assert any("cost more" in event.text for event in world.events if event.kind == "waits")
    world.nodes["b"] = (0.4, 1)
    world.settle()
    assert world.running() == [("a", 1), ("a", 1)], "money comes before the number"


def test_a_node_without_a_price_is_not_used_where_there_is_a_budget() -> None:
    seen = [NodeSeen("a", Machine(limit=4), None)]
    found = decide(wish(1, budget=5.0), seen, Load(), 0.0, Memory())
    assert found.assigned["a"] == ()
    assert decide(wish(1), seen, Load(), 0.0, Memory()).assigned["a"]


def test_an_update_tries_one_first_then_one_more_for_each_one_less() -> None:
    world = World(wish(2, 4))
    world.settle()
    world.wish = replace(world.wish, next=2)
    history = []
    for _ in range(12):
        world.step()
        versions = [version for version, state in world.replicas.values() if state in ("ready", "starting")]
        history.append((versions.count(1), versions.count(2)))
    assert list(dict.fromkeys(history)) == [(2, 1), (1, 1), (1, 2), (0, 2)]
    assert (world.wish.current, world.wish.next) == (2, None)


def test_at_max_an_update_takes_one_down_first() -> None:
    world = World(wish(2, 2, max_unavailable=1), nodes={"a": (0.1, 4)})
    world.settle()
    world.wish = replace(world.wish, next=2)
    least = min(world.step() and world.ready() for _ in range(14))
    assert least == 1
    assert world.running() == [("a", 2), ("a", 2)]


def test_a_trial_that_has_its_place_takes_no_other() -> None:
    world = World(wish(0, 2), load=Load(tokens=150, idle_s=0))
    world.settle()
    world.wish = replace(world.wish, next=2)
    least = min(world.step() and world.ready() for _ in range(14))
    assert least == 1
    assert [version for _, version in world.running()] == [2, 2]


def test_an_update_that_may_not_take_one_down_waits_and_says_why() -> None:
    world = World(wish(2, 2))
    world.settle()
    world.wish = replace(world.wish, next=2)
    world.settle()
    assert world.running() == [("a", 1), ("b", 1)]
    assert any("max_unavailable" in event.text for event in world.events if event.kind == "waits")


def test_a_bad_version_is_given_up_and_the_good_one_stays() -> None:
    world = World(wish(2, 4))
    world.settle()
    world.wish = replace(world.wish, next=BAD)
    least = min(world.step() and world.ready() for _ in range(12))
    assert least == 2
    assert (world.wish.current, world.wish.next) == (1, None)
    assert [version for version, _ in world.replicas.values()] == [1, 1]
    assert world.kinds().count("rolled back") == 1


def test_a_bad_version_at_max_of_one_is_given_up_and_the_good_one_comes_back() -> None:
    world = World(wish(1, 1, max_unavailable=1))
    world.settle()
    world.wish = replace(world.wish, next=BAD)
    world.settle()
    assert world.running() == [("a", 1)]


@pytest.mark.parametrize(
    ("state", "restarts", "said"), [("starting", 0, "not ready for 60 s"), ("down", 3, "started again 3 times")]
)
def test_a_new_version_that_is_late_or_crashes_is_given_up(state: str, restarts: int, said: str) -> None:
    first = decide(wish(0, 2, next=2), [NodeSeen("a", Machine(limit=2))], Load(), 0.0, Memory())
    (one,) = first.assigned["a"]
    seen = [NodeSeen("a", Machine(limit=2), replicas=(Told(one.name, 2, state, restarts=restarts, seat=one.seat),))]
    found = decide(wish(0, 2, next=2), seen, Load(), 59.0 if restarts else 61.0, first.memory)
    assert found.next is None
    assert any(said in event.text for event in found.events if event.kind == "rolled back")


def test_a_version_that_fails_after_its_trial_is_given_up_too() -> None:
    world = World(wish(3, 4))
    world.settle()
    world.wish = replace(world.wish, next=2)
    while [version for _, version in world.running()].count(2) < 2:
        world.step()
    key = next(key for key, (version, state) in world.replicas.items() if (version, state) == (2, "ready"))
    world.replicas[key] = (2, "failed")
    least = min(world.step() and world.ready() for _ in range(12))
    assert least >= 2
    assert [version for _, version in world.running()] == [1, 1, 1]


@pytest.mark.parametrize("rounds", range(1, 6))
def test_an_update_that_is_cancelled_at_any_step_is_rolled_back(rounds: int) -> None:
    world = World(wish(3, 4))
    world.settle()
    world.wish = replace(world.wish, next=2)
    for _ in range(rounds):
        world.step()
    assert world.wish.next == 2, "it is not over"
    world.wish = replace(world.wish, next=None)
    least = min(world.step() and world.ready() for _ in range(14))
    assert least == 3
    assert [version for _, version in world.running()] == [1, 1, 1]
    assert [version for version, _ in world.replicas.values()] == [1, 1, 1]


def test_an_update_that_waits_for_a_place_leaves_nothing_when_it_is_cancelled() -> None:
    world = World(wish(2, 2))
    world.settle()
    before = dict(world.replicas)
    world.wish = replace(world.wish, next=2)
    world.settle()
    assert world.memory.waits
    world.wish = replace(world.wish, next=None)
    world.settle()
    assert (world.replicas, world.memory.waits) == (before, "")


def test_with_none_running_an_update_still_tries_the_new_version() -> None:
    world = World(wish(0, 2), load=Load(idle_s=1000))
    world.settle()
    world.wish = replace(world.wish, next=2)
    world.settle()
    assert (world.wish.current, world.wish.next) == (2, None)
    assert world.replicas == {}


def test_a_node_on_which_something_failed_is_left_alone_for_longer_each_time() -> None:
    world = World(wish(1, 1, current=BAD), nodes={"a": (0.1, 1)})
    started = []
    for second in range(60):
        if any(event.kind == "started" for event in world.step().events):
            started.append(second)
    gaps = [after - before for before, after in pairwise(started)]
    assert gaps == sorted(gaps)
    assert gaps[-1] >= 10


def test_after_a_restart_the_controller_goes_on_with_what_runs() -> None:
    world = World(wish(1, 4), load=Load(tokens=290, idle_s=0))
    world.settle()
    before = dict(world.replicas)
    world.memory = Memory.restored(world.memory.placed.values(), world.now)
    world.load = Load(idle_s=0)
    world.settle(20)
    assert world.replicas == before


# over any order of events

Act = tuple[str, Any]
ACTS = st.one_of(
    st.tuples(st.just("step"), st.sampled_from([0.5, 1.0, 7.0, 40.0])),
    st.tuples(st.just("round"), st.none()),
    st.tuples(st.just("load"), st.tuples(st.integers(0, 700), st.integers(0, 3))),
    st.tuples(st.just("away"), st.sampled_from(sorted(NODES))),
    st.tuples(st.just("back"), st.sampled_from(sorted(NODES))),
    st.tuples(st.just("leave"), st.sampled_from(sorted(NODES))),
    st.tuples(st.just("fail"), st.integers(0, 5)),
    st.tuples(st.just("down"), st.integers(0, 5)),
    st.tuples(st.just("update"), st.booleans()),
    st.tuples(st.just("cancel"), st.none()),
    st.tuples(st.just("scale"), st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 1))),
)


def play(world: World, act: Act, version: Iterator[int]) -> None:
    what, value = act
    if what == "step":
        world.step(value)
    elif what == "round":
        world.decide()
    elif what == "load":
        world.load = Load(value[0], value[1], 0.0 if any(value) else 3.0)
    elif what in ("away", "leave"):
        {"away": world.away, "leave": world.leaving}[what].add(value)
    elif what == "back":
        world.away.discard(value)
        world.leaving.discard(value)
    elif what in ("fail", "down") and world.replicas:
        key = sorted(world.replicas)[value % len(world.replicas)]
        if world.replicas[key][1] in ("starting", "ready", "down"):
            world.replicas[key] = (world.replicas[key][0], {"fail": "failed", "down": "down"}[what])
    elif what in ("update", "cancel"):
        world.wish = replace(world.wish, next=None if what == "cancel" else next(version) + (0 if value else BAD))
    elif what == "scale":
        least, more, unavailable = value
        scale = replace(world.wish.scale, min=least, max=max(1, least + more))
        world.wish = replace(world.wish, scale=scale, max_unavailable=unavailable)


def promises(world: World, found: Decision) -> None:
    """Of one round, before the nodes hear of it."""
    placed = {(one.node, one.name): one for ones in found.assigned.values() for one in ones}
    added = [key for key in placed if key not in world.replicas]
    seen = {
        key: state
        for key, (_, state) in world.replicas.items()
        if key[0] not in world.away and state not in ("failed", "ended")
    }
    live = set(seen) | set(added)
    if added:
        assert len(live) <= world.wish.scale.max
        assert sum(world.nodes[node][0] for node in {node for node, _ in live}) <= (world.wish.budget or 1e9)
        if found.next is not None:
            assert len(live) <= found.desired + 1
    before = [key for key, state in seen.items() if state == "ready" and key[1] in world.memory.placed]
    after = [key for key in before if key in placed]
    assert len(after) >= min(len(before), world.wish.floor)
    assert world.wish.scale.min <= found.desired <= world.wish.scale.max or found.next is not None
    for node, ones in found.assigned.items():
        assert len({one.name for one in ones} | {name for where, name in seen if where == node}) <= max(
            world.nodes[node][1], len([1 for where, _ in seen if where == node])
        )
        if any((node, one.name) in added for one in ones):
            seats = {key: world.seats[key] for key in seen} | {(node, one.name): one.seat for one in ones}
            parts: dict[int, Fraction] = {}
            for (where, _), seat in seats.items():
                for gpu in seat.gpus if where == node else ():
                    parts[gpu] = parts.get(gpu, Fraction()) + Fraction(1, seat.of)
            assert max(parts.values(), default=0) <= 1, "more of a GPU than there is"
            assert set(parts) <= set(range(world.machine(node, 0).gpus))
    for one in (one for ones in found.assigned.values() for one in ones if (one.node, one.name) in added):
        share = dict(world.wish.offers.get(one.version, ())).get("h100")
        assert share is None or not one.seat.gpus or (len(one.seat.gpus), one.seat.of) == (share.gpus, share.services)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(ACTS, max_size=40),
    st.sampled_from([None, 0.5, 1.2]),
    st.lists(st.sampled_from([Share(), ONE, TWO, THREE, PAIR]), min_size=1, max_size=3),
)
def test_whatever_happens_the_limits_hold_and_it_comes_to_rest(
    acts: list[Act], budget: float | None, shares: list[Share]
) -> None:
    """``shares``: of versions, in turn."""
    offers: dict[int, Offers] = {version: (("h100", shares[version % len(shares)]),) for version in range(1, 150)}
    world = World(wish(1, 4, budget=budget, max_unavailable=1, offers=offers), checks=[promises])
    world.machines = {name: Machine("h100", gpus, limit=NODES[name][1]) for name, gpus in GPUS.items()}
    versions = iter(range(2, 1000))
    for act in acts:
        play(world, act, versions)
    world.away.clear()
    world.leaving.clear()
    for _ in range(60):
        world.step(10.0)
    before, told = dict(world.replicas), len(world.events)
    for _ in range(10):
        last = world.step(10.0)
    assert world.replicas == before
    assert world.events[told:] == []
    if not last.memory.waits:
        assert last.next is None
        assert [state for _, state in world.replicas.values()] == ["ready"] * last.desired
        assert {version for version, _ in world.replicas.values()} <= {last.current}
