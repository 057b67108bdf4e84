"""A node's agent: it does what the board wants, says how it is, and keeps what runs when the board is away."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.endpoint import until
from toolchain.errors import EndpointError, ScalellmError
from toolchain.fleet.board import FolderBoard
from toolchain.fleet.node.agent import Agent, Node

VERSIONS = [{"version": 1}, {"version": 2}]


class Runs:
    """A replica without a Triton."""

    def __init__(self, name: str, version: Mapping[str, Any]) -> None:
        self.name, self.version, self.trial = name, version["version"], version["trial"]
        self.gpus = version["gpus"]
        self.failure: ScalellmError | None = None
        self.history: list[str] = []
        self.drained = threading.Event()

    def start(self) -> None:
        self.history.append("start")

    def state(self) -> dict[str, Any]:
        return {"name": self.name, "state": "failed" if self.failure else "ready" if self.history else "", "why": ""}

    def stop(self) -> None:
        self.drained.wait(10)
        self.history.append("stop")

    def kill(self) -> None:
        self.history.append("kill")


class Scene:
    """An agent whose board can be taken away."""

    def __init__(self, folder: Path) -> None:
        self.made: dict[str, Runs] = {}
        self.away = False
        self.board = FolderBoard(folder)
        self.notes: list[str] = []
        self.agent = Agent(Node("a", room=4, price_per_hour=0.3), self, self.make, self)  # type: ignore[arg-type]

    def make(self, name: str, version: Mapping[str, Any]) -> Runs:
        self.made[name] = Runs(name, version)
        return self.made[name]

    def want(self, **names: int) -> None:
        replicas = [{"name": name, "version": version} for name, version in names.items()]
        self.board.put("spec", {"versions": VERSIONS})
        self.board.put("assigned/a", {"replicas": replicas})

    def told(self) -> dict[str, Any]:
        return self.board.read("nodes/").get("nodes/a", {})

    def states(self) -> dict[str, tuple[int, str]]:
        return {one["name"]: (one["version"], one["state"]) for one in self.told()["replicas"]}

    def rounds(self, condition: Callable[[], bool]) -> None:
        def go() -> bool:
            self.agent.round()
            return condition()

        until(go, 10)

    # what the agent is given: a board, and a place for its notes

    def put(self, key: str, value: Mapping[str, Any], *, ttl_s: float | None = None) -> None:
        self._reach()
        self.board.put(key, value, ttl_s=ttl_s)

    def read(self, prefix: str) -> dict[str, dict[str, Any]]:
        self._reach()
        return self.board.read(prefix)

    def remove(self, key: str) -> None:
        self._reach()
        self.board.remove(key)

    def close(self) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)

    def _reach(self) -> None:
        if self.away:
            raise EndpointError("the board is away")


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_an_agent_starts_what_is_wanted_and_says_how_it_is(scene: Scene) -> None:
    scene.agent.round()
    assert scene.told() == {
        "node": "a",
        "provider": "local",
        "device": "",
        "gpus": 0,
        "room": 4,
        "own": None,
        "turns": False,
        "price_per_hour": 0.3,
        "state": "up",
        "replicas": [],
    }
    scene.want(r1=1, r2=2)
    scene.agent.round()
    assert scene.states() == {"r1": (1, "ready"), "r2": (2, "ready")}
    scene.agent.round()
    assert [one.history for one in scene.made.values()] == [["start"], ["start"]]


def test_a_replica_of_the_version_that_is_to_come_is_on_trial(scene: Scene) -> None:
    scene.want(r1=1, r2=2)
    scene.board.put("spec", {"versions": VERSIONS, "current": 1, "next": 2})
    scene.agent.round()
    assert {name: one.trial for name, one in scene.made.items()} == {"r1": False, "r2": True}


def test_a_replica_gets_the_gpus_of_its_place_and_the_board_hears_of_it(scene: Scene) -> None:
    scene.want()
    scene.board.put("assigned/a", {"replicas": [{"name": "r1", "version": 1, "gpus": [2, 3], "of": 2}]})
    scene.agent.round()
    assert scene.made["r1"].gpus == (2, 3)
    assert [(one["gpus"], one["of"]) for one in scene.told()["replicas"]] == [([2, 3], 2)]


def test_what_is_no_longer_wanted_is_drained_while_the_others_run(scene: Scene) -> None:
    scene.want(r1=1, r2=1)
    scene.agent.round()
    scene.want(r2=1)
    scene.agent.round()
    assert set(scene.states()) == {"r1", "r2"}, "it is told for as long as it drains"
    scene.made["r1"].drained.set()
    scene.rounds(lambda: set(scene.states()) == {"r2"})
    assert scene.made["r1"].history == ["start", "stop"]
    assert scene.made["r2"].history == ["start"]


def test_a_failed_replica_is_told_until_it_is_no_longer_wanted(scene: Scene) -> None:
    scene.want(r1=1)
    scene.agent.round()
    scene.made["r1"].failure = EndpointError("no engine")
    scene.agent.round()
    assert scene.states() == {"r1": (1, "failed")}
    scene.want(r2=1)
    scene.rounds(lambda: set(scene.states()) == {"r2"})
    assert scene.made["r1"].history == ["start", "kill"]


def test_what_runs_goes_on_while_the_board_is_away_or_empty(scene: Scene) -> None:
    scene.want(r1=1)
    scene.agent.round()
    scene.away = True
    for _ in range(3):
        scene.agent.round()
    scene.board.remove("assigned/a")
    scene.board.remove("spec")
    scene.away = False
    for _ in range(3):
        scene.agent.round()
    assert scene.states() == {"r1": (1, "ready")}
    assert scene.made["r1"].history == ["start"]
    assert len(scene.notes) == 2, "said once when it goes, and once when it is back"


def test_a_version_that_the_board_does_not_describe_yet_waits(scene: Scene) -> None:
    scene.want(r1=3)
    scene.agent.round()
    assert scene.states() == {}
    scene.board.put("spec", {"versions": [{"version": 3}]})
    scene.agent.round()
    assert scene.states() == {"r1": (3, "ready")}


def test_an_agent_that_drains_leaves_the_board_last(scene: Scene) -> None:
    scene.want(r1=1)
    scene.agent.round()
    leaving = threading.Thread(target=scene.agent.drain)
    leaving.start()
    until(lambda: scene.told().get("state") == "draining")
    scene.made["r1"].drained.set()
    leaving.join(10)
    assert scene.told() == {}
    assert scene.made["r1"].history == ["start", "stop"]
