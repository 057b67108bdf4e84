"""The report of a measurement: conditions, versions, raw times of every request; its schema and what follows from it.

``report.json`` holds what was measured; summaries are in it for readers, and are computed again from the raw times
whenever scalellm reads it. It does not know how requests are sent.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from toolchain import workspace
from toolchain.errors import ArtifactError
from toolchain.measuring.statistics import Summary, summarize

LENGTH_TOLERANCE = 0.02
"""How far the median of measured lengths may be from the claim before a report is flagged."""
LATE_S = 0.01
"""An instrument that sends later than this measures itself."""

_HERE = "\u0001 rows "

Pattern = Literal["one-at-a-time", "staggered", "simultaneous"]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Request(_Model):
    """One request. Times are seconds since the run began; what a failed request lacks is empty."""

    service: int = Field(description="Which of the services, from 0.")
    prompt: int = Field(description="Which prompt of the set, from 0.")
    scheduled_s: float = Field(description="When it was to be sent; latencies count from here.")
    sent_s: float = Field(description="When it was sent.")
    arrivals_s: tuple[float, ...] = Field(description="When each piece with text came; empty without streaming.")
    done_s: float = Field(description="When the answer, or the failure, was complete.")
    input_tokens: int = Field(description="Of the prompt, as the server sees it.")
    output_tokens: int = Field(description="Of the answer.")
    server_output_tokens: int | None = Field(default=None, description="What the server says that it generated.")
    drafts: tuple[int, int] | None = Field(
        default=None, description="Tokens that were drafted for it and accepted, where the server says it."
    )
    error: str | None = Field(default=None, description="Why it failed.")

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return None if self.error or not self.arrivals_s else self.arrivals_s[0] - self.scheduled_s

    @property
    def itl_s(self) -> float | None:
        """Inter-token latency: (last piece - first piece) / (output tokens - 1); None below two pieces or tokens."""
        if self.error or len(self.arrivals_s) < 2 or self.output_tokens < 2:
            return None
        return (self.arrivals_s[-1] - self.arrivals_s[0]) / (self.output_tokens - 1)

    @property
    def e2e_s(self) -> float | None:
        """From the scheduled time to the end of the answer."""
        return None if self.error else self.done_s - self.scheduled_s


class Load(_Model):
    """How requests come: ``closed`` keeps ``concurrency`` in flight, ``open`` sends at a Poisson ``rate_per_s``."""

    kind: Literal["closed", "open"]
    concurrency: int | None = Field(default=None, description="In flight for each service.")
    rate_per_s: float | None = Field(default=None, description="Requests per second for each service.")
    seed: int = 0

    def __str__(self) -> str:
        return f"concurrency {self.concurrency}" if self.kind == "closed" else f"{self.rate_per_s:g} requests/s"


class Conditions(_Model):
    """What two measurements must share to be compared."""

    prompt_set: str = Field(description="roleplay, or the format and name of the user's file.")
    prompts_sha256: str = Field(description="Of all prompts with what was asked of each.")
    distinct_prompts: int = Field(description="How many different prompts each service got.")
    input_tokens: int | None = Field(
        description="The claimed length of every prompt; None for prompts of many lengths."
    )
    output_tokens: int | None = Field(description="What was asked for; None for answers of many lengths.")
    load: Load
    pattern: Pattern
    services: int
    requests: int = Field(description="Measured, for each service.")
    warmup: int = Field(description="Sent before, for each service, and not in the report.")
    streaming: bool
    sampling: str
    counted_by: str = Field(description="Who counted tokens: tokenizer SHA256, server or pieces.")


class MemorySample(_Model):
    """What the servers held at one moment."""

    at_s: float = Field(description="Seconds since the run began.")
    rss_bytes: int | None = Field(description="RSS of all their processes, summed; null when none lived.")
    gpu_bytes: tuple[int, ...] = Field(default=(), description="Used of each GPU, whoever uses it.")


class Run(_Model):
    """All requests of one load."""

    conditions: Conditions
    wall_s: float = Field(description="From the first scheduled time to the last answer.")
    requests: tuple[Request, ...]
    memory: tuple[MemorySample, ...] = Field(default=(), description="Empty for servers on other machines.")

    def of(self, service: int | None) -> tuple[Request, ...]:
        """Of one service; None: of all."""
        return tuple(one for one in self.requests if service is None or one.service == service)

    def values(self, quantity: Literal["ttft_s", "itl_s", "e2e_s"], service: int | None = None) -> list[float]:
        """Of the requests that have it."""
        return [value for one in self.of(service) if (value := getattr(one, quantity)) is not None]

    def errors(self, service: int | None = None) -> dict[str, int]:
        """Reason -> how many."""
        reasons = [one.error for one in self.of(service) if one.error]
        return {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}

    def summary(self, service: int | None = None) -> dict[str, Any]:
        """Latencies, throughput and failures of one service or of all together."""
        good = [one for one in self.of(service) if not one.error]
        found: dict[str, Summary | None] = {
            "ttft_s": summarize(self.values("ttft_s", service)),
            "itl_s": summarize(self.values("itl_s", service)),
            "e2e_s": summarize(self.values("e2e_s", service)),
        }
        return {
            **{name: asdict(value) if value else None for name, value in found.items()},
            "tokens_per_s": sum(one.output_tokens for one in good) / self.wall_s,
            "requests_per_s": len(good) / self.wall_s,
            "draft_acceptance": self.acceptance(service),
            "succeeded": len(good),
            "failed": len(self.of(service)) - len(good),
            "errors": self.errors(service),
        }

    def acceptance(self, service: int | None = None) -> float | None:
        """Accepted over drafted tokens of the requests for which the server says both; None where there are none."""
        told = [one.drafts for one in self.of(service) if one.drafts and not one.error]
        drafted = sum(one for one, _ in told)
        return sum(accepted for _, accepted in told) / drafted if drafted else None

    def flags(self) -> list[str]:
        """What a reader must know before believing the numbers."""
        good = [one for one in self.requests if not one.error]
        asked, found = self.conditions, list[str]()
        if failed := len(self.requests) - len(good):
            found.append(f"{failed} of {len(self.requests)} requests failed; latencies are of the others")
        if not good:
            return found
        for claim, name in ((asked.input_tokens, "input_tokens"), (asked.output_tokens, "output_tokens")):
            middle = median(getattr(one, name) for one in good)
            if claim is not None and abs(middle - claim) > max(1, LENGTH_TOLERANCE * claim):
                found.append(f"{name}: {claim} claimed, but the median is {middle:g}")
        counted = [(one.output_tokens, one.server_output_tokens) for one in good]
        apart = [own for own, server in counted if server is not None and abs(own - server) > max(2, 0.05 * server)]
        if len(apart) > 0.05 * len(good):
            found.append(f"in {len(apart)} answers the tokenizer counts other tokens than the server: is it its own?")
        late = max(one.sent_s - one.scheduled_s for one in good)
        if late > LATE_S:
            found.append(
                f"a request was sent {late * 1000:.0f} ms late: this client was too slow, or all its slots busy"
            )
        if asked.distinct_prompts < asked.requests:
            found.append(
                f"only {asked.distinct_prompts} different prompts for {asked.requests} requests: "
                "a server that keeps prompts in its cache answers a known one sooner"
            )
        if not asked.streaming:
            found.append("not streamed: there is no time to first token")
        return found


class Service(_Model):
    """One of the services that were asked."""

    door: str
    url: str
    model: str
    server: dict[str, str] = Field(description="What it says of itself.")


class Watched(_Model):
    """Whose memory was sampled."""

    processes: tuple[str, ...] = Field(description="Names of the servers' processes, children included.")
    gpus: tuple[str, ...] = Field(description="Names of the machine's GPUs, in the order of gpu_bytes.")
    every_s: float


class Predicted(_Model):
    """What the plan said of one request's time before it was measured."""

    tokens: int = Field(description="Of the prompt; for a next token, in the cache.")
    batch: int
    seconds: float = Field(description="The plan's estimate, without queue, tokenizer and network.")
    floor_s: float = Field(description="What the data sheet's peaks allow at best.")


