"""Curves on a canvas, with bands, floors and limits."""

from __future__ import annotations

from collections.abc import Sequence
from math import isclose
from typing import Any

from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from toolchain.drawing.canvas import Canvas, Key, width_of
from toolchain.drawing.chart import Line, Lines
from toolchain.drawing.palette import BAD, DARK, GRAY, GRID, NARROW, PAPER, SERIES, SMALL, SOFT, shade

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
"""By color, so that lines can be told apart without it."""
_FEW = 12
"""A line of at most so many points has a marker at each."""
_SAME = 0.005
"""Floors that are closer are one."""
_BAND, _THIN_BAND = 0.14, 0.08
"""How much of a band's color is seen: less where many lie on each other."""
_LEFT, _TOP, _BOTTOM = 56.0, 24.0, 46.0


def keys(chart: Lines) -> list[Key]:
    found = [
        Key(line.name, shade(line.color, 0), "faint" if line.faint else "line", _marker(line)) for line in chart.lines
    ]
    if chart.band and any(line.low for line in chart.lines):
        found.append(Key(chart.band, SERIES[GRAY], "band"))
    if chart.floor and any(line.floor for line in chart.lines):
        found.append(Key(chart.floor, SERIES[DARK], "dashed"))
    return [*found, *(Key(level.label, BAD, "level") for level in chart.levels)]


def _marker(line: Line) -> str:
    return MARKERS[line.color % len(MARKERS)]


def height(chart: Lines, width: float) -> float:
    return 280.0 if width <= NARROW else 380.0


def draw(canvas: Canvas, chart: Lines, x: float, y: float, width: float) -> None:
    tall = height(chart, width)
    canvas.text(x, y + 8, chart.y_axis, tone=SOFT, size=SMALL)
    axes = canvas.axes(x + _LEFT, y + _TOP, width - _LEFT - 14, tall - _TOP - _BOTTOM)
    _scales(axes, chart)
    shown = _BAND if len(chart.lines) <= 3 else _THIN_BAND
    for index, line in enumerate(chart.lines):
        _floor(axes, line, index, chart.lines[:index])
        _line(axes, line, index, 0.0 if line.faint else shown)
    for level in chart.levels:
        axes.axhline(level.value, color=BAD.light, linewidth=1.4, linestyle="-.", zorder=4)
    _frame(axes, chart)
    canvas.text(x + width - 14, y + tall - 12, chart.x_axis, tone=SOFT, size=SMALL, place="right")


def _floor(axes: Any, line: Line, index: int, before: Sequence[Line]) -> None:
    """Dashed, where no earlier floor lies already: dashes over dashes would be no dashes."""
    drawn = [dict(zip((x for x, _ in one.points), one.floor, strict=True)) for one in before if one.floor]
    there = [any(isclose(y, one.get(x, 0.0), rel_tol=_SAME) for one in drawn) for (x, _), y in _floored(line)]
    hidden = [here and all(there[max(0, at - 1) : at + 2]) for at, here in enumerate(there)]
    ys = [float("nan") if gone else y for (_, y), gone in zip(_floored(line), hidden, strict=True)]
    if not all(hidden):
        color = SERIES[line.color % len(SERIES)].light
        xs = [x for (x, _), _ in _floored(line)]
        axes.plot(xs, ys, color=color, linewidth=1.4, linestyle=(0, (4, 3)), zorder=2, gid=f"floor-{index}")


def _floored(line: Line) -> list[tuple[tuple[float, float], float]]:
    return list(zip(line.points, line.floor, strict=True)) if line.floor else []


def _line(axes: Any, line: Line, index: int, band: float) -> None:
    color = SERIES[line.color % len(SERIES)].light
    xs, ys = zip(*line.points, strict=True) if line.points else ((), ())
    if line.low and band:
        axes.fill_between(xs, line.low, line.high, color=color, alpha=band, linewidth=0, zorder=1)
    marked = line.marked or (xs if len(xs) <= _FEW else ())
    every = [number for number, value in enumerate(xs) if value in marked]
    axes.plot(
        xs,
        ys,
        color=color,
        linewidth=1.2 if line.faint else 2.2,
        marker=_marker(line) if every else "None",
        markevery=every or None,
        markersize=4.5 if line.faint else 6.5,
        markeredgecolor=PAPER.light,
        markeredgewidth=1,
        zorder=3,
        gid=f"line-{index}",
        clip_on=False,
    )


def _scales(axes: Any, chart: Lines) -> None:
    if chart.x_log:
        axes.set_xscale("log", base=2)
    if chart.y_log:
        axes.set_yscale("log")


def _frame(axes: Any, chart: Lines) -> None:
    axes.margins(x=0.02)
    if not chart.y_log:
        axes.set_ylim(bottom=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(which="both", length=0, labelsize=SMALL, labelcolor=SOFT.light, pad=6)
    axes.grid(visible=True, which="major", color=GRID.light, linewidth=1, zorder=0)
    axes.set_axisbelow(True)
    if chart.x_ticks:
        axes.xaxis.set_major_locator(FixedLocator(_spaced(axes, chart)))
    axes.yaxis.set_major_locator(
        LogLocator(subs=(1.0, 2.0, 5.0)) if chart.y_log else MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
    )
    for axis, text in ((axes.xaxis, chart.x_text), (axes.yaxis, chart.y_text)):
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter(FuncFormatter(lambda value, _place, text=text: text(value)))


def _spaced(axes: Any, chart: Lines) -> list[float]:
    """The ticks from the right whose texts do not touch."""
    kept: list[float] = []
    before = float("inf")
    for tick in sorted(chart.x_ticks, reverse=True):
        at = float(axes.transData.transform((tick, 1))[0])
        half = width_of(chart.x_text(tick), SMALL) / 2
        if at + half + 8 <= before:
            kept.append(tick)
            before = at - half
    return kept
