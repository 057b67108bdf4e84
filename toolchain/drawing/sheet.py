"""Figures on a canvas, one below the other: title, caption, legend, chart, conditions. Or a chart alone, for a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from toolchain.drawing import bars, lines, stacks
from toolchain.drawing.canvas import Canvas, legend_height, styled, wrapped
from toolchain.drawing.chart import Bars, Figure, Stacks
from toolchain.drawing.palette import INK, SMALL, SOFT, TEXT, TITLE, WIDE, Tone

_EDGE, _BETWEEN = 28.0, 34.0
_LINE = 1.45
"""Height of a line of text, in its size."""


@dataclass(frozen=True)
class _Block:
    """Lines of text of one size."""

    lines: tuple[str, ...]
    size: float
    tone: Tone
    bold: bool = False

    @property
    def height(self) -> float:
        return len(self.lines) * self.size * _LINE

    def draw(self, canvas: Canvas, x: float, y: float) -> None:
        for row, text in enumerate(self.lines):
            middle = y + (row + 0.5) * self.size * _LINE
            canvas.text(x, middle, text, tone=self.tone, size=self.size, bold=self.bold)


def picture(figures: Sequence[Figure], title: str = "", width: float = WIDE) -> Canvas:
    """All figures on one sheet of paper."""
    inner = width - 2 * _EDGE
    head = _block(title if len(figures) > 1 else "", inner, TITLE + 3, INK, bold=True)
    y = _EDGE + head.height + (14 if head.lines else 0)
    with styled():
        height = y + sum(_height(figure, inner) for figure in figures) + _BETWEEN * (len(figures) - 1) + _EDGE - 8
        canvas = Canvas(width, height, paper=True)
        head.draw(canvas, _EDGE, _EDGE)
        for figure in figures:
            y = _draw(canvas, figure, _EDGE, y, inner) + _BETWEEN
        return canvas


def inline(figure: Figure, width: float) -> Canvas:
    """Legend and chart without paper and words, for a page that has both."""
    kind = _kind(figure)
    keys = kind.keys(figure.chart)
    above = legend_height(keys, width) + (10 if keys else 0)
    with styled():
        canvas = Canvas(width, above + kind.height(figure.chart, width) + 4, paper=False)
        canvas.legend(keys, 0, 0, width)
        kind.draw(canvas, figure.chart, 0, above, width)
        return canvas


def _kind(figure: Figure) -> ModuleType:
    return bars if isinstance(figure.chart, Bars) else stacks if isinstance(figure.chart, Stacks) else lines


def _block(text: str, width: float, size: float, tone: Tone, *, bold: bool = False) -> _Block:
    return _Block(tuple(wrapped(text, width, size, bold=bold)), size, tone, bold)


def _blocks(figure: Figure, width: float) -> tuple[_Block, _Block, _Block]:
    title = _block(figure.title, width, TITLE, INK, bold=True)
    return title, _block(figure.caption, width, TEXT, SOFT), _block(figure.conditions, width, SMALL, SOFT)


def _height(figure: Figure, width: float) -> float:
    kind = _kind(figure)
    legend = legend_height(kind.keys(figure.chart), width)
    words = sum(block.height for block in _blocks(figure, width))
    return words + legend + float(kind.height(figure.chart, width)) + 32


def _draw(canvas: Canvas, figure: Figure, x: float, y: float, width: float) -> float:
    """Where it ends."""
    title, caption, conditions = _blocks(figure, width)
    kind = _kind(figure)
    end = y + _height(figure, width)
    title.draw(canvas, x, y)
    caption.draw(canvas, x, y + title.height + 2)
    y += title.height + caption.height + 10
    keys = kind.keys(figure.chart)
    canvas.legend(keys, x, y, width)
    y += legend_height(keys, width) + 8
    kind.draw(canvas, figure.chart, x, y, width)
    conditions.draw(canvas, x, end - conditions.height)
    return end
