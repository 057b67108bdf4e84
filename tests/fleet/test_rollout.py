"""An endpoint of real replicas on this machine: to zero and back, from one version to the next, not to a bad one."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conftest import unused_ports
from tests.e2e.test_triton_models import CAPITAL, Reference
from tests.fleet.endpoint import until
from tests.fleet.test_failover import CLIENTS, stream
from tests.gateway.behind_gateway import settings_for
from toolchain import workspace
from toolchain.admission import ENGINE
from toolchain.engine import PASSPORT
from toolchain.errors import ArtifactError, RecipeError, RejectedError
from toolchain.fleet.deployment import Deployment, Replicas
from toolchain.gateway.run import Listen
from toolchain.progress import Silent
from toolchain.stages import deploy, gateway

Run = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = pytest.mark.timeout(240)
ASKED = Deployment(
    endpoint="parrot",
    recipes=("tiny",),
    drain_seconds=60.0,
    replicas=Replicas(min=0, max=2, idle_seconds=2.0, target_tokens_in_flight=1_000_000, start_seconds=90.0),
)


@dataclass
class Scene:
    """One endpoint for all tests here."""

    endpoint: deploy.Local
    client: openai.OpenAI
    place: deploy.Place

    def versions(self) -> list[int]:
        return [one["version"] for one in self.endpoint.replicas() if one["state"] == "ready"]

    def kinds(self) -> list[str]:
        return [json.loads(line)["kind"] for line in self.place.events.read_text().splitlines()]

    def told(self) -> dict[str, Any]:
        """What the state file says."""
        self.endpoint.tell("running")
        return self.place.read() or {}

    def update(self, repository: Path) -> int:
        return deploy.update(self.place, ASKED, [repository], progress=Silent(), on_event=lambda _event: None)


@pytest.fixture(scope="module")
def scene(repository: Path, parrot: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    pytest.importorskip("dynamo._core", reason="the extra fleet is not installed")
    work = tmp_path_factory.mktemp("work")
    place = deploy.Place.of(work, "parrot")
    settings = settings_for(parrot)
    settings = replace(settings, timeouts=replace(settings.timeouts, first_token_s=90, request_s=200))
    listen = Listen(port=unused_ports(1)[0], predict_port=None)
    with (
        deploy.local(ASKED, [repository], place, progress=Silent()) as endpoint,
        gateway.background(settings, listen, log=work / "gateway.log", engines=endpoint.engines),
    ):
        client = openai.OpenAI(base_url=listen.urls["OpenAI"], api_key="x", max_retries=0, timeout=150)
        until(lambda: endpoint.replicas() == [], 60)
        yield Scene(endpoint, client, place)


def altered(repository: Path, target: Path, change: Callable[[Path], object]) -> Path:
    """Another repository, in which something is changed."""
    with workspace.draft(target, "repository", {}) as draft:
        shutil.copytree(repository, draft.path, dirs_exist_ok=True)
        (draft.path / workspace.STAMP).unlink()
        change(draft.path)
        draft.commit(versions={}, recipe="")
    return target


def another_model(repository: Path) -> None:
    file = repository / ENGINE / PASSPORT
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model": "another"}))


def broken_engine(repository: Path) -> None:
    (repository / "tensorrt_llm" / "1" / "model.py").write_text("raise RuntimeError('this version is broken')\n")


def test_a_request_wakes_an_endpoint_that_was_scaled_to_zero(scene: Scene, parrot: Path) -> None:
    assert scene.versions() == []
    with ThreadPoolExecutor(3) as pool:
        futures = [
            pool.submit(scene.client.completions.create, model="parrot", prompt=CAPITAL, max_tokens=60, temperature=0)
            for _ in range(3)
        ]
        texts = [future.result(120).choices[0].text for future in futures]
    assert texts == [Reference(parrot).text(CAPITAL, 60)] * 3
    assert scene.versions() == [1]


def test_an_update_under_load_fails_no_request(scene: Scene, repository: Path, tmp_path: Path) -> None:
    """To a version that cannot go on with the old one's requests: those at work end where they began."""
    undisturbed = stream(scene.client, lambda: None)
    begun, done = threading.Semaphore(0), threading.Event()

    def ask_again() -> list[str]:
        found = []
        while not done.is_set():
            answer = scene.client.completions.create(model="parrot", prompt=CAPITAL, max_tokens=20, temperature=0)
            found.append(answer.choices[0].text)
            time.sleep(0.1)
        return found

    with ThreadPoolExecutor(CLIENTS + 1) as pool:
        short = pool.submit(ask_again)
        streams = [pool.submit(stream, scene.client, begun.release) for _ in range(CLIENTS)]
        for _ in streams:
            assert begun.acquire(timeout=60)
        assert scene.update(altered(repository, tmp_path / "repository", another_model)) == 2
        until(lambda: scene.versions() == [2], 90)
        done.set()
        texts = [future.result(120) for future in streams]
        answers = short.result(60)
    assert texts == [undisturbed] * CLIENTS
    assert len(set(answers)) == 1
    assert len(answers) > 3
    assert scene.endpoint.head.spec["current"] == 2


def test_a_version_that_does_not_start_is_given_up_while_the_old_one_answers(
    scene: Scene, repository: Path, tmp_path: Path
) -> None:
    broken = altered(repository, tmp_path / "repository", broken_engine)
    before = scene.endpoint.head.spec["current"]
    with pytest.raises(RejectedError, match=f"version {before} stays"):
        scene.update(broken)
    answer = scene.client.completions.create(model="parrot", prompt=CAPITAL, max_tokens=20, temperature=0)
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0
    assert scene.endpoint.head.spec["current"] == before
    assert scene.endpoint.head.spec["next"] is None
    assert "rolled back" in scene.kinds()


def test_an_operator_sees_and_changes_what_runs(scene: Scene, scalellm: Run) -> None:
    work = ["--work", scene.place.folder.parent.parent]
    refused = scalellm("deploy", "scale", "parrot", "--min", 3, "--max", 2, *work)
    assert refused.returncode == RecipeError.exit_code
    assert "min 3, max 2" in refused.stderr
    scaled = scalellm("deploy", "scale", "parrot", "--replicas", 1, "--json", *work)
    assert json.loads(scaled.stdout) == {"endpoint": "parrot", "min": 1, "max": 1}
    until(lambda: len(scene.versions()) == 1 and len(scene.endpoint.replicas()) == 1, 60)
    until(lambda: [one["state"] for one in scene.told()["replicas"]] == ["ready"], 10)
    (told,) = json.loads(scalellm("deploy", "status", "--json", *work).stdout)
    assert (told["min"], told["max"], told["desired"], told["next_version"]) == (1, 1, 1, None)
    assert [(one["node"], one["state"]) for one in told["replicas"]] == [("local", "ready")]
    kinds = [event["kind"] for event in json.loads(scalellm("deploy", "logs", "parrot", "--json", *work).stdout)]
    assert kinds == scene.kinds()[: len(kinds)]
    name = told["replicas"][0]["name"]
    assert "tensorrt_llm_bls" in scalellm("deploy", "logs", "parrot", "--replica", name, *work).stdout
    unknown = scalellm("deploy", "logs", "parrot", "--replica", "r99", *work)
    assert unknown.returncode == ArtifactError.exit_code
    assert name in unknown.stderr
