"""Reports as tables of words and numbers: results, conditions, passports, red flags. Pure: reports in, tables out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from toolchain.drawing import Table
from toolchain.measuring.figures import Named, named
from toolchain.measuring.report import Conditions, Report, Run
from toolchain.units import milliseconds

_COLUMNS = ("tokens in", "out", "load", "TTFT p50", "p90", "p99", "ITL p50", "p99", "tokens/s")
_OWN = ("load", "input_tokens", "output_tokens", "prompts_sha256", "distinct_prompts")
"""Conditions of each run; the others are mostly those of all."""


def tables(reports: Sequence[Report]) -> list[Table]:
    """Everything that a page of reports tells beside its figures. ``reports``: at least one."""
    every = named(reports)
    return [_results(every), *_beside_the_plan(every), *_flags(every), _conditions(every), *_passports(every)]


def about(reports: Sequence[Report]) -> list[str]:
    """What stands below the heading of a page."""
    found = []
    for one in named(reports):
        report, asked = one.report, one.report.runs[0].conditions
        where = f"on {report.device}" if report.device else "on a device that the report does not name"
        found.append(
            f"{one.name}: {asked.requests} requests each over {_runs(report)}{_of(report)} {where}, "
            f"{report.created[:10]}, scalellm {report.client.get('scalellm', '?')}."
        )
    return found


def _runs(report: Report) -> str:
    return f"{len(report.runs)} run{'s' * (len(report.runs) > 1)}"


def _of(report: Report) -> str:
    return f", {len(report.services)} services," if len(report.services) > 1 else ""


def _results(every: Sequence[Named]) -> Table:
    whose = ("report",) if len(every) > 1 else ()
    drafts = any(run.acceptance() is not None for one in every for run in one.report.runs)
    rows = tuple(((one.name,) if whose else ()) + _result(run, drafts) for one in every for run in one.report.runs)
    columns = (*whose, *_COLUMNS, *(["drafts accepted"] if drafts else []))
    return Table("Results", columns, rows, left=frozenset({0, 3} if whose else {2}))


def _result(run: Run, drafts: bool) -> tuple[str, ...]:
    asked, found = run.conditions, run.summary()
    cells = [str(asked.input_tokens or "many"), str(asked.output_tokens or "many"), str(asked.load)]
    for name, percents in (("ttft_s", ("p50", "p90", "p99")), ("itl_s", ("p50", "p99"))):
        of = found[name]
        cells += [milliseconds(of[percent]) if of else "-" for percent in percents]
    cells.append(f"{found['tokens_per_s']:.1f}")
    if drafts:
        cells.append("-" if found["draft_acceptance"] is None else f"{100 * found['draft_acceptance']:.0f} %")
    return tuple(cells)


def _beside_the_plan(every: Sequence[Named]) -> Iterator[Table]:
    """Measured TTFT at one request in flight, where the plan says something of that very length."""
    rows = []
    for one in every:
        told = {at.tokens: at for at in one.report.predicted.ttft} if one.report.predicted else {}
        for run in one.report.runs:
            size, alone = run.conditions.input_tokens, run.conditions.load.concurrency == 1
            found = run.summary()["ttft_s"]
            if size in told and alone and run.conditions.services == 1 and found:
                plan, measured = told[size], found["p50"]
                words = (milliseconds(measured), milliseconds(plan.seconds), f"{measured / plan.seconds:.2f}")
                floor = (milliseconds(plan.floor_s), f"{measured / plan.floor_s:.2f}")
                rows.append((one.name, str(size), *words, *floor))
    if rows:
        columns = ("report", "tokens in", "measured", "planned", "measured / planned", "floor", "measured / floor")
        caption = "One request at a time. The plan knows neither queue nor tokenizer; the floor is the data sheet's."
        yield Table("Time to first token beside the plan", columns, tuple(rows), caption)


def _flags(every: Sequence[Named]) -> Iterator[Table]:
    """What a reader must know before believing the numbers."""
    rows = [(one.name, "", "simulated: the engine only pretends to compute") for one in every if one.report.simulated]
    rows += [
        (one.name, f"{run.conditions.input_tokens or 'many'} in, {run.conditions.load}", flag)
        for one in every
        for run in one.report.runs
        for flag in run.flags()
    ]
    if rows:
        yield Table("Red flags", ("report", "run", "what"), tuple(rows), left=frozenset({0, 1, 2}))


def _conditions(every: Sequence[Named]) -> Table:
    """A row for each condition, a column for each report; what differs between runs is told once, in order."""
    told = [dict(_conditions_of(one.report)) for one in every]
    return _side_by_side("Conditions", every, told)


def _conditions_of(report: Report) -> Iterator[tuple[str, str]]:
    yield "measured", report.created
    yield "device", report.device or "not told"
    for number, service in enumerate(report.services, 1):
        which = f"service {number}" if len(report.services) > 1 else "service"
        said = " ".join(service.server.values())
        yield which, f"{service.model} by {service.door} at {service.url}" + (f" ({said})" if said else "")
    for name in (name for name in Conditions.model_fields if name not in _OWN):
        values = dict.fromkeys(str(getattr(run.conditions, name)) for run in report.runs)
        yield name.replace("_", " "), ", ".join(values)
    if report.watched:
        yield "memory of", ", ".join(dict.fromkeys(report.watched.processes))
    for name, value in report.client.items():
        yield f"client: {name}", str(value)


def _passports(every: Sequence[Named]) -> Iterator[Table]:
    told = [dict(_flat(one.report.engine or {})) for one in every]
    if any(told):
        yield _side_by_side("Engine passport", every, told)


def _flat(raw: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """``{"limits": {"max_seq_len": 4096}}`` -> ``("limits: max_seq_len", "4096")``; without what is empty."""
    for name, value in raw.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}: ")
        elif isinstance(value, list | tuple):
            yield f"{above}{name}", " ".join(map(str, value))
        elif value is not None:
            yield f"{above}{name}", str(value)


def _side_by_side(title: str, every: Sequence[Named], told: Sequence[Mapping[str, str]]) -> Table:
    names = dict.fromkeys(name for one in told for name in one)
    rows = tuple((name, *(one.get(name, "-") for one in told)) for name in names)
    columns = ("", *(one.name for one in every)) if len(every) > 1 else ("", "")
    return Table(title, columns, rows, left=frozenset(range(len(columns))))
