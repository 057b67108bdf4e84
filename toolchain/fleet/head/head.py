"""The head of an endpoint: it runs the controller, tells the nodes what is wanted and the front where requests go.

It stands beside the gateway, in a thread. What it has decided lies on the board, so that a new head goes on where the
last one stopped. While the board cannot be reached, everything goes on as it was.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from toolchain.errors import EndpointError, RecipeError, ScalellmError
from toolchain.fleet.board import Board
from toolchain.fleet.control.decisions import decide
from toolchain.fleet.control.pricing import priced
from toolchain.fleet.control.rounds import Decision, Event, Memory, Wish
from toolchain.fleet.control.scaling import Scale
from toolchain.fleet.control.seats import Offers, Seat, offers_of
from toolchain.fleet.control.sight import NodeSeen, Placement, Sight
from toolchain.fleet.deployment import MOST
from toolchain.fleet.front.meter import Meter
from toolchain.fleet.front.traffic import Course, Lane, Traffic
from toolchain.fleet.node.agent import TTL_S
from toolchain.progress import Progress

ROUND_S = 0.25
EVENTS = "events.jsonl"
_ANSWER_S = 600.0
"""How long an answer stays on the board."""

Version = Mapping[str, Any]
"""What a node must know to run it, and its ``version``, a number; one of the board's ``spec``."""


@dataclass(frozen=True)
class Surroundings:
    """What a head works with."""

    board: Board
    traffic: Traffic
    open_lane: Callable[[Version], Lane]
    """Raises ScalellmError for a version that cannot be put before clients."""
    events: Path
    progress: Progress
    meter: Meter | None = None
    asks: Board | None = None
    """Where operators ask, if not on the board that the nodes share."""


