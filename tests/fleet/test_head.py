"""The head: what it writes on the board, where it sends requests, what operators may ask of it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from toolchain.errors import EndpointError, RecipeError, RejectedError
from toolchain.fleet.board import FolderBoard
from toolchain.fleet.deployment import Deployment, Replicas
from toolchain.fleet.front.meter import Meter
from toolchain.fleet.front.traffic import Course, Lane, Traffic
from toolchain.fleet.head import asking
from toolchain.fleet.head.head import Head, Surroundings
from toolchain.fleet.head.versions import first_spec, resumed
from toolchain.ledger.book import Ledger
from toolchain.ledger.totals import usages

SCALING = Deployment(endpoint="e", recipes=("r",), replicas=Replicas(min=2, max=3, max_unavailable=1)).scaling


class Scene:
    """A head, and a node that the test plays."""

    def __init__(self, folder: Path, **scaling: Any) -> None:
        self.board, self.traffic = FolderBoard(folder / "board"), Traffic()
        self.notes: list[str] = []
        self.around = Surroundings(self.board, self.traffic, self.lane, folder / "events.jsonl", self)  # type: ignore[arg-type]
        self.spec = first_spec("e", {"lane": "e-old"}, {**SCALING, **scaling})
        self.head = Head(self.spec, self.around)
        self.states: dict[str, str] = {}
        self.history: list[tuple[int, int, str]] = []
        """Of the first version, of the second, and where requests go."""

    def lane(self, version: Mapping[str, Any]) -> Lane:
        if version["lane"] == "none":
            raise RecipeError("no such lane")
        return Lane(version["lane"], None, 4)  # type: ignore[arg-type]

    def note(self, text: str) -> None:
        self.notes.append(text)

    def tell(self, name: str = "a", **changes: Any) -> None:
        """The node: what is assigned to it is as ``states`` say, by default ready."""
        wanted = self.board.read(f"assigned/{name}").get(f"assigned/{name}", {"replicas": []})["replicas"]
        replicas = [{**one, "state": self.states.get(one["name"], "ready"), "restarts": 0} for one in wanted]
        told = {"device": "x", "gpus": 1, "room": 8, "state": "up", "price_per_hour": 0.1, "replicas": replicas}
        self.board.put(f"nodes/{name}", {"node": name, "provider": "p", **told, **changes}, ttl_s=10)

    def rounds(self, count: int = 6) -> None:
        for _ in range(count):
            self.tell()
            self.head.round()
            versions = [version for _, version in self.assigned()]
            self.history.append((versions.count(1), versions.count(2), self.traffic.course.target))

    def assigned(self) -> list[tuple[str, int]]:
        return [(one["name"], one["version"]) for one in self.board.read("assigned/a")["assigned/a"]["replicas"]]

    def ask(self, **what: Any) -> dict[str, Any]:
        """As an operator's command does it, in another thread."""
        found: list[Any] = []

        def command() -> None:
            try:
                found.append(asking.ask(self.board, what, 20))
            except Exception as error:
                found.append(error)

        asks = threading.Thread(target=command)
        asks.start()
        while asks.is_alive():
            self.rounds(1)
            time.sleep(0.02)
        if isinstance(found[0], Exception):
            raise found[0]
        answer: dict[str, Any] = found[0]
        return answer

    def kinds(self) -> list[str]:
        return [json.loads(line)["kind"] for line in (self.around.events).read_text().splitlines()]


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_a_head_writes_what_is_wanted_and_opens_the_lane(scene: Scene) -> None:
    assert scene.traffic.course.target == "e-old", "also before its first round"
    scene.rounds()
    assert scene.assigned() == [("r1", 1), ("r2", 1)]
    course = scene.traffic.course
    assert (course.target, course.replicas, course.coming, course.asleep) == ("e-old", 2, False, False)
    spec = scene.board.read("spec")["spec"]
    assert {name: spec[name] for name in ("min", "max", "current", "next")} == {
        "min": 2,
        "max": 3,
        "current": 1,
        "next": None,
    }


def test_a_replicas_place_stands_beside_its_name_and_outlives_the_head(tmp_path: Path) -> None:
    scene = Scene(tmp_path, min=3, max=3)
    scene.spec["versions"][0]["shares"] = [{"device": "x", "gpus": 1, "services": 2}]
    told = {"gpus": 1, "room": None}
    for head in (Head(scene.spec, scene.around), Head(scene.spec, scene.around)):
        for _ in range(3):
            scene.tell(**told)
            head.round()
        assert scene.assigned() == [("r1", 1), ("r2", 1)]
        assert head.room() == 2
    (assigned,) = scene.board.read("assigned/").values()
    assert [(one["gpus"], one["of"]) for one in assigned["replicas"]] == [([0], 2), ([0], 2)]


