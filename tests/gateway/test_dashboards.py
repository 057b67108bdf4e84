"""Dashboards and alerts name metrics, and labels, that a gateway in front of a real Triton publishes."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import replace
from pathlib import Path

import openai
import promql_parser
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.served import Served
from tests.e2e.test_triton_models import CAPITAL
from tests.gateway.behind_gateway import gateway, settings_for
from tests.gateway.test_doors import until_ready
from toolchain.exports import dashboards, monitoring
from toolchain.exports.wanted import Wanted
from toolchain.fleet.deployment import Deployment
from toolchain.gateway.settings import Upstream

PROMETHEUS_OWN = {"up"}


def asked() -> list[str]:
    """Every query of the dashboards and the alerts."""
    boards = [json.loads(text) for _, text in dashboards.texts("e")]
    deployment = Deployment(endpoint="e", recipes=("tiny",))
    wanted = Wanted(deployment=deployment, text="", kinds=(), registry="", is_folder=True, install=())
    rules = monitoring.alerts(wanted)["groups"][0]["rules"]
    panels = [target["expr"] for board in boards for panel in board["panels"] for target in panel["targets"]]
    return [*panels, *(rule["expr"] for rule in rules)]


def used(query: str) -> tuple[set[str], set[str]]:
    """(metrics, labels that they are filtered or grouped by) of one query."""
    names: set[str] = set()
    labels: set[str] = set()

    def visit(one: object) -> None:
        if isinstance(one, promql_parser.VectorSelector):
            names.add(one.name)
            labels.update(matcher.name for matcher in one.matchers.matchers)
        if isinstance(one, promql_parser.AggregateExpr) and one.modifier:
            labels.update(one.modifier.labels)

    promql_parser.walk(promql_parser.parse(query), visit)
    return names, labels


def test_every_metric_of_a_panel_or_an_alert_is_in_a_real_scrape(parrot: Path, served: Served) -> None:
    settings = settings_for(parrot, served.http_port)
    triton = Upstream(settings.upstreams[0].http_url, f"http://127.0.0.1:{served.metrics_port}/metrics")
    with gateway(replace(settings, upstreams=(triton,))) as door:
        until_ready(door)
        client = openai.OpenAI(base_url=door.url, api_key="x")
        list(client.completions.create(model="parrot", prompt=CAPITAL, max_tokens=9, temperature=0, stream=True))
        with urllib.request.urlopen(f"{door.root}/metrics") as answer:
            text = answer.read().decode()
    scraped: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            scraped.setdefault(sample.name, set()).update(sample.labels)
    queries = asked()
    assert len(queries) > 20
    for query in queries:
        names, labels = used(query)
        assert names, query
        assert names - PROMETHEUS_OWN <= scraped.keys(), (query, sorted(scraped))
        for name in names - PROMETHEUS_OWN:
            assert labels <= scraped[name], (query, name)


def test_the_check_finds_a_metric_and_a_label_that_do_not_exist() -> None:
    names, labels = used('sum by (le) (rate(no_such_thing_bucket{colour="red"}[5m])) / up')
    assert (names, labels) == ({"no_such_thing_bucket", "up"}, {"le", "colour"})
