"""The fleet's dashboard and alerts name metrics, and labels, that the head of an endpoint publishes."""

from __future__ import annotations

import io
import json
import urllib.request
from dataclasses import replace
from pathlib import Path

import openai
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import unused_ports
from tests.e2e.test_triton_models import CAPITAL
from tests.fleet.endpoint import ENDPOINT, Endpoint
from tests.fleet.shown import Shown, replica
from tests.fleet.test_waiting import texts_of
from tests.gateway.behind_gateway import settings_for
from tests.gateway.test_dashboards import PROMETHEUS_OWN, used
from toolchain.exports import dashboards, monitoring
from toolchain.fleet.deployment import Deployment
from toolchain.fleet.front.front import steered
from toolchain.fleet.front.traffic import Course, Lane, Traffic
from toolchain.fleet.plane import Plane
from toolchain.gateway.logs import Log
from toolchain.gateway.run import Listen, background


def asked() -> list[str]:
    """Every query of the dashboards and the alerts."""
    boards = [json.loads(text) for _, text in dashboards.texts("e", dashboards.FLEET_BOARDS)]
    rules = monitoring.alerts_of_fleet(Deployment(endpoint="e", recipes=("tiny",)))["groups"][0]["rules"]
    panels = [target["expr"] for board in boards for panel in board["panels"] for target in panel["targets"]]
    return [*panels, *(rule["expr"] for rule in rules)]


def scraped(running: Endpoint, shown: Shown, parrot: Path, repository: Path) -> str:
    """``/metrics`` of a gateway before real replicas, as a head opens it, after an answer."""
    lane = Lane(ENDPOINT, texts_of(repository), 16)
    traffic = Traffic(Course({lane.name: lane}, lane.name))
    settings = settings_for(parrot)
    settings = replace(settings, timeouts=replace(settings.timeouts, patience_s=30))
    front = steered(Plane(Path(running.replicas[0].spec.discovery), ENDPOINT), traffic, shown.meter, shown.view)
    listen = Listen(port=unused_ports(1)[0], predict_port=None)
    with background(settings, listen, log=Log(io.StringIO()), engines=front):
        client = openai.OpenAI(base_url=listen.urls["OpenAI"], api_key="x", timeout=60)
        list(client.completions.create(model="parrot", prompt=CAPITAL, max_tokens=9, temperature=0, stream=True))
        with urllib.request.urlopen(f"{listen.urls['OpenAI'].removesuffix('/v1')}/metrics") as answer:
            text: str = answer.read().decode()
    return text


def test_every_metric_of_a_panel_or_an_alert_is_in_a_real_scrape(
    running: Endpoint, parrot: Path, repository: Path, tmp_path: Path
) -> None:
    shown = Shown(tmp_path / "shown")
    shown.node("n1", replica("r0"), replica("r1", "starting"), gpus=2)
    shown.node("n2", replica("r2"), price_per_hour=None, device="of another world")
    text = scraped(running, shown, parrot, repository)
    shown.close()
    found: dict[str, dict[frozenset[str], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[frozenset(sample.labels)] = sample.value
    queries = asked()
    assert len(queries) > 20
    for query in queries:
        names, labels = used(query)
        assert names, query
        assert names - PROMETHEUS_OWN <= found.keys(), query
        for name in names - PROMETHEUS_OWN:
            assert labels <= frozenset().union(*found[name]), (query, name)
    values = {name: next(iter(one.values())) for name, one in found.items() if name.startswith("scalellm_fleet_")}
    assert values == {
        "scalellm_fleet_replicas_ready": 2,
        "scalellm_fleet_replicas_wanted": 4,
        "scalellm_fleet_nodes": 2,
        "scalellm_fleet_gpus": 3,
        "scalellm_fleet_cost_usd_per_hour": 0.44,
        "scalellm_fleet_unpriced_nodes": 1,
        "scalellm_fleet_tokens_in_flight": 0,
        "scalellm_fleet_waiting_requests": 0,
    }
