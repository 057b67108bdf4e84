"""Reports -> FEDML's economic score, services / (latency x price), with everything that is in it. Pure.

Only measured TTFT of like conditions is scored: prompts, lengths and load are the same in all rows; the number of
services is in the formula, and the pattern matters to those that have several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from toolchain import workspace
from toolchain.device import prices
from toolchain.errors import RejectedError
from toolchain.measuring.compare import FAILED, differences
from toolchain.measuring.report import Report, Run
from toolchain.measuring.statistics import percentile
from toolchain.planning import money

Statistic = Literal["mean", "p50", "p90", "p99"]
_MAY_DIFFER = frozenset({"services", "pattern"})


@dataclass(frozen=True)
class Priced:
    """What an hour of the GPU costs, and who says so."""

    usd_per_hour: float
    vendor: str
    kind: str
    date: str
    source: str


@dataclass(frozen=True)
class Row:
    """One line of the table, with every input."""

    title: str
    device: str | None
    services: int
    pattern: str
    input_tokens: int | None
    output_tokens: int | None
    load: str
    requests: int
    statistic: str
    latency_s: float
    price: Priced
    threshold_s: float | None
    score: float | None
    """None beyond the threshold."""
    break_even_usd_per_hour: float | None = None
    """Above this price it is behind the best of the others; None where no other counts."""


def choose(report: Report, path: str, input_tokens: int | None, load: str | None) -> Run:
    """The one run of a report that is meant. RejectedError, with what there is, where it is not one."""
    found = [
        run
        for run in report.runs
        if (input_tokens is None or run.conditions.input_tokens == input_tokens)
        and (load is None or str(run.conditions.load) == load)
    ]
    if len(found) != 1:
        there = "; ".join(f"{run.conditions.input_tokens or 'mixed'} in, {run.conditions.load}" for run in report.runs)
        raise RejectedError(
            f"{path}: {'several runs' if found else 'no run'} of that kind; it has: {there}",
            hint="--input-tokens N and --concurrency N (or --rate R) name one run",
        )
    return found[0]


def refuse(reports: Mapping[str, Report], runs: Mapping[str, Run]) -> None:
    """RejectedError for what must not be in one table: simulated, failed, not streamed, or unlike the first."""
    first = next(iter(runs))
    for path, run in runs.items():
        failed = sum(1 for one in run.requests if one.error)
        if reports[path].simulated:
            raise RejectedError(f"{path} is simulated: it says nothing of a GPU", hint="measure a real engine")
        if not run.values("ttft_s"):
            raise RejectedError(f"{path} holds no time to first token", hint="measure it through a door that streams")
        if failed > FAILED * len(run.requests):
            raise RejectedError(f"{path}: {failed} of {len(run.requests)} requests failed")
        reasons = list(differences(runs[first].conditions, run.conditions, _MAY_DIFFER))
        patterns = {one.conditions.pattern for one in runs.values() if one.conditions.services > 1}
        if len(patterns) > 1:
            reasons.append("pattern of several services: " + " and ".join(sorted(patterns)))
        if reasons:
            raise RejectedError(
                f"{path} was not measured like {first}:\n" + "\n".join(f"  {reason}" for reason in reasons),
                hint="A is the first report, B this one; score them apart, or measure both alike",
            )


def row(report: Report, run: Run, price: Priced, statistic: Statistic, threshold_s: float | None) -> Row:
    """One report's score, from the TTFT of all its services together."""
    asked, values = run.conditions, run.values("ttft_s")
    latency_s = sum(values) / len(values) if statistic == "mean" else percentile(values, float(statistic[1:]))
    made = money.score(asked.services, latency_s, price.usd_per_hour, threshold_s)
    return Row(
        title=report.title,
        device=report.device,
        services=asked.services,
        pattern=asked.pattern if asked.services > 1 else "one service",
        input_tokens=asked.input_tokens,
        output_tokens=asked.output_tokens,
        load=str(asked.load),
        requests=len(values),
        statistic=f"TTFT {statistic}",
        latency_s=latency_s,
        price=price,
        threshold_s=threshold_s,
        score=made.value,
    )


def with_break_even(rows: Sequence[Row]) -> list[Row]:
    """Each with the price at which it scores what the best of the others does."""
    made = []
    for index, one in enumerate(rows):
        others = [_scored(other) for number, other in enumerate(rows) if number != index and other.score is not None]
        best = max(others, key=lambda other: other.value or 0.0, default=None)
        counts = one.threshold_s is None or one.latency_s <= one.threshold_s
        price = money.break_even_usd_per_hour(one.services, one.latency_s, best) if best and counts else None
        made.append(replace(one, break_even_usd_per_hour=price))
    return made


def _scored(row: Row) -> money.Score:
    return money.Score(row.services, row.latency_s, row.price.usd_per_hour, row.threshold_s, row.score)


def price_of(device_name: str | None, vendor: str, kind: str = "on-demand") -> Priced:
    """A vendor's cheapest price of a device in scalellm's table. RejectedError, with what there is, for none."""
    known = prices(device_name) if device_name else ()
    found = [one for one in known if one.vendor.lower() == vendor.lower() and one.kind == kind]
    if not found:
        there = "; ".join(f"{one.vendor} {one.kind} ${one.usd_per_hour} ({one.date})" for one in known)
        raise RejectedError(
            f"no {kind} price of {vendor or 'any vendor'} for {device_name or 'a device that the report does not name'}"
            + (f"; known: {there}" if there else ""),
            hint=f"--price {device_name + '=' if device_name else ''}USD --vendor NAME",
        )
    one = found[0]
    return Priced(one.usd_per_hour, one.vendor, one.kind, one.date, one.source)


def published() -> list[dict[str, object]]:
    """FEDML's table as published: scores alone, for neither latencies nor prices are in it."""
    return [
        {
            "title": one.title,
            "device": one.device,
            "services": one.services,
            "score": one.score,
            "latency_x_price": one.latency_x_price,
            "measured": False,
            "note": "published, not measured; neither its latency nor its price is known",
        }
        for one in money.published_rows()
    ]


def published_source() -> str:
    """Where the table is from, with its date."""
    facts = workspace.facts("score_table")
    return f"{facts['source']} ({facts['date']})"
