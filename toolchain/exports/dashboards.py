"""Grafana's dashboards, as its JSON model has them: an endpoint for those who use it, and its engines.

Every metric in them is one that a gateway publishes; a test scrapes one and compares. Another reads them into the
models of Grafana's grafana-foundation-sdk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
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
BOARDS = {"endpoint": ENDPOINT, "engines": ENGINES}


def texts(endpoint: str) -> Iterator[tuple[str, str]]:
    """(name of the file, JSON) of each dashboard."""
    for name, panels in BOARDS.items():
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
