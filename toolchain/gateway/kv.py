"""How full an engine's KV cache is: from its Triton's metrics, or from the file in which our own engines write it.

TensorRT-LLM's backend reports ``nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used"|"max"|...}``
(https://github.com/triton-inference-server/tensorrtllm_backend, README, "Triton Metrics", read 2026-11).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

_FAMILY = "nv_trt_llm_kv_cache_block_metrics"
_KIND = "kv_cache_block_type"
_MODEL = "tensorrt_llm"
"""Not the draft model, which has a cache of its own."""


@dataclass(frozen=True)
class Blocks:
    """Of one engine's paged cache."""

    used: int
    total: int


def blocks_of(metrics: str, status_file: Path | None) -> Blocks | None:
    """From Prometheus' text, else from the status file; None where neither says it."""
    return _of_metrics(metrics) or (_of_file(status_file) if status_file else None)


def _of_metrics(text: str) -> Blocks | None:
    found: dict[str, float] = {}
    lines = [line for line in text.splitlines() if line.startswith(_FAMILY)]
    try:
        for family in text_string_to_metric_families("\n".join(lines) + "\n"):
            for sample in family.samples:
                if sample.labels.get("model", _MODEL) == _MODEL:
                    found[sample.labels.get(_KIND, "")] = sample.value
    except ValueError:
        return None
    if "used" not in found or not found.get("max"):
        return None
    return Blocks(int(found["used"]), int(found["max"]))


def _of_file(file: Path) -> Blocks | None:
    try:
        told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        total = int(told["kv_blocks"])
        return Blocks(round(total * float(told["kv_usage_percent"]) / 100), total) if total else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
