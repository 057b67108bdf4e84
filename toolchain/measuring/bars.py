"""A bar plot of scores as one SVG file that needs nothing else. Pure: rows in, text out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _LEFT, _RIGHT, _STEP, _BAR, _TOP = 960, 250, 330, 44, 26, 64
_MEASURED, _PUBLISHED = "#2563eb", "#94a3b8"


@dataclass(frozen=True)
class Bar:
    """``value`` None: beyond the threshold. ``note`` stands behind the value."""

    name: str
    value: float | None
    note: str
    measured: bool


def svg(bars: Sequence[Bar], title: str, below: str) -> str:
    """Bars from the top down, each as long as its share of the largest; published ones gray."""
    most = max((bar.value for bar in bars if bar.value is not None), default=1.0)
    room = _WIDTH - _LEFT - _RIGHT
    lines = []
    for index, bar in enumerate(bars):
        y = _TOP + index * _STEP
        size = room * (bar.value or 0.0) / most
        color = _MEASURED if bar.measured else _PUBLISHED
        value = "beyond the threshold" if bar.value is None else f"{bar.value:.3f}"
        lines += [
            f'<text x="{_LEFT - 12}" y="{y + 18}" text-anchor="end" class="name">{escape(bar.name)}</text>',
            f'<rect x="{_LEFT}" y="{y}" width="{size:.1f}" height="{_BAR}" rx="3" fill="{color}"/>',
            f'<text x="{_LEFT + size + 8:.1f}" y="{y + 18}"><tspan class="value">{value}</tspan> '
            f'<tspan class="note">{escape(bar.note)}</tspan></text>',
        ]
    height = _TOP + len(bars) * _STEP + 36
    style = (
        "text{font:13px system-ui,-apple-system,'Segoe UI',sans-serif;fill:#0f172a}"
        ".title{font-size:18px;font-weight:600}.value{font-weight:600}.note,.below{fill:#64748b;font-size:12px}"
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}">',
            f"<style>{style}</style>",
            f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
            f'<text x="24" y="36" class="title">{escape(title)}</text>',
            *lines,
            f'<text x="24" y="{height - 16}" class="below">{escape(below)}</text>',
            "</svg>\n",
        ]
    )
