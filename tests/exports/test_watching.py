"""Prometheus and Grafana for an endpoint that runs here: read by the readers of those systems. That the metrics are
real, a head says (tests/fleet/test_fleet_metrics.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import compose_spec
import jsonschema
import promql_parser
import pytest
import yaml
from click.testing import CliRunner

from tests.exports.test_monitoring import _lost, _through_grafana, promtool
from tests.exports.tools import COMPOSE_SCHEMA, needs_compose_schema, needs_promtool
from toolchain.cli import verbs

FILE = "endpoint: my-llama\nrecipes: [tiny]\nhost: 0.0.0.0\nports: {openai: 8090}\nmax_queue: 10\n"
BOARDS = ("endpoint", "fleet")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "DEPLOYMENT.yaml").write_text(FILE)
    argv = ["deploy", "dashboards", str(tmp_path / "DEPLOYMENT.yaml"), "-o", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(verbs, argv)
    assert done.exit_code == 0, done.output
    assert all((tmp_path / "out" / name).is_file() for name in json.loads(done.stdout)["files"])
    return tmp_path / "out"


def compose(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((out / "compose.yaml").read_text())
    return found


def queries(out: Path) -> list[str]:
    boards = [json.loads((out / "grafana" / "dashboards" / f"{name}.json").read_text()) for name in BOARDS]
    return [target["expr"] for board in boards for panel in board["panels"] for target in panel["targets"]]


def test_a_reader_of_the_compose_specification_takes_the_file(out: Path) -> None:
    read = compose_spec.PyCompose.from_yaml((out / "compose.yaml").read_text())
    read.validate()
    assert set(read.service_names()) == {"prometheus", "grafana"}


@needs_compose_schema
def test_the_file_fits_the_published_schema(out: Path) -> None:
    validator = jsonschema.Draft201909Validator(json.loads(COMPOSE_SCHEMA.read_text()))
    assert [error.message for error in validator.iter_errors(compose(out))] == []


@needs_promtool
def test_promtool_takes_the_configuration_the_rules_and_every_query(out: Path, tmp_path: Path) -> None:
    assert "SUCCESS" in promtool("check", "config", "--syntax-only", out / "prometheus" / "prometheus.yml")
    assert "6 rules found" in promtool("check", "rules", out / "prometheus" / "alerts.yaml")
    rules = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(queries(out))]
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", tmp_path / "panels.yaml")


@needs_promtool
def test_an_endpoint_that_sleeps_is_no_alarm_and_one_that_has_lost_all_is(out: Path) -> None:
    def case(wanted: int, *fired: str) -> dict[str, Any]:
        values = {"scalellm_fleet_replicas_ready": "0x10", "scalellm_fleet_replicas_wanted": f"{wanted}x10"}
        labels = {"severity": "critical", "endpoint": "my-llama"}
        found = [{"exp_labels": labels, "exp_annotations": {"summary": "No replica of it generates."}} for _ in fired]
        return {
            "interval": "1m",
            "input_series": [{"series": name, "values": value} for name, value in values.items()],
            "alert_rule_test": [
                {"eval_time": "5m", "alertname": "ScalellmNothingGenerates", "exp_alerts": found},
            ],
        }

    file = out / "prometheus" / "test.yaml"
    tests = [case(0), case(2, "fires")]
    file.write_text(yaml.safe_dump({"rule_files": ["alerts.yaml"], "evaluation_interval": "1m", "tests": tests}))
    assert "SUCCESS" in promtool("test", "rules", file)


def test_a_parser_that_is_not_prometheus_own_takes_every_query_too(out: Path) -> None:
    for query in queries(out):
        promql_parser.parse(query)


@pytest.mark.parametrize("name", BOARDS)
def test_grafanas_own_models_know_every_key_of_a_dashboard(out: Path, name: str) -> None:
    board = json.loads((out / "grafana" / "dashboards" / f"{name}.json").read_text())
    assert list(_lost(board, _through_grafana(board))) == []


def test_all_of_it_stays_on_the_machine_and_finds_the_endpoint(out: Path) -> None:
    services = compose(out)["services"]
    assert {service["network_mode"] for service in services.values()} == {"host"}
    assert "--web.listen-address=127.0.0.1:9090" in services["prometheus"]["command"]
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    (job,) = yaml.safe_load((out / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["127.0.0.1:8090"]}]
    source = yaml.safe_load((out / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    assert source["datasources"][0]["url"] == "http://127.0.0.1:9090"
    readme = (out / "README.md").read_text()
    for secret in compose(out)["secrets"].values():
        assert secret["file"].removeprefix("./") in readme
    for service in services.values():
        for mount in service["volumes"]:
            assert mount["type"] == "volume" or (out / mount["source"]).exists()
