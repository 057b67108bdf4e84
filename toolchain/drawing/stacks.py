"""Stacked bars on a canvas: pieces over a track as long as what there is room for; what goes beyond it is striped."""

from __future__ import annotations

from math import ceil, floor, log10

from toolchain.drawing.canvas import Canvas, Key, cut, width_of
from toolchain.drawing.chart import Stack, Stacks
from toolchain.drawing.palette import BAD, GRID, INK, NARROW, SMALL, SOFT, TRACK, on, shade

_STEP, _THICK, _AXIS = 42.0, 24.0, 40.0
_ALONE = 40.0
"""Thickness of a single stack."""
_NAMED_STEP = 62.0
_MOST_NAME = 0.3
_TICKS = 6


def keys(chart: Stacks) -> list[Key]:
    """Pieces in the order of the stacks, with amounts where there is one stack; then the track."""
    alone = len(chart.stacks) == 1
    found: dict[str, Key] = {}
    for stack in chart.stacks:
        for part in stack.parts:
            text = f"{part.name} {part.label}" if alone else part.name
            found.setdefault(part.name, Key(text, shade(part.color, part.shade)))
    track = [Key(chart.room, TRACK, "track")] if chart.room and any(one.limit for one in chart.stacks) else []
    return [*found.values(), *track]


def height(chart: Stacks, width: float) -> float:
    return _step(chart, width) * len(chart.stacks) + _AXIS


def _step(chart: Stacks, width: float) -> float:
    if width <= NARROW:
        return _NAMED_STEP
    return _ALONE + 20 if len(chart.stacks) == 1 else _STEP


def draw(canvas: Canvas, chart: Stacks, x: float, y: float, width: float) -> None:
    narrow = width <= NARROW
    named = 0.0 if narrow else max(max(width_of(one.name), width_of(one.note, SMALL)) for one in chart.stacks)
    named = min(named, _MOST_NAME * width)
    left = x + named + (0 if narrow else 14)
    behind = 0.0 if narrow else max(width_of(one.label, SMALL, bold=one.bad) for one in chart.stacks) + 14
    most = max(max(sum(part.value for part in one.parts), one.limit or 0) for one in chart.stacks) or 1.0
    scale = (x + width - left - behind - 2) / most
    step = _step(chart, width)
    bottom = y + step * len(chart.stacks)
    _axis(canvas, chart, left, y, bottom, scale, most)
    for index, stack in enumerate(chart.stacks):
        middle = y + step * index + (step - _THICK / 2 - 12 if narrow else step / 2)
        if narrow:
            _heading(canvas, stack, x, middle - _THICK / 2 - 12, width)
        else:
            _name(canvas, stack, left - 14, middle, named)
        thick = _ALONE if len(chart.stacks) == 1 and not narrow else _THICK
        end = _stack(canvas, stack, index, left, middle, thick, scale)
        if not narrow:
            tone = BAD if stack.bad else SOFT
            canvas.text(end + 10, middle, stack.label, tone=tone, size=SMALL, bold=stack.bad)


def _stack(canvas: Canvas, stack: Stack, index: int, left: float, middle: float, thick: float, scale: float) -> float:
    """Where it ends."""
    top, at = middle - thick / 2, left
    if stack.limit:
        canvas.box(left, top, stack.limit * scale, thick, TRACK, round_=3, gid=f"room-{index}")
    mark = left + (stack.limit or float("inf")) * scale
    for number, part in enumerate(stack.parts):
        size, tone = part.value * scale, shade(part.color, part.shade)
        gap = 1.2 if size > 4 else 0.0
        canvas.box(at, top, size - gap, thick, tone, gid=f"part-{index}-{number}")
        seen = max(0.0, min(at + size, mark) - at)
        if width_of(part.label, SMALL) + 8 <= seen:
            canvas.text(at + seen / 2, middle, part.label, tone=on(tone), size=SMALL, place="center")
        at += size
    if stack.limit is None:
        return at
    if at > mark + 0.5:
        canvas.box(mark, top, at - mark, thick, BAD, hatched=True, gid=f"beyond-{index}")
    tone = BAD if at > mark + 0.5 else INK
    canvas.line((mark, mark), (top - 4, top + thick + 4), tone, wide=2.0)
    return max(at, mark)


def _name(canvas: Canvas, stack: Stack, right: float, middle: float, room: float) -> None:
    away = 7.5 if stack.note else 0.0
    canvas.text(right, middle - away, cut(stack.name, room), place="right")
    if stack.note:
        canvas.text(right, middle + away, cut(stack.note, room, SMALL), tone=SOFT, size=SMALL, place="right")


def _heading(canvas: Canvas, stack: Stack, x: float, middle: float, width: float) -> None:
    """The name at the left, what it comes to at the right; the note between, where it has room."""
    tone = BAD if stack.bad else SOFT
    label = cut(stack.label, max(width - width_of(stack.name) - 10, 0.55 * width), SMALL, bold=stack.bad)
    canvas.text(x + width, middle, label, tone=tone, size=SMALL, bold=stack.bad, place="right")
    room = width - width_of(label, SMALL, bold=stack.bad) - 10
    name = cut(stack.name, room)
    canvas.text(x, middle, name)
    room -= width_of(name) + 8
    if stack.note and width_of(stack.note, SMALL) <= room:
        canvas.text(x + width_of(name) + 8, middle, stack.note, tone=SOFT, size=SMALL)


def _axis(canvas: Canvas, chart: Stacks, left: float, top: float, bottom: float, scale: float, most: float) -> None:
    for tick in ticks(most):
        at = left + tick * scale
        canvas.line((at, at), (top, bottom), GRID)
        canvas.text(at, bottom + 10, chart.text(tick), tone=SOFT, size=SMALL, place="center" if tick else "left")
    canvas.text(left, bottom + 29, chart.axis, tone=SOFT, size=SMALL)


def ticks(most: float) -> list[float]:
    """Round numbers from 0 to ``most``, about six of them: 0, 5, 10, 15, 20 up to 24."""
    power = 10.0 ** floor(log10(most / _TICKS))
    step = next(power * times for times in (1, 2, 5, 10) if most / (power * times) <= _TICKS)
    return [step * number for number in range(ceil(most / step + 1e-9)) if step * number <= most]
