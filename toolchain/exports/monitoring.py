"""What Prometheus is told: where the gateways are, and when somebody should look. On metrics that a gateway publishes.

A gateway's ``/metrics`` takes an API key, as its other doors do; Prometheus reads one of its own from a file.
"""

from __future__ import annotations

from typing import Any

from toolchain.exports.wanted import Wanted

JOB = "scalellm"
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
    """A file of rules."""
    gateway = "scalellm_gateway_"
    failed = f'sum(rate({gateway}requests_total{{status=~"5.."}}[5m]))'
    ttft = f"sum by (le) (rate({gateway}ttft_seconds_bucket[5m]))"
    full = round(_FULL * wanted.deployment.max_queue)
    rules = [
        _alert("GatewayDown", f'up{{job="{JOB}"}} == 0', "1m", "critical", "Its gateway does not answer Prometheus."),
        _alert("NothingGenerates", f"sum({gateway}triton_up) == 0", "1m", "critical", "No engine of it generates."),
        _alert("ReplicaDown", f"{gateway}triton_up == 0", "5m", "warning", "An engine has been down for long."),
        _alert("QueueFills", f"{gateway}waiting >= {max(1, full)}", "2m", "warning", "Soon requests get 429."),
        _alert(
            "RequestsFail",
            f"{failed} / sum(rate({gateway}requests_total[5m])) > {_FAILED:g}",
            *("5m", "critical", "More than one in twenty requests ends with an error of the server."),
        ),
        _alert(
            "FirstTokenLate",
            f"histogram_quantile(0.95, {ttft}) > {_SLOW_S}",
            *("10m", "warning", f"One in twenty requests waits longer than {_SLOW_S} s for its first token."),
        ),
    ]
    return {
        "groups": [
            {"name": JOB, "rules": [one | {"labels": one["labels"] | {"endpoint": wanted.name}} for one in rules]}
        ]
    }


def _alert(name: str, expression: str, lasting: str, severity: str, says: str) -> dict[str, Any]:
    return {
        "alert": f"Scalellm{name}",
        "expr": expression,
        "for": lasting,
        "labels": {"severity": severity},
        "annotations": {"summary": says},
    }
