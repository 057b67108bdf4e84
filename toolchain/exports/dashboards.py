"""Grafana's dashboards, as its JSON model has them: an endpoint for those who use it, its engines, its fleet.

Every metric in them is one that a gateway publishes; a test scrapes one and compares. Another reads them into the
models of Grafana's grafana-foundation-sdk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

DATASOURCE = {"type": "prometheus", "uid": "scalellm"}
_SCHEMA = 39
"""schemaVersion of Grafana 11 and 12; newer ones migrate it."""
_WIDE, _HIGH, _GRID = 12, 8, 24
_GATEWAY = "scalellm_gateway_"


@dataclass(frozen=True)
class Panel:
    """A chart over time: a legend for each query."""

    title: str
    unit: str
    """Grafana's word: ``"s"``, ``"reqps"``, ``"short"``."""
    queries: dict[str, str]
    """Legend -> PromQL."""


def _quantiles(metric: str) -> dict[str, str]:
    rate = f"sum by (le) (rate({_GATEWAY}{metric}_bucket[5m]))"
    return {
        name: f"histogram_quantile({share}, {rate})" for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
    }


def _rate(metric: str, by: str = "") -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({metric}[5m]))"


ENDPOINT = (
    Panel("Requests", "reqps", {"{{route}} {{status}}": _rate(f"{_GATEWAY}requests_total", "route, status")}),
    Panel(
        "At work and waiting",
        "short",
        {"at work": f"sum({_GATEWAY}running)", "waiting": f"sum({_GATEWAY}waiting)"},
    ),
    Panel("Time to first token", "s", _quantiles("ttft_seconds")),
    Panel("Time between tokens", "s", _quantiles("itl_seconds")),
    Panel(
        "Tokens",
        "short",
        {
            "answers, per second": _rate(f"{_GATEWAY}completion_tokens_total"),
            "prompts, per second": _rate(f"{_GATEWAY}prompt_tokens_total"),
        },
    ),
    Panel("Whole requests", "s", _quantiles("request_seconds")),
)
ENGINES = (
    Panel("Generating", "short", {"{{triton}}": f"max by (triton) ({_GATEWAY}triton_up)"}),
    Panel(
        "Sent again, and given up by clients",
        "reqps",
        {"sent again": _rate(f"{_GATEWAY}retries_total"), "given up": _rate(f"{_GATEWAY}cancelled_total")},
    ),
    Panel(
        "Requests by engine",
        "reqps",
        {"{{triton}} {{model}}": _rate("nv_inference_request_success_total", "triton, model")},
    ),
    Panel(
        "Time in Triton's queue, for each request",
        "µs",
        {
            "{{triton}} {{model}}": f"{_rate('nv_inference_queue_duration_us_total', 'triton, model')}"
            f" / {_rate('nv_inference_request_success_total', 'triton, model')}"
        },
    ),
)
_EACH = "{{node}}/{{replica}}"


def _each(metric: str) -> str:
    return f"max by (node, replica) (scalellm_replica_{metric})"


FLEET = (
    Panel(
        "Replicas",
        "short",
        {"ready": "max(scalellm_fleet_replicas_ready)", "wanted": "max(scalellm_fleet_replicas_wanted)"},
    ),
    Panel(
        "Nodes and GPUs",
        "short",
        {
            "nodes": "max(scalellm_fleet_nodes)",
            "GPUs at work": "max(scalellm_fleet_gpus)",
            "nodes without a price": "max(scalellm_fleet_unpriced_nodes)",
        },
    ),
    Panel("Tokens in flight", "short", {"tokens": "max(scalellm_fleet_tokens_in_flight)"}),
    Panel(
        "Requests that wait",
        "short",
        {"for a place": f"sum({_GATEWAY}waiting)", "for any replica": "max(scalellm_fleet_waiting_requests)"},
    ),
    Panel("Tokens per second, by replica", "short", {_EACH: _each("tokens_per_second")}),
    Panel("Requests at work, by replica", "short", {_EACH: _each("running")}),
    Panel("KV cache in use", "percentunit", {_EACH: f"{_each('kv_blocks_used')} / {_each('kv_blocks')}"}),
    Panel("Cost per hour, in US dollars", "currencyUSD", {"nodes in use": "max(scalellm_fleet_cost_usd_per_hour)"}),
    Panel(
        "Restarts of workers",
        "short",
        {_EACH: "max by (node, replica) (increase(scalellm_replica_restarts_total[5m]))"},
    ),
    Panel(
        "Requests asked again after a loss",
        "reqps",
        {"asked again": _rate(f"{_GATEWAY}retries_total"), "given up by clients": _rate(f"{_GATEWAY}cancelled_total")},
    ),
)
BOARDS = {"endpoint": ENDPOINT, "engines": ENGINES}
"""Of one gateway in front of Tritons."""
FLEET_BOARDS = {"endpoint": ENDPOINT, "fleet": FLEET}
"""Of the head of an endpoint that ``scalellm deploy`` runs."""


def texts(endpoint: str, boards: Mapping[str, tuple[Panel, ...]] = BOARDS) -> Iterator[tuple[str, str]]:
    """(name of the file, JSON) of each dashboard."""
    for name, panels in boards.items():
        yield f"{name}.json", json.dumps(_board(endpoint, name, panels), indent=2) + "\n"


def _board(endpoint: str, name: str, panels: tuple[Panel, ...]) -> dict[str, Any]:
    return {
        "uid": f"scalellm-{name}",
        "title": f"{endpoint}: {name}",
        "tags": ["scalellm"],
        "schemaVersion": _SCHEMA,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": []},
        "annotations": {"list": []},
        "panels": [_panel(number, panel) for number, panel in enumerate(panels)],
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    across = _GRID // _WIDE
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "datasource": DATASOURCE,
        "gridPos": {"x": number % across * _WIDE, "y": number // across * _HIGH, "w": _WIDE, "h": _HIGH},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + place), "datasource": DATASOURCE, "expr": query, "legendFormat": legend}
            for place, (legend, query) in enumerate(panel.queries.items())
        ],
    }
