"""``deploy join`` as a person types it, at the door of a real head: an engine built here, on a machine of a cloud."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from tests.conftest import unused_ports
from tests.e2e.parrot import RECIPE
from tests.fleet.endpoint import need_servers, until
from tests.fleet.test_notices import Metadata, metadata
from toolchain.cli import verbs
from toolchain.cli.deploying import built
from toolchain.cli.flags import open_screen
from toolchain.errors import RecipeError, RejectedError
from toolchain.fleet.board import Board
from toolchain.fleet.hosts.door import opened
from toolchain.fleet.hosts.network import Addresses, Guests, serving
from toolchain.fleet.worker.membership import checked_passport, identity
from toolchain.progress import Silent

NOTICE = "/latest/meta-data/spot/instance-action"
WORDS = '{"action": "terminate", "time": "2026-11-22T23:00:00Z"}'


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guests]:
    pytest.importorskip("dynamo._core", reason="the extra fleet is not installed")
    need_servers()
    found = Guests(tmp_path_factory.mktemp("network"), "parrot", Addresses("127.0.0.1", *unused_ports(4)))
    with serving(found, Silent()), opened(found, Silent()):
        yield found


def join(*words: object) -> Result:
    return CliRunner().invoke(verbs, ["deploy", "join", *map(str, words)], standalone_mode=False)


def operate(board: Board, repository: Path, cloud: Metadata) -> dict[str, Any]:
    """The head: one replica for the node. When it takes requests, the cloud wants its machine back. -> what the node
    said then.
    """
    version = {
        "version": 1,
        "lane": "parrot",
        "identity": identity(checked_passport(repository, "")),
        "drain_seconds": 5,
        "start_seconds": 60,
        "conformance": False,
        "allow_unverified": True,
    }
    board.put("spec", {"versions": [version], "current": 1, "next": None})
    board.put("assigned/gpu-7", {"replicas": [{"name": "r1", "version": 1}]})

    def said() -> dict[str, Any]:
        return board.read("nodes/gpu-7").get("nodes/gpu-7", {"replicas": []})

    try:
        until(lambda: [one["state"] in ("ready", "failed") for one in said()["replicas"]] == [True], 90)
        return said()
    finally:
        cloud.answers[NOTICE] = WORDS


@pytest.mark.timeout(240)
def test_a_spot_machine_builds_its_engine_serves_it_and_goes_when_its_cloud_says_so(
    guests: Guests, parrot: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(RECIPE.replace("some/model", str(parrot)))
    with click.Context(verbs):
        repository = built(open_screen(False, 0), str(recipe), tmp_path / "head")
    board = guests.board()
    with metadata() as cloud, ThreadPoolExecutor(1) as pool:
        head = pool.submit(operate, board, repository, cloud)
        done = join(
            *(guests.token(lives_s=300), "--name", "gpu-7", "--recipe", recipe, "--room", 1, "--provider", "aws"),
            *("--spot", "aws", "--metadata", cloud.url, "--price-per-hour", 0.31, "--work", tmp_path / "work"),
        )
        assert done.exception is None, done.output
        told = head.result(10)
    (served,) = told["replicas"]
    assert (served["state"], served["why"]) == ("ready", "")
    assert (told["provider"], told["price_per_hour"], told["device"], told["room"]) == ("aws", 0.31, "cpu", 1)
    assert "gpu-7 is a node of parrot" in done.output
    assert f"this machine is about to be taken away: {WORDS}" in done.output
    assert board.read("nodes/gpu-7") == {}, "it has left"
    assert not list((tmp_path / "work" / "nodes").rglob("fetched")), "no engine came from elsewhere"
    assert [json.loads(file.read_text())["backend"] for file in (tmp_path / "work").rglob("repository.json")] == [
        "openvino"
    ]


def test_a_token_in_the_environment_stands_on_no_command_line(guests: Guests, tmp_path: Path) -> None:
    argv = ["deploy", "join", "--name", "head", "--work", str(tmp_path)]
    token = {"SCALELLM_JOIN_TOKEN": str(guests.token(lives_s=300))}
    with_it, without = (CliRunner().invoke(verbs, argv, standalone_mode=False, env=env) for env in (token, {}))
    assert isinstance(with_it.exception, RejectedError), "it was read, and the name is refused"
    assert isinstance(without.exception, click.MissingParameter)


def test_what_cannot_be_is_told_before_the_token_is_spent(guests: Guests, tmp_path: Path) -> None:
    token = guests.token(lives_s=300)
    for words, kind, said in (
        (("--spot", "atlantis"), RecipeError, "atlantis: its notices are not known"),
        (("--recipe", tmp_path / "none.yaml"), RecipeError, "none.yaml"),
        (("--name", "head"), RejectedError, "not a node's name"),
    ):
        found = join(token, *words, "--work", tmp_path / "work").exception
        assert isinstance(found, kind), (words, found)
        assert said in found.message
    assert guests.nodes() in ([], ["gpu-7"])
    with guests.tokens.spending(token.name, token.secret):
        pass