def test_what_the_board_has_lost_is_written_again(scene: Scene) -> None:
    scene.rounds()
    scene.board.remove("spec")
    scene.board.remove("assigned/a")
    scene.head.round()
    assert scene.assigned() == [("r1", 1), ("r2", 1)]
    assert "spec" in scene.board.read("spec")


def test_a_new_head_goes_on_where_the_last_one_stopped(scene: Scene) -> None:
    scene.rounds()
    scene.board.remove("nodes/a")
    second = Head(scene.spec, scene.around)
    assert second.round() is None, "its nodes may still be heard of"
    scene.tell()
    second.round()
    assert scene.assigned() == [("r1", 1), ("r2", 1)]


def test_a_node_that_comes_back_finds_nothing_to_do(scene: Scene) -> None:
    scene.rounds()
    scene.board.remove("nodes/a")
    scene.head.round()
    assert scene.assigned() == []


def test_a_node_that_says_nonsense_is_not_seen(scene: Scene) -> None:
    scene.tell("b", price_per_hour=-5.0)
    scene.tell("c", room="many")
    scene.tell("d", replicas=[{"name": "r1"}])
    scene.rounds()
    assert list(scene.board.read("assigned/")) == ["assigned/a"]


def test_what_is_served_is_booked_to_the_node_that_was_given_the_replica(scene: Scene, tmp_path: Path) -> None:
    meter = Meter(Ledger.open(tmp_path / "ledger", "e"))
    scene.head = Head(scene.spec, replace(scene.around, meter=meter))
    scene.tell("thief", room=0, replicas=[{"name": "r1", "version": 1, "state": "ready"}])
    scene.rounds()
    meter.answer("r1", requests=1, tokens_out=5)
    meter.close()
    booked = {(one.node, one.replica): one.tokens_out for one in usages(tmp_path / "ledger")}
    assert booked["a", "r1"] == 5
    assert {node for node, _replica in booked} == {"a"}


def test_requests_go_to_the_new_version_once_it_takes_as_many(scene: Scene) -> None:
    scene.rounds()
    assert scene.ask(ask="update", version={"lane": "e-new"}, scaling=SCALING) == {"error": "", "version": 2}
    scene.rounds(12)
    assert (1, 1, "e-new") in scene.history
    assert all(target == "e-old" for old, new, target in scene.history if new < old)
    assert scene.history[-1] == (0, 2, "e-new")
    assert list(scene.traffic.course.lanes) == ["e-new"], "the old one is closed when nothing of it runs"
    assert [one["version"] for one in scene.board.read("spec")["spec"]["versions"]] == [2]


def test_of_two_updates_the_second_waits_for_its_turn(scene: Scene) -> None:
    scene.rounds()
    scene.states["r3"] = "starting"
    scene.ask(ask="update", version={"lane": "e-new"}, scaling=SCALING)
    with pytest.raises(RecipeError, match="one at a time"):
        scene.ask(ask="update", version={"lane": "e-newer"}, scaling=SCALING)
    scene.states["r3"] = "failed"
    scene.rounds()
    assert scene.assigned() == [("r1", 1), ("r2", 1)]
    seen = asking.events(scene.around.events, 0, lambda: False)
    with pytest.raises(RejectedError, match="version 2 is given up, version 1 stays"):
        asking.outcome(seen, lambda _event: None)


def test_an_update_that_waits_for_a_place_can_be_cancelled_and_takes_its_numbers_with_it(scene: Scene) -> None:
    scene.rounds()
    scene.ask(ask="update", version={"lane": "e-new"}, scaling={**SCALING, "min": 3, "max_unavailable": 0})
    scene.rounds()
    assert scene.assigned() == [("r1", 1), ("r2", 1), ("r3", 1)], "the surge took the place"
    assert scene.head.spec["next"] == 2
    assert "waits" in scene.kinds()
    scene.ask(ask="scale", min=2, max=2)
    assert scene.ask(ask="cancel") == {"error": "", "version": 1, "given_up": 2}
    scene.rounds(12)
    spec = scene.board.read("spec")["spec"]
    assert {name: spec[name] for name in ("current", "next", "min", "max", "max_unavailable")} == {
        "current": 1,
        "next": None,
        "min": 2,
        "max": 2,
        "max_unavailable": 1,
    }
    assert [one["version"] for one in spec["versions"]] == [1]
    with pytest.raises(RejectedError, match="version 2 is given up, version 1 stays: it was cancelled"):
        asking.outcome(asking.events(scene.around.events, 0, lambda: False), lambda _event: None)