class Head:
    """``run`` in a thread of its own. ``asked`` is set when somebody asks for the end through the board."""

    def __init__(self, spec: Mapping[str, Any], around: Surroundings) -> None:
        """``spec``: the endpoint as wanted, with one version at least; see ``versions.first_spec``."""
        self.asked = threading.Event()
        self._spec = dict(spec)
        self._around = around
        self._lanes = {int(one["version"]): around.open_lane(one) for one in spec["versions"]}
        lane = self._lanes[int(spec["current"])]
        around.traffic.course = Course({lane.name: lane}, lane.name, coming=True, start_s=float(spec["start_seconds"]))
        self.nodes: Mapping[str, Mapping[str, Any]] = {}
        """As they told of themselves last, by the board's keys."""
        self._memory: Memory | None = None
        self._given: dict[str, dict[str, Seat]] = {}
        """Node -> replicas that it was given and that may still answer, and their places there."""
        self._begun_s = time.monotonic()
        self._begun = False
        """Whether a replica was ready at any time."""
        self._reached = True
        self.failure: Exception | None = None
        """Why it has ended by itself."""

    @property
    def spec(self) -> Mapping[str, Any]:
        """As it is wanted just now."""
        return self._spec

    def run(self, until: threading.Event) -> None:
        """Rounds until ``until`` is set."""
        while not until.is_set():
            try:
                self.round()
                self._found()
            except EndpointError as error:
                self._lost(error)
            except Exception as error:
                self.failure = error
                self.asked.set()
                return
            until.wait(ROUND_S)

    def round(self) -> Decision | None:
        """One look at the board, one decision; None while the nodes of an earlier head may still be heard of. Raises
        EndpointError where the board cannot be reached.
        """
        board = self._around.board
        asks = self._around.asks or board
        for key, ask in asks.read("asks/").items():
            self._answer(asks, key, ask)
        nodes = self.nodes = priced(board.read("nodes/"), self._spec["prices"])
        if self._around.meter is not None:
            self._around.meter.tick(nodes, self._given)
        memory = self._remembered(nodes)
        if memory is None:
            return None
        seen = list(_seen(nodes))
        load = self._around.traffic.load()
        if not self._begun:  # nobody can have asked
            load = replace(load, idle_s=0.0)
        found = decide(self._wish(), seen, load, time.monotonic(), memory)
        self._memory = found.memory
        self._begun = self._begun or bool(found.memory.ready)
        if self._spec["next"] is not None and found.next is None and found.current == self._spec["current"]:
            self._return()
        self._spec |= {"current": found.current, "next": found.next, "desired": found.desired}
        self._write(found.events)
        self._forget(found, seen)
        self._steer(found)
        self._tell(found)
        return found

    def end(self, timeout_s: float) -> None:
        """Nothing is wanted of any node any more; returns when nothing runs there, or the time is up. Raises
        EndpointError where the board cannot be reached.
        """
        board, until = self._around.board, time.monotonic() + timeout_s
        for key in board.read("assigned/"):
            board.put(key, {"replicas": []})
        while any(told["replicas"] for told in board.read("nodes/").values()) and time.monotonic() < until:
            time.sleep(ROUND_S)

    def room(self) -> int:
        """How many replicas of the present version the nodes would hold that are there."""
        offers = self._offers().get(int(self._spec["current"]), ())
        return sum(node.machine.room(offers) for node in _seen(self.nodes) if node.up)

    def cost_per_hour(self) -> float:
        """US dollars, of the nodes that run a replica, each once; those count nothing whose price nobody knows."""
        return Sight({node.name: node for node in _seen(self.nodes)}, {}).cost()

    # what is wanted

    def _offers(self) -> dict[int, Offers]:
        return {int(one["version"]): offers_of(one) for one in self._spec["versions"]}

    def _wish(self) -> Wish:
        spec = self._spec
        least, most, unavailable = spec["min"], spec["max"], spec["max_unavailable"]
        return Wish(
            Scale(least, most, spec["target_tokens_in_flight"], spec["idle_seconds"]),
            current=spec["current"],
            next=spec["next"],
            max_unavailable=int(least == most) if unavailable is None else unavailable,
            start_s=spec["start_seconds"],
            budget=spec["max_price_per_hour"],
            offers=self._offers(),
        )

    def _remembered(self, nodes: Mapping[str, Any]) -> Memory | None:
        """Of the last round; of an earlier head, what it had assigned, once its nodes have had time to be seen."""
        if self._memory is not None:
            return self._memory
        assigned = self._around.board.read("assigned/")
        now = time.monotonic()
        placed = [
            Placement(one["name"], key.removeprefix("assigned/"), int(one["version"]), now, Seat.read(one))
            for key, wanted in assigned.items()
            for one in wanted["replicas"]
        ]
        missing = {f"nodes/{one.node}" for one in placed} - nodes.keys()
        return None if missing and now - self._begun_s < TTL_S else Memory.restored(placed, now)

    def _forget(self, found: Decision, seen: Iterable[NodeSeen]) -> None:
        """Versions that are not wanted, and of which nothing runs; names of replicas that have ended."""
        known = {found.current, found.next} | {told.version for node in seen for told in node.replicas}
        known |= {one.version for one in found.memory.placed.values()}
        self._spec["versions"] = [one for one in self._spec["versions"] if one["version"] in known]
        self._lanes = {version: lane for version, lane in self._lanes.items() if version in known}
        for node in seen:
            told = {one.name for one in node.replicas}
            wanted = {one.name: one.seat for one in found.assigned[node.name]}
            before = self._given.get(node.name, {})
            self._given[node.name] = {name: seat for name, seat in before.items() if name in told} | wanted

    # what is told

    def _steer(self, found: Decision) -> None:
        """New requests go to the lane of the version that is to stay, once it takes as many as any other."""
        placed = found.memory.placed
        versions = [placed[name].version for name in found.memory.ready]
        ready = Counter(self._lanes[version].name for version in versions if version in self._lanes)
        coming = len(found.memory.ready) < len(placed)
        stays = found.next if found.next is not None and found.memory.proven else found.current
        lane = self._lanes[stays]
        target = max(ready, key=lambda name: (ready[name], name == lane.name), default=lane.name)
        lanes = {one.name: one for one in self._lanes.values()}
        lanes[lane.name] = lane  # of two versions that share it, the one that is to stay
        asleep = not placed and found.desired == 0
        start_s, queue = float(self._spec["start_seconds"]), self._spec.get("max_queue")
        self._around.traffic.course = Course(lanes, target, found.desired, coming, asleep, start_s, queue)

    def _tell(self, found: Decision) -> None:
        """The nodes, by way of the board: what is new there, or has been lost."""
        board = self._around.board
        wanted = {
            f"assigned/{node}": {
                "replicas": [{"name": one.name, "version": one.version, **one.seat.told()} for one in placed]
            }
            for node, placed in found.assigned.items()
        }
        there = {**board.read("assigned/"), **board.read("spec")}
        for key in there.keys() - {"spec"}:
            wanted.setdefault(key, {"replicas": []})  # of a node that is away: when it is back, it begins anew
        for key, value in {**wanted, "spec": self._spec}.items():
            if there.get(key) != json.loads(json.dumps(value)):
                board.put(key, value)

    def _write(self, events: Iterable[Event]) -> None:
        lines = [json.dumps({"time": round(time.time(), 3), **vars(event)}) for event in events]
        if lines:
            with self._around.events.open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))

    # what is asked

    def _answer(self, asks: Board, key: str, ask: Mapping[str, Any]) -> None:
        try:
            answer = {"error": "", **self._take(ask)}
        except ScalellmError as error:
            answer = {"error": error.message, "hint": error.hint, "code": error.exit_code}
        except (KeyError, TypeError, ValueError) as error:
            answer = {"error": f"this was asked by another scalellm: {error!r}", "hint": "", "code": 2}
        asks.put(key.replace("asks/", "answers/", 1), answer, ttl_s=_ANSWER_S)
        asks.remove(key)

    def _take(self, ask: Mapping[str, Any]) -> dict[str, Any]:
        what = ask.get("ask")
        if what == "scale":
            return self._scale(ask)
        if what == "update":
            return self._update(ask)
        if what == "cancel":
            return self._cancel()
        if what == "down":
            self.asked.set()
            return {}
        raise RecipeError(f"{what}: not something that this endpoint can be asked")

    def _scale(self, ask: Mapping[str, Any]) -> dict[str, Any]:
        least, most = (self._spec[name] if ask.get(name) is None else int(ask[name]) for name in ("min", "max"))
        if ask.get("max") is None and ask.get("min") is not None:
            most = max(most, least)
        if not (0 <= least <= most and 1 <= most <= MOST):
            raise RecipeError(f"min {least}, max {most}: wanted is 0 <= min <= max, and max from 1 to {MOST}")
        self._spec |= {"min": least, "max": most}
        if before := self._spec.get("before"):  # what a person has scaled stays, whatever becomes of the update
            self._spec["before"] = {**before, "min": least, "max": most}
        self._write([Event("asked", f"min {least}, max {most}")])
        return {"min": least, "max": most}

    def _update(self, ask: Mapping[str, Any]) -> dict[str, Any]:
        if self._spec["next"] is not None:
            raise RecipeError(
                f"version {self._spec['next']} is being rolled out; one at a time",
                hint=f"scalellm deploy update {self._spec['endpoint']} --cancel   # or wait: scalellm deploy status",
            )
        number = int(self._spec["last"]) + 1
        version = {**ask["version"], "version": number}
        self._lanes[number] = self._around.open_lane(version)
        before = {name: self._spec[name] for name in ask["scaling"] if name in self._spec}
        self._spec |= {**ask["scaling"], "next": number, "last": number, "before": before}
        self._spec["versions"] = [*self._spec["versions"], version]
        self._write([Event("update", f"version {number} is to replace version {self._spec['current']}")])
        return {"version": number}

    def _cancel(self) -> dict[str, Any]:
        """The version before stays; what runs of the new one goes, by the steps of a bad one."""
        given_up, stays = self._spec["next"], self._spec["current"]
        if given_up is None:
            raise RecipeError(f"no update of {self._spec['endpoint']} is at work", hint="scalellm deploy status")
        self._return()
        self._write([Event("rolled back", f"version {given_up} is given up, version {stays} stays: it was cancelled")])
        return {"version": stays, "given_up": given_up}

    def _return(self) -> None:
        """To the version before an update, and to its numbers."""
        self._spec |= {**(self._spec.get("before") or {}), "before": None, "next": None}

    # whether it is reached

    def _lost(self, error: EndpointError) -> None:
        if self._reached:
            self._around.progress.note(f"{error.message}; what runs goes on")
        self._reached = False

    def _found(self) -> None:
        if not self._reached:
            self._around.progress.note("the endpoint's board is reached again")
        self._reached = True


def _seen(nodes: Mapping[str, Mapping[str, Any]]) -> Iterator[NodeSeen]:
    """What the nodes say of themselves; one that says nonsense is not seen."""
    for key, told in nodes.items():
        with contextlib.suppress(KeyError, TypeError, ValueError):
            yield NodeSeen.of(key.removeprefix("nodes/"), told)
