"""Reports as figures and tables: what one or several measurements found, side by side. Pure: reports in, charts out.

A report has one color in all figures. It draws nothing, and computes nothing that is not in the reports: the plan's
estimates and floors are those that were written down when the service was measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from toolchain.drawing import Figure, Line, Lines, Table
from toolchain.drawing.palette import SERIES
from toolchain.measuring.report import MemorySample, Report, Request, Run
from toolchain.measuring.statistics import percentile
from toolchain.units import GIB

MOST_LINES = 6
"""In one figure: more are told apart by nobody."""
GROUPS = 8
"""Points of a line, where prompts have many lengths: as many requests in each."""
_PLAN = len(SERIES) - 2  # gray: nothing that was measured
_BAND = (10.0, 90.0)
_MARKED = (50.0, 90.0, 99.0)
_WITH_PLAN = "A plan was made before anything was measured: one prompt at a time, without queue and tokenizer."
_WITHOUT_PLAN = "No plan is drawn in: there is one for recipes that were built for a GPU."

Quantity = Literal["ttft_s", "itl_s", "e2e_s"]


@dataclass(frozen=True)
class Named:
    """A report with the name and the color that it has in all figures."""

    name: str
    color: int
    report: Report


def named(reports: Sequence[Report]) -> list[Named]:
    """Titles, with a number behind those that several have."""
    titles = [one.title for one in reports]
    found = []
    for number, report in enumerate(reports):
        twice = titles.count(report.title) > 1
        name = f"{report.title} ({titles[: number + 1].count(report.title)})" if twice else report.title
        found.append(Named(name, number % _PLAN, report))
    return found


def figures(reports: Sequence[Report]) -> list[Figure | Table]:
    """Everything that a page of reports shows, in order. ``reports``: at least one."""
    every = named(reports)
    made: list[Figure | Table] = [*_lengths(every), *_rates(every)]
    made += _distributions(every, "ttft_s", "Time to first token")
    made += _distributions(every, "itl_s", "Inter-token latency")
    made += _memory(every)
    return made


def _seconds(value: float) -> str:
    """0.0123 -> ``"12.3 ms"``."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1000:.3g} ms"


def _share(value: float) -> str:
    return f"{value:.0f} %"


def _whole(value: float) -> str:
    return f"{value:.0f}"


