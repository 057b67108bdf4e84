"""What Prometheus is told: where the gateways are, and when somebody should look. On metrics that a gateway publishes.

A gateway's ``/metrics`` takes an API key, as its other doors do; Prometheus reads one of its own from a file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolchain.exports.wanted import Wanted

if TYPE_CHECKING:
    from toolchain.fleet.deployment import Deployment

JOB = "scalellm"
_GATEWAY = "scalellm_gateway_"
_EVERY = "10s"
_FULL = 0.8
"""Of the queue: our choice."""
_SLOW_S = 10
"""To the first token, for one in twenty: our choice; the recipe's own limit is in ``accept``."""
_FAILED = 0.05
"""Of the requests: our choice."""


def of_gateway(address: str, key_file: str) -> dict[str, Any]:
    """prometheus.yml for one gateway at a fixed address."""
    return _config({"static_configs": [{"targets": [address]}]}, key_file, "alerts.yaml")


def of_pods(wanted: Wanted) -> dict[str, Any]:
    """prometheus.yml for an endpoint's pods, with the labels by which prometheus-adapter finds whose a metric is."""
    found = {
        "kubernetes_sd_configs": [{"role": "pod", "namespaces": {"names": [wanted.namespace]}}],
        "relabel_configs": [
            _kept("__meta_kubernetes_pod_label_app_kubernetes_io_name", wanted.name),
            _kept("__meta_kubernetes_pod_container_port_name", "openai"),
            {"source_labels": ["__meta_kubernetes_namespace"], "target_label": "namespace"},
            {"source_labels": ["__meta_kubernetes_pod_name"], "target_label": "pod"},
        ],
    }
    return _config(found, f"/etc/prometheus/secrets/{wanted.name}-metrics/key", "alerts.yaml")


def _kept(label: str, value: str) -> dict[str, Any]:
    return {"source_labels": [label], "regex": value, "action": "keep"}


def _config(found: dict[str, Any], key_file: str, rules: str) -> dict[str, Any]:
    job = {
        "job_name": JOB,
        "metrics_path": "/metrics",
        "authorization": {"type": "Bearer", "credentials_file": key_file},
        **found,
    }
    return {
        "global": {"scrape_interval": _EVERY, "evaluation_interval": _EVERY},
        "rule_files": [rules],
        "scrape_configs": [job],
    }


def alerts(wanted: Wanted) -> dict[str, Any]:
    """A file of rules, for gateways in front of Tritons."""
    up = f"{_GATEWAY}triton_up"
    return _rules(
        wanted.deployment,
        _alert("NothingGenerates", f"sum({up}) == 0", "1m", "critical", "No engine of it generates."),
        _alert("ReplicaDown", f"{up} == 0", "5m", "warning", "An engine has been down for long."),
    )


def alerts_of_fleet(deployment: Deployment) -> dict[str, Any]:
    """A file of rules, for the head of an endpoint that ``scalellm deploy`` runs. A wish for none is no alarm."""
    ready, wanted = "scalellm_fleet_replicas_ready", "scalellm_fleet_replicas_wanted"
    return _rules(
        deployment,
        _alert("NothingGenerates", f"{ready} == 0 and {wanted} > 0", "1m", "critical", "No replica of it generates."),
        _alert("ReplicaDown", f"{ready} < {wanted}", "10m", "warning", "Fewer replicas than wanted for long."),
    )


def _rules(deployment: Deployment, *engines: dict[str, Any]) -> dict[str, Any]:
    """``engines``: what is known of those behind the gateway."""
    failed = f'sum(rate({_GATEWAY}requests_total{{status=~"5.."}}[5m]))'
    ttft = f"sum by (le) (rate({_GATEWAY}ttft_seconds_bucket[5m]))"
    full = round(_FULL * deployment.max_queue)
    rules = [
        _alert("GatewayDown", f'up{{job="{JOB}"}} == 0', "1m", "critical", "Its gateway does not answer Prometheus."),
        *engines,
        _alert("QueueFills", f"{_GATEWAY}waiting >= {max(1, full)}", "2m", "warning", "Soon requests get 429."),
        _alert(
            "RequestsFail",
            f"{failed} / sum(rate({_GATEWAY}requests_total[5m])) > {_FAILED:g}",
            *("5m", "critical", "More than one in twenty requests ends with an error of the server."),
        ),
        _alert(
            "FirstTokenLate",
            f"histogram_quantile(0.95, {ttft}) > {_SLOW_S}",
            *("10m", "warning", f"One in twenty requests waits longer than {_SLOW_S} s for its first token."),
        ),
    ]
    named = [one | {"labels": one["labels"] | {"endpoint": deployment.endpoint}} for one in rules]
    return {"groups": [{"name": JOB, "rules": named}]}


def _alert(name: str, expression: str, lasting: str, severity: str, says: str) -> dict[str, Any]:
    return {
        "alert": f"Scalellm{name}",
        "expr": expression,
        "for": lasting,
        "labels": {"severity": severity},
        "annotations": {"summary": says},
    }