class Prediction(_Model):
    """The plan's estimates. ``*_factor``: how many times an estimate may be too long or too short."""

    ttft: tuple[Predicted, ...]
    itl: tuple[Predicted, ...]
    ttft_factor: float
    itl_factor: float


class Report(_Model):
    """One measurement."""

    schema_version: Literal[1] = 1
    title: str
    created: str = Field(description="UTC, ISO 8601.")
    simulated: bool = Field(description="Whether an engine only pretended to compute.")
    device: str | None = Field(description="The device that served, by its name in scalellm's table.")
    services: tuple[Service, ...]
    runs: tuple[Run, ...]
    client: dict[str, str | int] = Field(description="The machine and the programs that measured.")
    engine: dict[str, Any] | None = Field(default=None, description="The engine's passport, where it is at hand.")
    recipe: str | None = Field(default=None, description="The recipe's text, where it is at hand.")
    predicted: Prediction | None = Field(default=None, description="Where the plan of the recipe estimates times.")
    watched: Watched | None = Field(default=None, description="Whose memory the runs hold.")


def to_json(report: Report) -> str:
    """The report with summaries and flags beside the raw times."""
    raw = report.model_dump(mode="json")
    for shown, run in zip(raw["runs"], report.runs, strict=True):
        services = run.conditions.services
        shown["flags"] = run.flags()
        shown["summary"] = run.summary()
        shown["summary_by_service"] = [run.summary(number) for number in range(services)]
    lists = [(run, name) for run in raw["runs"] for name in ("requests", "memory") if run[name]]
    rows = [run[name] for run, name in lists]
    for number, (run, name) in enumerate(lists):
        run[name] = f"{_HERE}{number} "
    text = json.dumps(raw, indent=1, ensure_ascii=False)
    for number, each in enumerate(rows):  # a line each, or a long answer's arrivals would be a page each
        lines = ",\n".join("    " + json.dumps(one, ensure_ascii=False) for one in each)
        text = text.replace(json.dumps(f"{_HERE}{number} "), f"[\n{lines}\n   ]", 1)
    return text + "\n"


def write(report: Report, path: Path) -> None:
    """Whole or not at all; ArtifactError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        workspace.write_durably(path, to_json(report).encode())
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror or error}", hint="give another place: --out FILE") from None


def read(path: Path) -> Report:
    """ArtifactError for what is not a report."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        for run in raw["runs"]:
            for computed in ("flags", "summary", "summary_by_service"):
                run.pop(computed, None)
        return Report.model_validate(raw)
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: {error}", hint="scalellm bench --out FILE makes one") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(f"{path}: {where}: {first['msg']}", hint="scalellm bench makes reports") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: not a report of scalellm bench: {error}") from None


def schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of ``report.json``, with the computed parts."""
    found = Report.model_json_schema()
    run = found["$defs"]["Run"]
    run["properties"] |= {
        "flags": {"type": "array", "items": {"type": "string"}},
        "summary": {"type": "object"},
        "summary_by_service": {"type": "array", "items": {"type": "object"}},
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def lengths(values: Sequence[int]) -> int | None:
    """The one length that all have; None for many."""
    return values[0] if len(set(values)) == 1 else None
