"""DEPLOYMENT.yaml, and an endpoint of this machine that keeps its replicas."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import openai
import psutil
import pytest

from tests.conftest import unused_ports
from tests.e2e.test_triton_models import CAPITAL, Reference
from tests.fleet.endpoint import until
from tests.gateway.behind_gateway import settings_for
from toolchain.errors import EndpointError, RecipeError
from toolchain.fleet.deployment import Deployment, load_deployment
from toolchain.gateway.run import Listen
from toolchain.progress import Silent
from toolchain.stages import deploy, gateway

Run = Callable[..., subprocess.CompletedProcess[str]]


def written(folder: Path, text: str) -> Path:
    file = folder / "DEPLOYMENT.yaml"
    file.write_text(text)
    return file


def test_what_is_left_out_has_a_value(tmp_path: Path) -> None:
    found = load_deployment(written(tmp_path, "endpoint: a\nrecipes: [tiny]\nreplicas: {min: 2, max: 4}\n"))
    assert (found.replicas.min, found.replicas.most, found.replicas.idle_seconds) == (2, 4, 300)
    assert (found.ports.openai, found.max_queue, found.drain_seconds) == (8080, 64, 30)
    none = load_deployment(written(tmp_path, "endpoint: a\nrecipes: [tiny]\nreplicas: {min: 0}\n"))
    assert (none.replicas.min, none.replicas.most) == (0, 1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("endpoint: a\nrecipes: [tiny]\nreplicsa: {min: 2}\n", r"yaml:3: replicsa: .*did you mean 'replicas'"),
        ("endpoint: a.b\nrecipes: [tiny]\n", r"yaml:1: endpoint"),
        ("endpoint: a\nrecipes: []\n", r"yaml:2: recipes"),
        ("recipes: [tiny]\n", r"endpoint: is required"),
        ("endpoint: a\nrecipes: [tiny]\nreplicas: {min: 3, max: 2}\n", r"yaml:3: replicas.max: 2 is less than min, 3"),
        ("endpoint: a\nrecipes: [tiny]\nreplicas: {max: 0}\n", r"yaml:3: replicas.max"),
        ("endpoint: a\nrecipes: [tiny]\nreplicas: {min: 2, max_unavailable: 0}\n", r"max_unavailable: 0 with max 2"),
        ("endpoint: a\nrecipes: [tiny]\nprices: {cpu: -1}\n", r"yaml:3: prices.cpu"),
        ("endpoint: a\nrecipes: [tiny]\nports: {openai: 2345}\n", r"ports.predict: the same port as openai"),
        ("endpoint: a\nrecipes: [tiny]\nports: {grpc: 8080}\n", r"ports.grpc: the same port as openai"),
        ("endpoint: a\nrecipes: [tiny]\nnetwork: {host: h, etcd: 7600}\n", r"yaml:3: network: .* four different"),
        ("endpoint: a\nrecipes: [tiny]\ndrain_seconds: -1\n", r"yaml:3: drain_seconds"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(RecipeError) as found:
        load_deployment(written(tmp_path, text))
    assert re.search(said, "\n".join(map(str, found.value.problems)))


def test_a_deployment_says_where_it_runs(scalellm: Run, tmp_path: Path) -> None:
    found = scalellm("deploy", str(written(tmp_path, "endpoint: a\nrecipes: [tiny]\n")))
    assert found.returncode == RecipeError("").exit_code
    assert "--local" in found.stderr
    assert "network: {host: ADDRESS}" in found.stderr


def test_where_nothing_runs_status_and_down_say_so(scalellm: Run, tmp_path: Path) -> None:
    assert json.loads(scalellm("deploy", "status", "--work", str(tmp_path), "--json").stdout) == []
    assert "does not run" in scalellm("deploy", "down", "a", "--work", str(tmp_path)).stdout


@pytest.mark.timeout(300)
def test_what_dies_is_started_again_and_nothing_is_left_at_the_end(
    repository: Path, parrot: Path, tmp_path: Path
) -> None:
    pytest.importorskip("dynamo._core", reason="the extra fleet is not installed")
    asked = Deployment(endpoint="parrot", recipes=("tiny",), drain_seconds=3.0)
    place = deploy.Place.of(tmp_path, "parrot")
    settings = settings_for(parrot)
    settings = replace(settings, timeouts=replace(settings.timeouts, patience_s=90, first_token_s=90))
    listen = Listen(port=unused_ports(1)[0], predict_port=None)
    text = Reference(parrot).text(CAPITAL, 60)
    with (
        deploy.local(asked, [repository], place, progress=Silent()) as endpoint,
        gateway.background(settings, listen, log=tmp_path / "gateway.log", engines=endpoint.engines),
    ):
        client = openai.OpenAI(base_url=listen.urls["OpenAI"], api_key="x", max_retries=0, timeout=120)
        endpoint.tell("running")
        assert [found["endpoint"] for found in deploy.all_running(tmp_path)] == ["parrot"]
        with (
            pytest.raises(EndpointError, match="runs already"),
            deploy.local(asked, [repository], place, progress=Silent()),
        ):
            pass
        seen = set(endpoint.replicas()[0]["pids"].values())
        for which in ("triton", "worker"):
            os.kill(endpoint.replicas()[0]["pids"][which], signal.SIGKILL)
            answer = client.completions.create(model="parrot", prompt=CAPITAL, max_tokens=60, temperature=0)
            assert answer.choices[0].text == text
            until(lambda: endpoint.replicas()[0]["state"] == "ready", 120)
            seen |= set(endpoint.replicas()[0]["pids"].values())
    assert len(seen) == 4
    assert not any(psutil.pid_exists(pid) for pid in seen)
    assert deploy.all_running(tmp_path) == []
