"""A compose file with Prometheus and Grafana for an endpoint that ``scalellm deploy`` runs on this machine.

They share the machine's network, since the endpoint's gateway may listen on loopback alone; so do they.
What runs the engines is no concern of theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolchain.document import yaml_text
from toolchain.exports import compose, dashboards, monitoring
from toolchain.exports.compose import GRAFANA_PASSWORD, METRICS_KEY, SECRETS

if TYPE_CHECKING:
    from toolchain.fleet.deployment import Deployment

_PROMETHEUS, _GRAFANA = "127.0.0.1:9090", "127.0.0.1:3000"


def files(deployment: Deployment) -> dict[str, str]:
    """Path in the folder -> text. None of it holds a secret."""
    anywhere = deployment.host in ("0.0.0.0", "::")
    address = f"{'127.0.0.1' if anywhere else deployment.host}:{deployment.ports.openai}"
    boards = dashboards.texts(deployment.endpoint, dashboards.FLEET_BOARDS)
    return {
        "compose.yaml": yaml_text(_compose()),
        "prometheus/prometheus.yml": yaml_text(monitoring.of_gateway(address, f"{SECRETS}/{METRICS_KEY}")),
        "prometheus/alerts.yaml": yaml_text(monitoring.alerts_of_fleet(deployment)),
        "grafana/provisioning/datasources/prometheus.yaml": yaml_text(compose.datasource(f"http://{_PROMETHEUS}")),
        "grafana/provisioning/dashboards/scalellm.yaml": yaml_text(compose.provider()),
        **{f"grafana/dashboards/{name}": text for name, text in boards},
        "README.md": _readme(deployment.endpoint, address),
    }


def _compose() -> dict[str, Any]:
    """The same two as beside exported engines, but on the machine's own network."""
    found = {"prometheus": compose.prometheus(), "grafana": compose.grafana()}
    for service in found.values():
        for key in ("networks", "ports", "depends_on"):
            service.pop(key, None)
        service["network_mode"] = "host"
    found["prometheus"]["command"].append(f"--web.listen-address={_PROMETHEUS}")
    host, _, port = _GRAFANA.partition(":")
    found["grafana"]["environment"] |= {"GF_SERVER_HTTP_ADDR": host, "GF_SERVER_HTTP_PORT": port}
    return {
        "services": found,
        "volumes": {"prometheus": {}, "grafana": {}},
        "secrets": {name: {"file": f"./secrets/{name}"} for name in (METRICS_KEY, GRAFANA_PASSWORD)},
    }


def _readme(endpoint: str, address: str) -> str:
    return f"""# Prometheus and Grafana for {endpoint}

Written by `scalellm deploy dashboards`. On the machine on which `scalellm deploy` runs {endpoint}, whose metrics are at
http://{address}/metrics. The files were checked by the readers of those systems; with their containers nobody has run
them.

    mkdir -p -m 700 secrets
    scalellm gateway keys add prometheus > secrets/metrics-key       # any word where the endpoint asks for no key
    head -c 18 /dev/urandom | base64 > secrets/grafana-password      # of the user admin
    chmod 644 secrets/*                                              # other users' containers read them
    docker compose up --detach

Grafana is at http://{_GRAFANA}, Prometheus at http://{_PROMETHEUS}. The dashboard "fleet" shows replicas, nodes, tokens
in flight, each replica's load, restarts, and the cost per hour. How long a stream stood still while it moved to another
replica is not among the metrics: a client sees it in `scalellm_gateway_itl_seconds`.
"""
