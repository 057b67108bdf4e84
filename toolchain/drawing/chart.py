"""What can be drawn, as plain data: bars, stacked bars, lines, tables. It knows no pixels and no library.

Colors are numbers of ``palette.SERIES`` (``color``): the same thing has the same color in every figure of a page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Rows = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Columns, and rows of as many cells."""


def plain(value: float) -> str:
    """1.5 -> ``"1.5"``, 2000 -> ``"2000"``."""
    return f"{value:g}" if abs(value) < 1e4 else f"{value:.0f}"


@dataclass(frozen=True)
class Bar:
    """``value`` None: there is none, and ``label`` says why. ``label`` and ``note`` stand behind the bar."""

    name: str
    value: float | None
    label: str
    note: str = ""
    color: int = 0
    low: float | None = None
    high: float | None = None
    """Where given, a thin line: how far the value may be off."""


@dataclass(frozen=True)
class Bars:
    """Horizontal bars from zero, each as long as its share of the largest."""

    bars: tuple[Bar, ...]
    legend: tuple[tuple[str, int], ...] = ()
    """What colors mean: (text, color)."""

    def rows(self) -> Rows:
        return ("", "value", ""), [(bar.name, bar.label, bar.note) for bar in self.bars]


@dataclass(frozen=True)
class Part:
    """One piece of a stack. ``label`` is its amount as text."""

    name: str
    value: float
    label: str
    color: int
    shade: float = 0.0
    """From 0, the color itself, to 0.75, nearly paper: pieces of one kind share a color."""


@dataclass(frozen=True)
class Stack:
    """Pieces in a row. ``limit``: what there is room for; what goes beyond it is drawn as such."""

    name: str
    parts: tuple[Part, ...]
    limit: float | None = None
    note: str = ""
    """Under the name, soft."""
    label: str = ""
    """Behind the stack: what it comes to."""
    bad: bool = False
    """Whether ``label`` is bad news."""


@dataclass(frozen=True)
class Stacks:
    """Stacked horizontal bars over one axis. A single stack has its amounts in the legend."""

    stacks: tuple[Stack, ...]
    axis: str
    """What the axis shows, with its unit."""
    text: Callable[[float], str] = plain
    room: str = ""
    """What the track behind a stack, as long as its limit, stands for."""

    def rows(self) -> Rows:
        names = list(dict.fromkeys(part.name for stack in self.stacks for part in stack.parts))
        rows = []
        for stack in self.stacks:
            found = {part.name: part.label for part in stack.parts}
            rows.append((stack.name, *(found.get(name, "-") for name in names), stack.label))
        return ("", *names, "in all"), rows


@dataclass(frozen=True)
class Line:
    """``points``: (x, y), x ascending. ``low``, ``high``: y of the band around them. ``floor``: dashed, same color."""

    name: str
    points: tuple[tuple[float, float], ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    floor: tuple[float, ...] = ()
    color: int = 0
    marked: tuple[float, ...] = ()
    """x of the points that get a marker; a line of a few points marks all of them."""
    faint: bool = False
    """For what is not to be had."""


@dataclass(frozen=True)
class Level:
    """A horizontal line: a limit."""

    value: float
    label: str


@dataclass(frozen=True)
class Lines:
    """Curves over common axes."""

    lines: tuple[Line, ...]
    x_axis: str
    y_axis: str
    """What the axes show, with their units."""
    x_text: Callable[[float], str] = plain
    y_text: Callable[[float], str] = plain
    """How ticks and the table write a value."""
    x_log: bool = False
    y_log: bool = False
    x_ticks: tuple[float, ...] = ()
    """Where empty, chosen."""
    levels: tuple[Level, ...] = ()
    floor: str = ""
    """What the dashed lines are, for the legend."""
    band: str = ""
    """What the bands are, for the legend."""

    def rows(self) -> Rows:
        every = sorted({x for line in self.lines for x in line.marked or [x for x, _ in line.points]})
        columns = [self.x_axis]
        for line in self.lines:
            columns += [line.name, f"{line.name}, {self.floor or 'floor'}"] if line.floor else [line.name]
        return columns, [self._row(x) for x in every]

    def _row(self, x: float) -> list[str]:
        cells = [self.x_text(x)]
        for line in self.lines:
            index = next((number for number, point in enumerate(line.points) if point[0] == x), None)
            cells.append("-" if index is None else self.y_text(line.points[index][1]))
            if line.floor:
                cells.append("-" if index is None else self.y_text(line.floor[index]))
        return cells


Chart = Bars | Stacks | Lines


@dataclass(frozen=True)
class Figure:
    """A chart with what a reader must know of it."""

    title: str
    chart: Chart
    caption: str = ""
    """How to read it: a sentence or two below the title."""
    conditions: str = ""
    """What holds for all of it: model, load, sources, dates. Small, below the chart."""


@dataclass(frozen=True)
class Table:
    """Numbers as text, on a page only: a picture leaves tables out."""

    title: str
    columns: tuple[str, ...]
    table_rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    left: frozenset[int] = field(default=frozenset({0}))
    """Columns of words rather than numbers."""
