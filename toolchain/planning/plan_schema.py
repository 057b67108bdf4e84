"""What ``scalellm plan --json`` prints, as JSON Schema: a plan, or a comparison.

Published in ``docs/plan.schema.json``. It makes neither.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model

from toolchain.device import Price
from toolchain.engine import Limits
from toolchain.planning.build_peaks import Peak
from toolchain.planning.choice import BreakEven
from toolchain.planning.decisions import Decision
from toolchain.planning.forecast import Forecast
from toolchain.planning.gate import Gate
from toolchain.planning.load import Load, Slo
from toolchain.planning.memory import MemoryLine
from toolchain.planning.option import Option
from toolchain.recipe import Calibration

FILE = "plan.schema.json"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MemoryJson(_Part):
    """Where the memory of the device goes, in bytes."""

    lines: list[MemoryLine]
    total: int
    available: int | None
    fits: bool
    kv_bytes_per_token: int
    max_kv_tokens: int
    sequences_at_full_length: int
    kv_bytes_per_sequence: int
    services: int
    free_bytes: int | None


class PlanJson(_Part):
    """A recipe with nothing left open."""

    recipe: str
    model: str
    backend: Literal["tensorrt_engine", "tensorrt_llmapi", "openvino"]
    release: str | None
    container: str | None
    device: str
    sm: int | None
    dtype: str
    weights: str
    group_size: int | None
    kv: str
    limits: Limits
    max_kv_tokens: int
    threads: int | None
    precision: str | None
    tp: int
    pp: int
    services: int
    context_fmha: bool
    paged_context_fmha: bool
    gate: Gate | None
    memory: MemoryJson
    latency: Forecast | None
    prices: list[Price]
    decisions: list[Decision]
    warnings: list[str]
    build_peaks: list[Peak]
    window: int = Field(default=0, description="Only with a window over the cache.")
    sinks: int = 0
    draft_tokens: int = Field(default=0, description="Only with a draft model or prompt lookup.")
    lookup: int = Field(default=0, description="Tokens that are looked for; only with prompt lookup.")
    kv_reuse: bool = Field(default=True, description="Only where the recipe turns the prefix cache off.")
    method: str | None = Field(default=None, description="From here on: only where the checkpoint is calibrated.")
    clip: bool | None = None
    fp8_scales: str | None = None
    smoothquant_alpha: float | None = None
    propagate: str | None = None
    calibration: Calibration | None = None


def _option_json() -> type[BaseModel]:
    """The fields of an option but its plan, and what a comparison says of it."""
    hints = get_type_hints(Option)
    fields: dict[str, Any] = {
        one.name: (hints[one.name], ...) for one in dataclasses.fields(Option) if one.name != "plan"
    }
    more = {"rank": int, "name": str, "fits": bool, "pareto": bool, "verdict": str | None, "price_age_days": int | None}
    fields |= {name: (kind, ...) for name, kind in more.items()}
    made: type[BaseModel] = create_model("OptionJson", __base__=_Part, **fields)
    return made


OptionJson = _option_json()


class ChoiceJson(_Part):
    """Options for one model, best first."""

    estimates: str
    goal: Literal["ttft", "throughput", "density", "cost"]
    load: Load
    slo: Slo
    today: str
    options: list[OptionJson]  # type: ignore[valid-type]
    break_even: list[BreakEven]


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of both."""
    parts: dict[str, Any] = {}
    for model in (PlanJson, ChoiceJson):
        body = model.model_json_schema(mode="serialization", ref_template="#/$defs/{model}")
        parts |= body.pop("$defs", {})
        parts[model.__name__] = body
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": FILE,
        "title": "what scalellm plan --json prints",
        "anyOf": [{"$ref": "#/$defs/PlanJson"}, {"$ref": "#/$defs/ChoiceJson"}],
        "$defs": dict(sorted(parts.items())),
    }
