"""``deploy update`` as a person meets it: what an update's file may change, and what it is told where it may not."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.fleet.test_head import SCALING, Scene
from tests.gateway.behind_gateway import settings_for
from toolchain import running
from toolchain.cli import verbs
from toolchain.errors import RecipeError
from toolchain.fleet.deployment import Deployment, load_deployment
from toolchain.fleet.front.front import Fleet
from toolchain.fleet.head.versions import version_of
from toolchain.fleet.plane import Plane
from toolchain.gateway.failures import ApiError
from toolchain.gateway.service import Service
from toolchain.gateway.settings import Limits
from toolchain.progress import Silent

FILE = """\
endpoint: parrot
recipes: [no-such-recipe]
host: 0.0.0.0
ports: {openai: 8090}
network: {host: 203.0.113.7}
"""


class Command:
    """``scalellm deploy update parrot FILE`` beside an endpoint of that name which only says that it runs."""

    def __init__(self, work: Path) -> None:
        self.work, self.file = work, work / "new.yaml"

    def error(self, text: str, runs: str = FILE, *, local: bool = False) -> tuple[Exception, str]:
        """What ends the command with this file, and what it said before."""
        self.file.write_text(runs)
        told = load_deployment(self.file).standing | ({"network": None} if local else {})
        self.file.write_text(text)
        argv = ["deploy", "update", "parrot", str(self.file), "--work", str(self.work)]
        with running.Place(self.work / "endpoints" / "parrot").hold(lambda: AssertionError()) as record:
            record({"endpoint": "parrot", **told})
            done = CliRunner().invoke(verbs, argv, standalone_mode=False)
        assert isinstance(done.exception, Exception)
        return done.exception, done.stderr


@pytest.fixture
def command(tmp_path: Path) -> Command:
    (tmp_path / "endpoints" / "parrot").mkdir(parents=True)
    return Command(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("host: 0.0.0.0", "host: 127.0.0.1", "host"),
        ("openai: 8090", "openai: 8091", "ports"),
        ("{host: 203.0.113.7}", "{host: 203.0.113.8}", "network"),
        ("network: {host: 203.0.113.7}\n", "", "network"),
    ],
)
def test_what_stays_for_as_long_as_an_endpoint_runs_is_refused_by_name(
    command: Command, old: str, new: str, named: str
) -> None:
    found, _said = command.error(FILE.replace(old, new))
    assert isinstance(found, RecipeError)
    assert f"new.yaml: {named}: cannot change while the endpoint runs" in found.message
    assert found.hint == f"scalellm deploy down parrot; scalellm deploy {command.file}"


def test_all_that_cannot_change_is_named_at_once(command: Command) -> None:
    found, _said = command.error(FILE.replace("8090", "8091").replace("0.0.0.0", "::1"), local=True)
    assert "host, ports: cannot change" in str(found)
    assert isinstance(found, RecipeError)
    assert found.hint.endswith("--local")


@pytest.mark.parametrize("line", ["max_queue: 7", "drain_seconds: 3", "conformance: true", "registry: s3://b/m"])
def test_what_may_change_is_not_refused(command: Command, line: str) -> None:
    """The command goes on to the recipes, of which this file names one that is not there."""
    found, _said = command.error(f"{FILE}{line}\n")
    assert "no-such-recipe" in str(found)


def test_a_network_beside_local_is_not_silently_ignored(command: Command) -> None:
    found, said = command.error(FILE, local=True)
    assert "network: not used, for parrot was started with --local" in said
    assert "no-such-recipe" in str(found)


def test_an_update_changes_how_many_requests_may_wait(parrot: Path, tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    settings = settings_for(parrot, limits=Limits(max_running=1, max_queue=0))

    async def refused(service: Service) -> bool:
        """Whether a request that comes while another one is at work may not wait."""
        coming = asyncio.create_task(service.admission.enter())
        await asyncio.sleep(0)
        found = coming.done() and isinstance(coming.exception(), ApiError)
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
        return found

    async def play() -> list[bool]:
        service = Service(settings)
        service.pool = Fleet(Plane(tmp_path, "parrot"), scene.traffic, settings, on_retry=lambda *_: None)
        await service.admission.enter()
        found = []
        for queue in (0, 1, 0):
            update: dict[str, Any] = {"version": {"lane": "e-old"}, "scaling": {**SCALING, "max_queue": queue}}
            await asyncio.to_thread(lambda update=update: scene.ask(ask="update", **update))
            await asyncio.to_thread(scene.rounds, 12)
            found.append(await refused(service))
        return found

    assert asyncio.run(play()) == [True, False, True]


def test_a_new_version_drains_is_checked_and_is_fetched_as_its_file_says(repository: Path, tmp_path: Path) -> None:
    def version(**changes: Any) -> dict[str, Any]:
        deployment = Deployment(endpoint="parrot", recipes=("tiny",), **changes)
        return version_of(deployment, [repository], tmp_path / "versions", Silent(), allow_unverified=True)

    before, after = version(), version(drain_seconds=3.0, conformance=True, registry=str(tmp_path / "shelf"))
    changed = {name: after[name] for name in after if after[name] != before.get(name)}
    assert set(changed) == {"drain_seconds", "conformance", "registry", "packages"}
    assert (changed["drain_seconds"], changed["conformance"], changed["registry"]) == (
        3.0,
        True,
        str(tmp_path / "shelf"),
    )
    assert list((tmp_path / "shelf").rglob("*")), "what nodes fetch lies there"


def test_an_update_is_cancelled_on_the_command_line(command: Command) -> None:
    scene = Scene(command.work / "endpoints" / "parrot")
    scene.rounds()
    scene.states["r3"] = "starting"
    scene.ask(ask="update", version={"lane": "e-new"}, scaling=SCALING)
    argv = ["deploy", "update", "parrot", "--cancel", "--json", "--work", str(command.work)]
    with running.Place(command.work / "endpoints" / "parrot").hold(lambda: AssertionError()) as record:
        record({"endpoint": "parrot"})
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(CliRunner().invoke, verbs, argv, standalone_mode=False)
            while not done.done():
                scene.rounds(1)
    assert json.loads(done.result().stdout) == {"endpoint": "parrot", "version": 1, "given_up": 2}
    scene.rounds()
    assert scene.assigned() == [("r1", 1), ("r2", 1)]


def test_an_update_needs_a_file_or_cancel() -> None:
    for more in ([], ["new.yaml", "--cancel"]):
        done = CliRunner().invoke(verbs, ["deploy", "update", "parrot", *more])
        assert done.exit_code == 2
        assert "--cancel" in done.stderr