def test_in_the_middle_of_a_rollout_a_cancelled_update_is_rolled_back(scene: Scene) -> None:
    scene.rounds()
    scene.states |= {"r3": "starting", "r4": "starting"}
    scene.ask(ask="update", version={"lane": "e-new"}, scaling=SCALING)
    scene.states["r3"] = "ready"
    scene.rounds()
    assert scene.assigned() == [("r1", 1), ("r3", 2), ("r4", 2)]
    assert scene.traffic.course.target == "e-new"
    assert scene.ask(ask="cancel")["version"] == 1
    scene.rounds(12)
    assert [version for _, version in scene.assigned()] == [1, 1]
    assert (scene.traffic.course.target, list(scene.traffic.course.lanes)) == ("e-old", ["e-old"])
    with pytest.raises(RecipeError, match="no update of e is at work"):
        scene.ask(ask="cancel")


def test_an_update_that_fails_takes_its_numbers_with_it(scene: Scene) -> None:
    scene.rounds()
    scene.states["r3"] = "failed"
    scene.ask(ask="update", version={"lane": "e-new"}, scaling={**SCALING, "max": 9, "max_queue": 1})
    scene.rounds()
    spec = scene.head.spec
    assert (spec["current"], spec["next"], spec["max"], spec["max_queue"]) == (1, None, 3, SCALING["max_queue"])


def test_an_endpoint_that_is_deployed_again_goes_on_with_what_runs(scene: Scene) -> None:
    scene.rounds()
    found = scene.board.read("spec")["spec"]
    same = resumed(found, "e", {"lane": "e-old"}, {**SCALING, "max": 7})
    assert (same["current"], same["next"], same["max"]) == (1, None, 7)
    other = resumed(found, "e", {"lane": "e-new"}, SCALING)
    assert (other["current"], other["next"], other["last"]) == (1, 2, 2)
    assert [one["lane"] for one in other["versions"]] == ["e-old", "e-new"]
    assert resumed(None, "e", {"lane": "e-old"}, SCALING) == scene.spec | {"desired": 0}


def test_at_the_end_nothing_is_wanted_of_any_node(scene: Scene) -> None:
    scene.rounds()
    ending = threading.Thread(target=scene.head.end, args=(20,))
    ending.start()
    while scene.assigned():
        time.sleep(0.02)
    assert ending.is_alive(), "what drains is waited for"
    scene.tell()
    ending.join(10)
    assert not ending.is_alive()


def test_what_cannot_be_is_refused_and_changes_nothing(scene: Scene) -> None:
    scene.rounds()
    with pytest.raises(RecipeError, match="min 4, max 3"):
        scene.ask(ask="scale", min=4, max=3)
    with pytest.raises(RecipeError, match="no such lane"):
        scene.ask(ask="update", version={"lane": "none"}, scaling=SCALING)
    with pytest.raises(RecipeError, match="dance: not something"):
        scene.ask(ask="dance")
    with pytest.raises(RecipeError, match="another scalellm"):
        scene.ask(ask="update")
    assert scene.ask(ask="scale", min=3) == {"error": "", "min": 3, "max": 3}
    scene.rounds()
    assert len(scene.assigned()) == 3
    assert scene.head.spec["next"] is None


def test_the_end_can_be_asked_for(scene: Scene) -> None:
    assert not scene.head.asked.is_set()
    scene.ask(ask="down")
    assert scene.head.asked.is_set()


def test_an_endpoint_that_sleeps_lets_requests_wait_as_long_as_a_start_takes(tmp_path: Path) -> None:
    scene = Scene(tmp_path, min=0, idle_seconds=0.01, start_seconds=45.0)
    scene.rounds()
    time.sleep(0.05)
    scene.rounds()
    assert scene.assigned() == []
    course = scene.traffic.course
    assert course.asleep
    assert course.patience_s(20.0) == 45.0
    with scene.traffic.wait():
        scene.rounds(2)
        assert len(scene.assigned()) == 1


def test_without_a_board_everything_goes_on_and_it_is_said_once(scene: Scene) -> None:
    scene.rounds()
    course = scene.traffic.course
    until = threading.Event()
    scene.board.read = _away  # type: ignore[method-assign]
    thread = threading.Thread(target=scene.head.run, args=(until,))
    thread.start()
    time.sleep(0.7)
    until.set()
    thread.join()
    assert scene.traffic.course is course
    assert scene.head.failure is None
    assert len(scene.notes) == 1


def _away(_prefix: str) -> dict[str, dict[str, Any]]:
    raise EndpointError("the board is away")


def test_load_is_what_is_at_work_and_how_long_nothing_was() -> None:
    now = [100.0]
    traffic = Traffic(Course({}, ""), clock=lambda: now[0])
    now[0] += 5
    assert traffic.load().idle_s == 5
    with traffic.use(10) as use:
        use.add(3)
        now[0] += 5
        assert (traffic.load().tokens, traffic.load().idle_s) == (13, 0)
    now[0] += 2
    assert (traffic.load().tokens, traffic.load().idle_s, traffic.load().waiting) == (0, 2, 0)
