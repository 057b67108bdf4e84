"""Horizontal bars on a canvas. On a narrow one the name stands above its bar."""

from __future__ import annotations

from toolchain.drawing.canvas import Canvas, Key, cut, width_of
from toolchain.drawing.chart import Bar, Bars
from toolchain.drawing.palette import GRID, INK, NARROW, SMALL, SOFT, TEXT, Tone, shade

_STEP, _THICK, _GAP = 36.0, 20.0, 8.0
_NAMED_STEP = 50.0
"""Of a bar below its name."""
_MOST_NAME = 0.34
"""Of the width."""
_LEAST_BARS = 0.28


def keys(chart: Bars) -> list[Key]:
    return [Key(text, shade(color, 0)) for text, color in chart.legend]


def height(chart: Bars, width: float) -> float:
    step = _NAMED_STEP if width <= NARROW else _STEP
    return step * len(chart.bars)


def draw(canvas: Canvas, chart: Bars, x: float, y: float, width: float) -> None:
    """The longest bar leaves room for what stands behind it, so that nothing overlaps."""
    narrow = width <= NARROW
    names = 0.0 if narrow else min(max((width_of(bar.name) for bar in chart.bars), default=0), _MOST_NAME * width)
    left = x + names + (0 if narrow else 12)
    behind = max((_behind(bar, below=narrow) for bar in chart.bars), default=0)
    room = max(x + width - left - behind - _GAP, _LEAST_BARS * width)
    most = max(map(_end, chart.bars), default=0) or 1.0
    step = _NAMED_STEP if narrow else _STEP
    for index, bar in enumerate(chart.bars):
        middle = y + step * index + (step - _THICK / 2 - 8 if narrow else step / 2)
        if narrow:
            _name_above(canvas, bar, x, middle - 20, width)
        else:
            canvas.text(left - 12, middle, cut(bar.name, names), place="right")
        size = room * (bar.value or 0.0) / most
        canvas.box(left, middle - _THICK / 2, size, _THICK, shade(bar.color, 0), round_=3, gid=f"bar-{index}")
        if bar.low is not None and bar.high is not None:
            _whisker(canvas, left + room * bar.low / most, left + room * bar.high / most, middle)
            size = room * _end(bar) / most
        at = left + size + (_GAP if size or not narrow else 0)
        canvas.text(at, middle, bar.label, bold=bar.value is not None, tone=_tone(bar))
        if not narrow:
            at += width_of(bar.label, bold=bar.value is not None) + _GAP
            canvas.text(at, middle, cut(bar.note, x + width - at, SMALL), tone=SOFT, size=SMALL)
    if not narrow:
        canvas.line((left - 0.5, left - 0.5), (y, y + height(chart, width)), GRID)


def _end(bar: Bar) -> float:
    return max(bar.value or 0.0, bar.high or 0.0)


def _whisker(canvas: Canvas, low: float, high: float, middle: float) -> None:
    canvas.line((low, high), (middle, middle), INK, wide=1.2)
    for end in (low, high):
        canvas.line((end, end), (middle - 4, middle + 4), INK, wide=1.2)


def _tone(bar: Bar) -> Tone:
    return INK if bar.value is not None else SOFT


def _name_above(canvas: Canvas, bar: Bar, x: float, middle: float, width: float) -> None:
    room = width - width_of(bar.note, SMALL) - _GAP
    name = cut(bar.name, max(room, 0.5 * width))
    canvas.text(x, middle, name)
    at = x + width_of(name) + _GAP
    canvas.text(x + width, middle, cut(bar.note, x + width - at, SMALL), tone=SOFT, size=SMALL, place="right")


def _behind(bar: Bar, *, below: bool) -> float:
    label = width_of(bar.label, TEXT, bold=bar.value is not None)
    return label if below else label + _GAP + width_of(bar.note, SMALL)