def _gib(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


# --- time to first token against prompt length -----------------------------------------------------------------------


def _lengths(every: Sequence[Named]) -> Iterator[Figure]:
    """A line for each load of a report, or for the lightest load of each of several; and what the plan said.

    None where all prompts are of one length: the distributions tell it.
    """
    lines = []
    for one in every:
        loads = list(dict.fromkeys(str(run.conditions.load) for run in one.report.runs))
        for load in loads if len(every) == 1 else loads[:1]:
            runs = [run for run in one.report.runs if str(run.conditions.load) == load]
            if points := sorted(point for run in runs for point in _points(run)):
                lines.append(_with_band(f"{one.name}, {load}" if len(every) > 1 else load, one.color, points))
    plans = [line for one in every if (line := _planned(one, every))]
    if not lines or len({x for line in (*lines, *plans) for x, _ in line.points}) < 2:
        return
    shown = _told_apart(lines[:MOST_LINES])
    yield Figure(
        "Time to first token against prompt length",
        Lines(
            (*shown, *plans),
            "tokens of the prompt",
            "time to first token",
            _whole,
            _seconds,
            x_log=True,
            y_log=True,
            x_ticks=tuple(sorted({x for line in (*shown, *plans) for x, _ in line.points})),
            floor="the least that the data sheet allows" if plans else "",
            band="10 to 90 % of requests" + ("; of a plan, its error" if plans else ""),
        ),
        caption="Medians. " + (_WITH_PLAN if plans else _WITHOUT_PLAN),
    )


def _points(run: Run) -> Iterator[tuple[float, float, float, float]]:
    """(tokens, median, low, high): of all requests of one length, or of groups of equally many of many lengths."""
    good = [one for one in run.requests if one.ttft_s is not None]
    for group in [good] if run.conditions.input_tokens else _groups(good):
        if group:
            values = [one.ttft_s or 0.0 for one in group]
            middle, low, high = (percentile(values, percent) for percent in (50.0, *_BAND))
            yield percentile([one.input_tokens for one in group], 50), middle, low, high


def _groups(requests: Sequence[Request]) -> Iterator[list[Request]]:
    ordered = sorted(requests, key=lambda one: one.input_tokens)
    size = max(1, -(-len(ordered) // GROUPS))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _with_band(name: str, color: int, points: Sequence[tuple[float, float, float, float]]) -> Line:
    """Points at the same place become one: the first."""
    single = [next(same) for _, same in groupby(points, key=lambda point: point[0])]
    xs, middles, lows, highs = zip(*single, strict=True)
    return Line(name, tuple(zip(xs, middles, strict=True)), lows, highs, color=color)


def _planned(one: Named, every: Sequence[Named]) -> Line | None:
    told = one.report.predicted
    if not told:
        return None
    points = tuple((float(at.tokens), at.seconds) for at in told.ttft)
    low, high = (tuple(value * factor for _, value in points) for factor in (1 / told.ttft_factor, told.ttft_factor))
    name = "the plan" if len(every) == 1 else f"the plan of {one.name}"
    return Line(name, points, low, high, tuple(at.floor_s for at in told.ttft), _PLAN + (one.color % 2))


# --- throughput against latency --------------------------------------------------------------------------------------


def _rates(every: Sequence[Named]) -> Iterator[Figure]:
    """Tokens per second over the time to first token, a point for each load; lengths together where lines are few."""
    sizes = [size for size in _sizes(every) if any(len(_rate_points(one, size)) > 1 for one in every)]
    together = [sizes] if len(sizes) * len(every) <= MOST_LINES else [[size] for size in sizes]
    for shown in together:
        lines = [
            Line(_label(one, every, _in(size) if len(shown) > 1 else ""), points, color=one.color)
            for size in shown
            for one in every
            if (points := _rate_points(one, size))
        ]
        if lines:
            axes = "time to first token, median", "tokens per second"
            yield Figure(
                "Throughput against latency" + (f", {_in(shown[0])}" if len(shown) == 1 else ""),
                Lines(_told_apart(lines[:MOST_LINES]), *axes, _seconds, _whole, x_log=True),
                caption=f"A point for each load: {', '.join(_loads(every, *shown))}. Up and to the left is better.",
            )


def _rate_points(one: Named, size: int | None) -> tuple[tuple[float, float], ...]:
    """(TTFT p50, tokens per second) of each run, by TTFT."""
    timed = [(run, values) for run in _runs(one, size) if (values := run.values("ttft_s"))]
    return tuple(sorted((percentile(values, 50), float(run.summary()["tokens_per_s"])) for run, values in timed))


def _loads(every: Sequence[Named], *sizes: int | None) -> list[str]:
    return list(dict.fromkeys(str(run.conditions.load) for size in sizes for one in every for run in _runs(one, size)))


# --- distributions ---------------------------------------------------------------------------------------------------


def _distributions(every: Sequence[Named], quantity: Quantity, title: str) -> Iterator[Figure]:
    """For each prompt length the share of requests that took at most so long; by load, too, where lines are many."""
    for size in _sizes(every):
        loads = _loads(every, size)
        together = [loads] if len(loads) * len(every) <= MOST_LINES else [[load] for load in loads]
        for shown in together:
            lines = [
                _distribution(_label(one, every, load if len(shown) > 1 else ""), values, one.color)
                for load in shown
                for one in every
                if (values := [at for run in _runs(one, size, load) for at in run.values(quantity)])
            ]
            if lines:
                of = f", {shown[0]}" if len(shown) == 1 else ""
                yield Figure(
                    f"{title}, {_in(size)}{of}",
                    Lines(_told_apart(lines[:MOST_LINES]), title.lower(), "share of the requests", _seconds, _share),
                    caption="The share that took at most so long, marked at 50, 90 and 99 %. Steeper is steadier.",
                )


def _distribution(name: str, values: Sequence[float], color: int) -> Line:
    """The percentiles of a sample, from the least to the most, marked at those that tables tell."""
    size = len(values)
    inner = {100.0 * number / (size - 1) for number in range(size)} if size > 1 else set()
    percents = sorted({0.0, 100.0, *_MARKED, *inner})
    points = tuple((percentile(values, percent), percent) for percent in percents)
    marked = tuple(x for x, percent in points if percent in _MARKED)
    return Line(name, points, color=color, marked=marked)


# --- memory ----------------------------------------------------------------------------------------------------------


def _memory(every: Sequence[Named]) -> Iterator[Figure]:
    """Of servers and GPUs over the time that was measured, run after run, without the pauses between."""
    servers, gpus = [], []
    for one in every:
        points = [(at, sample.rss_bytes / GIB) for at, sample in _samples(one) if sample.rss_bytes is not None]
        if points:
            servers.append(Line(one.name, tuple(points), color=one.color, marked=(points[-1][0],)))
        for number, name in enumerate(one.report.watched.gpus if one.report.watched else ()):
            used = [(at, sample.gpu_bytes[number] / GIB) for at, sample in _samples(one) if sample.gpu_bytes]
            if used:
                gpus.append(Line(f"{_label(one, every, name)}", tuple(used), color=one.color, marked=(used[-1][0],)))
    for lines, title, caption in (
        (servers, "Memory of the servers", "RSS of their processes, summed: pages that several share count for each."),
        (gpus, "Memory of the GPUs", "What is used of each, whoever uses it."),
    ):
        if lines:
            drawn = Lines(_told_apart(lines[:MOST_LINES]), "seconds measured", "GiB", _whole, _gib)
            yield Figure(title, drawn, caption=f"{caption} Run after run, without the warm-up between.")


def _samples(one: Named) -> Iterator[tuple[float, MemorySample]]:
    """(seconds since the first run began, what was seen)."""
    begin = 0.0
    for run in one.report.runs:
        for sample in run.memory:
            yield round(begin + sample.at_s, 3), sample
        begin += max(run.wall_s, run.memory[-1].at_s if run.memory else 0.0)


# --- words -----------------------------------------------------------------------------------------------------------


def _sizes(every: Sequence[Named]) -> list[int | None]:
    """Prompt lengths, the many lengths of a file last."""
    found = {run.conditions.input_tokens for one in every for run in one.report.runs}
    return sorted(found, key=lambda size: (size is None, size or 0))


def _runs(one: Named, size: int | None, load: str | None = None) -> list[Run]:
    return [
        run
        for run in one.report.runs
        if run.conditions.input_tokens == size and (load is None or str(run.conditions.load) == load)
    ]


def _in(size: int | None) -> str:
    return "prompts of many lengths" if size is None else f"{size} tokens in"


def _label(one: Named, every: Sequence[Named], more: str) -> str:
    """What a line is called: by what differs between the lines of its figure."""
    return ", ".join(([one.name] if len(every) > 1 or not more else []) + ([more] if more else []))


def _told_apart(lines: Sequence[Line]) -> tuple[Line, ...]:
    """The reports' own colors, unless two lines are of one report: then each line has a color."""
    if len({line.color for line in lines}) == len(lines):
        return tuple(lines)
    return tuple(replace(line, color=number % _PLAN) for number, line in enumerate(lines))
