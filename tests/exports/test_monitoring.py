"""What Prometheus and Grafana get: read by promtool, a parser of PromQL and Grafana's own models. That the metrics are
real, a gateway says (tests/gateway/test_dashboards.py).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from tests.exports.conftest import FLAGS, Export
from tests.exports.packages import DEPLOYMENT
from tests.exports.tools import PROMTOOL, needs_promtool
from toolchain.exports import dashboards

BOARDS = [f"grafana/dashboards/{name}.json" for name in dashboards.BOARDS]


def promtool(*words: object) -> str:
    assert PROMTOOL
    argv = [PROMTOOL, *map(str, words)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def queries(found: dict[str, Any]) -> list[str]:
    return [target["expr"] for name in BOARDS for panel in found[name]["panels"] for target in panel["targets"]]


@needs_promtool
def test_promtool_takes_the_configuration_and_the_rules(export: Export, tmp_path: Path) -> None:
    """``--syntax-only``: the file with the key is there only where Prometheus runs."""
    export("compose")
    folder = tmp_path / "out" / "prometheus"
    assert "SUCCESS" in promtool("check", "config", "--syntax-only", folder / "prometheus.yml")
    assert "6 rules found" in promtool("check", "rules", folder / "alerts.yaml")


@needs_promtool
def test_promtool_takes_what_scrapes_pods(export: Export, tmp_path: Path) -> None:
    """But for the discovery of pods, which Debian's promtool is built without; targets stand in for it."""
    found = export("kubernetes", DEPLOYMENT, *FLAGS["kubernetes"])
    (job,) = found["prometheus/scrape.yaml"]["scrape_configs"]
    assert job.pop("kubernetes_sd_configs") == [{"role": "pod", "namespaces": {"names": ["default"]}}]
    job["static_configs"] = [{"targets": ["127.0.0.1:8080"]}]
    file = tmp_path / "out" / "prometheus" / "checked.yaml"
    file.write_text(yaml.safe_dump(found["prometheus/scrape.yaml"]))
    assert "SUCCESS" in promtool("check", "config", "--syntax-only", file)
    assert "6 rules found" in promtool("check", "rules", tmp_path / "out" / "prometheus" / "alerts.yaml")


@needs_promtool
def test_promtool_takes_every_query_of_the_dashboards(export: Export, tmp_path: Path) -> None:
    asked = queries(export("compose"))
    rules = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(asked)]
    file = tmp_path / "panels.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(asked)} rules found" in promtool("check", "rules", file)


@needs_promtool
def test_alerts_fire_when_nothing_generates_and_when_requests_fail(export: Export, tmp_path: Path) -> None:
    """Prometheus' own test of rules, on series of ten minutes."""
    export("compose")
    on = {"endpoint": "my-llama"}

    def series(name: str, values: str) -> dict[str, str]:
        return {"series": name, "values": values}

    summaries = {
        rule["alert"]: rule["annotations"]
        for rule in yaml.safe_load((tmp_path / "out/prometheus/alerts.yaml").read_text())["groups"][0]["rules"]
    }

    def expected(name: str, severity: str, **labels: str) -> dict[str, Any]:
        fired = [{"exp_labels": {"severity": severity, **on, **labels}, "exp_annotations": summaries[name]}]
        return {"eval_time": "9m", "alertname": name, "exp_alerts": fired}

    def quiet(name: str) -> dict[str, Any]:
        return {"eval_time": "9m", "alertname": name, "exp_alerts": []}

    requests = "scalellm_gateway_requests_total"
    down = "scalellm_gateway_triton_up{triton='http://triton-1:8000'}"
    tests = [
        {
            "interval": "1m",
            "input_series": [
                series(down, "0x10"),
                series(f"{requests}{{status='200'}}", "0+90x10"),
                series(f"{requests}{{status='503'}}", "0+10x10"),
            ],
            "alert_rule_test": [
                expected("ScalellmNothingGenerates", "critical"),
                expected("ScalellmReplicaDown", "warning", triton="http://triton-1:8000"),
                expected("ScalellmRequestsFail", "critical"),
            ],
        },
        {
            "interval": "1m",
            "input_series": [
                series(down, "1x10"),
                series(f"{requests}{{status='200'}}", "0+99x10"),
                series(f"{requests}{{status='503'}}", "0+1x10"),
            ],
            "alert_rule_test": [
                quiet("ScalellmNothingGenerates"),
                quiet("ScalellmReplicaDown"),
                quiet("ScalellmRequestsFail"),
            ],
        },
    ]
    file = tmp_path / "out" / "prometheus" / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": ["alerts.yaml"], "evaluation_interval": "1m", "tests": tests}))
    assert "SUCCESS" in promtool("test", "rules", file)


def test_a_parser_that_is_not_prometheus_own_takes_every_query_too(export: Export) -> None:
    found = export("compose")
    rules = found["prometheus/alerts.yaml"]["groups"][0]["rules"]
    asked = [*queries(found), *(rule["expr"] for rule in rules)]
    assert len(asked) > 20
    for query in asked:
        promql_parser.parse(query)
    with pytest.raises(ValueError, match="parenthesis"):
        promql_parser.parse(asked[0].replace(")", "", 1))


def test_dashboards_find_the_data_source_and_prometheus_the_gateway(export: Export) -> None:
    found = export("compose")
    (source,) = found["grafana/provisioning/datasources/prometheus.yaml"]["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (job,) = found["prometheus/prometheus.yml"]["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["gateway:8080"]}]
    services = found["compose.yaml"]["services"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{services['prometheus']['secrets'][0]}"
    (provider,) = found["grafana/provisioning/dashboards/scalellm.yaml"]["providers"]
    mounts = {mount["target"]: mount["source"] for mount in services["grafana"]["volumes"]}
    assert mounts[provider["options"]["path"]] == "./grafana/dashboards"
    for name in BOARDS:
        panels = found[name]["panels"]
        assert {target["datasource"]["uid"] for panel in panels for target in panel["targets"]} == {source["uid"]}
        corners = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
        assert len(set(corners)) == len(panels)


@pytest.mark.parametrize("name", BOARDS)
def test_grafanas_own_models_know_every_key_of_a_dashboard(export: Export, name: str) -> None:
    """Read into Grafana's classes and written again, nothing is lost; what they do not know would be."""
    board = export("compose")[name]
    assert list(_lost(board, _through_grafana(board))) == []
    board["panels"][0]["targets"][0]["expression"] = "up"
    assert list(_lost(board, _through_grafana(board))) == [".panels[0].targets[0].expression"]


def _through_grafana(board: dict[str, Any]) -> Any:
    plugins.register_default_plugins()
    return json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(board)))


def _lost(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """Places whose value is not the same afterwards, or is gone; what came in addition does not count."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            yield from _lost(value, after.get(key), f"{where}.{key}")
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from _lost(one, other, f"{where}[{number}]")
    elif before != after:
        yield where
