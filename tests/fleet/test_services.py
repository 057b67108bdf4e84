"""An endpoint whose recipe says ``services: 2``: two real replicas on one machine, each with its part, and no third."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import openai
import psutil
import pytest

from tests.conftest import unused_ports
from tests.e2e.test_triton_models import CAPITAL, Reference
from tests.fleet.conftest import make_repository
from tests.fleet.endpoint import until
from tests.gateway.behind_gateway import settings_for
from toolchain.errors import RecipeError
from toolchain.fleet.deployment import Deployment, Replicas
from toolchain.gateway.run import Listen
from toolchain.ledger.book import FILE
from toolchain.ledger.totals import report
from toolchain.progress import Silent
from toolchain.stages import deploy, gateway

pytestmark = pytest.mark.timeout(180)
Run = Callable[..., subprocess.CompletedProcess[str]]


def asked(least: int, most: int) -> Deployment:
    replicas = Replicas(min=least, max=most)
    return Deployment(endpoint="parrot", recipes=("pair",), drain_seconds=3.0, replicas=replicas, prices={"cpu": 0.36})


def parts(endpoint: deploy.Local) -> list[str]:
    """Of how many services each replica's engine was told to be one."""
    tritons = [psutil.Process(one["pids"]["triton"]) for one in endpoint.replicas()]
    commands = [child.cmdline() for triton in tritons for child in triton.children(recursive=True)]
    return [words[-1] for words in commands if any(word.endswith("engine_process.py") for word in words)]


def test_two_services_are_two_replicas_and_there_is_no_room_for_a_third(
    parrot: Path, tmp_path: Path, scalellm: Run
) -> None:
    pytest.importorskip("dynamo._core", reason="the extra fleet is not installed")
    repository = make_repository(parrot, tmp_path, services=2)
    place, work = deploy.Place.of(tmp_path, "parrot"), ["--work", tmp_path]
    with (
        pytest.raises(RecipeError, match="this machine has room for 2"),
        deploy.local(asked(1, 3), [repository], place, progress=Silent()),
    ):
        pass
    listen = Listen(port=unused_ports(1)[0], predict_port=None)
    begun = time.monotonic()
    with (
        deploy.local(asked(2, 2), [repository], place, progress=Silent()) as endpoint,
        gateway.background(settings_for(parrot), listen, log=tmp_path / "log", engines=endpoint.engines),
    ):
        until(lambda: len(endpoint.replicas()) == 2 and all(one["state"] == "ready" for one in endpoint.replicas()), 90)
        assert [(one["gpus"], one["of"]) for one in endpoint.replicas()] == [([], 2), ([], 2)]
        assert parts(endpoint) == ["2", "2"]
        client = openai.OpenAI(base_url=listen.urls["OpenAI"], api_key="x", max_retries=0, timeout=60)
        answer = client.completions.create(model="parrot", prompt=CAPITAL, max_tokens=40, temperature=0)
        assert answer.choices[0].text == Reference(parrot).text(CAPITAL, 40)
        endpoint.tell("running")
        with pytest.raises(RecipeError, match="this machine has room for 2"):
            deploy.update(place, asked(1, 3), [repository], progress=Silent(), on_event=lambda _event: None)
        scaled = scalellm("deploy", "scale", "parrot", "--replicas", 3, *work)
        assert "this machine has room for 2 of 3 replicas" in scaled.stderr
        until(lambda: "no node has room" in place.events.read_text())
        endpoint.tell("running")
        (told,) = json.loads(scalellm("deploy", "status", "--json", *work).stdout)
        assert (told["room"], told["max"], len(told["replicas"]), told["cost_per_hour"]) == (2, 3, 2, 0.36)
        shown = scalellm("deploy", "status", *work).stdout
        assert "$0.36/h" in shown
        assert "this machine has room for 2 of 3 replicas: scalellm deploy scale parrot --max 2" in shown
    total = report(place.folder / FILE, ("node",)).total
    assert 0 < total.node_ms <= 1000 * (time.monotonic() - begun), "the machine's price is earned once"
    assert total.gpu_ms == 0
