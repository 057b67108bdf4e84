"""An endpoint whose nodes are elsewhere: its head on a real etcd and NATS, started twice."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.conftest import unused_ports
from tests.fleet.endpoint import need_servers, until
from toolchain.fleet.board import Board
from toolchain.fleet.deployment import Deployment, Network, Replicas
from toolchain.fleet.hosts import packages
from toolchain.fleet.hosts.network import Guests
from toolchain.progress import Silent
from toolchain.stages import deploy

pytestmark = pytest.mark.timeout(120)


def test_a_head_that_is_started_again_goes_on_with_what_its_nodes_run(repository: Path, tmp_path: Path) -> None:
    """And when it is asked to end, nothing is wanted of them any more."""
    pytest.importorskip("dynamo._core", reason="the extra fleet is not installed")
    need_servers()
    door, etcd, nats, answers = unused_ports(4)
    network = Network(host="127.0.0.1", door=door, etcd=etcd, nats=nats, answers=answers)
    registry = tmp_path / "registry"
    asked = Deployment(
        endpoint="parrot",
        recipes=("tiny",),
        replicas=Replicas(min=1, max=2),
        drain_seconds=0,
        network=network,
        registry=str(registry),
    )
    place = deploy.Place.of(tmp_path, "parrot")
    with pytest.raises(LostError):
        begin_and_be_lost(asked, repository, place)
    with deploy.local(asked, [repository], place, progress=Silent()) as endpoint:
        board = board_of(place)
        say(board, "r1")
        until(lambda: list(endpoint.head.nodes) == ["nodes/a"] and endpoint.head.spec["desired"] == 1)
        assert wanted(board) == ["r1"]
        (version,) = board.read("spec")["spec"]["versions"]
        assert version["version"] == 1
        ended = threading.Thread(target=obey, args=(board,))
        ended.start()
    ended.join(1)
    assert not ended.is_alive(), "the head was gone before its node had ended everything"
    package = packages.choose(version, "cpu")
    found = packages.fetch(package, str(registry), tmp_path / "node", Silent(), check=lambda _manifest: None)
    assert (found / "tensorrt_llm" / "1" / "model.py").read_bytes() == (
        repository / "tensorrt_llm" / "1" / "model.py"
    ).read_bytes()


class LostError(Exception):
    """The head's machine is lost."""


def begin_and_be_lost(asked: Deployment, repository: Path, place: deploy.Place) -> None:
    """After a node was given something to run."""
    with deploy.local(asked, [repository], place, progress=Silent()):
        board = board_of(place)
        say(board)
        until(lambda: wanted(board) == ["r1"])
        raise LostError


def board_of(place: deploy.Place) -> Board:
    return Guests.open(place.folder / "network", "parrot").board()


def obey(board: Board) -> None:
    """What nobody wants is ended, and the node says so."""
    until(lambda: wanted(board) == [])
    say(board)


def say(board: Board, *ready: str) -> None:
    """What a node says of itself."""
    replicas = [{"name": name, "version": 1, "state": "ready", "why": "", "restarts": 0} for name in ready]
    told = {"provider": "p", "device": "cpu", "gpus": 0, "room": 2, "price_per_hour": None, "state": "up"}
    board.put("nodes/a", {"node": "a", **told, "replicas": replicas}, ttl_s=60)


def wanted(board: Board) -> list[str]:
    found = board.read("assigned/").get("assigned/a", {"replicas": []})
    return [one["name"] for one in found["replicas"]]
