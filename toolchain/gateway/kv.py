"""How full an engine's KV cache is: from its Triton's metrics, or from the file in which our own engines write it; and
what its drafts were worth, which only that file says.

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


@dataclass(frozen=True)
class Drafts:
    """Of an engine with speculative decoding, since its start: tokens that were drafted, and those that it kept."""

    drafted: int
    accepted: int


def drafts_of(status_file: Path | None) -> Drafts | None:
    """From the status file; None where nothing is drafted, or nobody says so."""
    told = _read(status_file) if status_file else {}
    try:
        return Drafts(int(told["drafted"]), int(told["accepted"]))
    except (ValueError, KeyError, TypeError):
        return None


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
    told = _read(file)
    try:
        total = int(told["kv_blocks"])
        return Blocks(round(total * float(told["kv_usage_percent"]) / 100), total) if total else None
    except (ValueError, KeyError, TypeError):
        return None


def _read(file: Path) -> dict[str, Any]:
    """Empty where there is no file, or no object in it."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}
