"""A drawing surface in pixels from the top left, on matplotlib: text that is measured, boxes, rows of a legend.

It knows no charts. The only other modules that know matplotlib are the neighbors that draw on it.
"""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Rectangle

from toolchain.drawing.palette import FONTS, INK, PAPER, SMALL, SOFT, TEXT, Tone

_DPI = 72
"""One point is one pixel."""
SHARP = 2
"""Pixels of a PNG for each of ours."""

_SETTINGS: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same places everywhere
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and copied
    "svg.hashsalt": "scalellm",  # the same picture has the same bytes
    "text.parse_math": False,  # "$0.64/h" is no formula
    "axes.unicode_minus": False,
    "hatch.linewidth": 1.2,
}

_Place = Literal["left", "center", "right"]


@dataclass(frozen=True)
class Key:
    """One entry of a legend. ``kind``: a box, a track, a line, a faint, dashed or level line, a band."""

    text: str
    tone: Tone
    kind: str = "box"
    marker: str = ""


@contextmanager
def styled() -> Iterator[None]:
    """matplotlib with our settings, whatever the person's own are; a font without a letter is no news."""
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        warnings.filterwarnings("ignore", message="Glyph")
        yield


@functools.cache
def _renderer() -> RendererAgg:
    return RendererAgg(1, 1, _DPI)  # type: ignore[no-untyped-call]


@functools.lru_cache(4096)
def width_of(text: str, size: float = TEXT, *, bold: bool = False) -> float:
    """Pixels."""
    font = FontProperties(family="DejaVu Sans", size=size, weight="bold" if bold else "normal")
    found = _renderer().get_text_width_height_descent(text, font, False)  # type: ignore[no-untyped-call]
    return float(found[0])


def wrapped(text: str, width: float, size: float = TEXT, *, bold: bool = False) -> list[str]:
    """Lines of at most ``width`` pixels, broken at spaces; a longer word is cut with an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and width_of(longer, size, bold=bold) <= width:
            lines[-1] = longer
        else:
            lines.append(cut(word, width, size, bold=bold))
    return lines


def cut(text: str, width: float, size: float = TEXT, *, bold: bool = False) -> str:
    """The text, or as much of its beginning as has room, with an ellipsis."""
    if width_of(text, size, bold=bold) <= width:
        return text
    while text and width_of(text + "…", size, bold=bold) > width:
        text = text[:-1]
    return text + "…"


class Canvas:
    """A picture of ``width`` x ``height`` pixels; y grows downward."""

    def __init__(self, width: float, height: float, *, paper: bool) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
        self.figure.patch.set_facecolor(PAPER.light if paper else "none")
        self._sheet = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
        self._sheet.axis("off")
        self._drawn = 0

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        tone: Tone = INK,
        size: float = TEXT,
        bold: bool = False,
        place: _Place = "left",
    ) -> None:
        """A line of text whose middle is at height ``y``."""
        shown = "".join(letter if letter.isprintable() else " " for letter in text)
        weight = "bold" if bold else "normal"
        self._sheet.text(
            x,
            y + size * 0.36,
            shown,
            color=tone.light,
            fontsize=size,
            fontweight=weight,
            ha=place,
            va="baseline",
            zorder=self._next(),
        )

    def _next(self) -> int:
        """What is drawn later lies above."""
        self._drawn += 1
        return self._drawn

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        tone: Tone,
        *,
        round_: float = 0.0,
        gid: str = "",
        hatched: bool = False,
    ) -> None:
        """A filled box; ``hatched``: stripes over what is there already."""
        if width <= 0:
            return
        paint: dict[str, Any] = {"facecolor": tone.light, "linewidth": 0, "zorder": self._next()}
        if hatched:
            paint |= {"facecolor": "none", "edgecolor": tone.light, "linewidth": 1.2, "hatch": "////"}
        corner = min(round_, width / 2, height / 2)
        shape = f"round,pad=0,rounding_size={corner}"
        patch = (
            FancyBboxPatch((x, y), width, height, boxstyle=shape, **paint)
            if corner
            else Rectangle((x, y), width, height, **paint)
        )
        patch.set_gid(gid or None)
        self._sheet.add_patch(patch)

    def line(
        self,
        xs: Sequence[float],
        ys: Sequence[float],
        tone: Tone,
        *,
        wide: float = 1.0,
        style: Literal["-", "--", "-."] = "-",
        marker: str = "",
    ) -> None:
        self._sheet.add_line(
            Line2D(
                xs,
                ys,
                color=tone.light,
                linewidth=wide,
                linestyle=style,
                marker=marker or "None",
                markersize=6,
                markeredgecolor=PAPER.light,
                markeredgewidth=1,
                solid_capstyle="butt",
                zorder=self._next(),
            )
        )

    def axes(self, x: float, y: float, width: float, height: float) -> Any:
        """matplotlib's Axes in this place, for curves."""
        place = (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        found = self.figure.add_axes(place)
        found.patch.set_alpha(0)
        return found

    def legend(self, keys: Sequence[Key], x: float, y: float, width: float) -> None:
        """Entries beside each other, in as many rows as they take (``legend_height``)."""
        for row, placed in enumerate(_rows(keys, width)):
            middle = y + _LEGEND_STEP * (row + 0.5)
            for at, key in placed:
                self._sample(key, x + at, middle)
                begin = at + _sample_width(key)
                self.text(x + begin, middle, cut(key.text, width - begin, SMALL), tone=SOFT, size=SMALL)

    def _sample(self, key: Key, x: float, y: float) -> None:
        ends, sides = (x, x + 20), (y, y)
        if key.kind in ("box", "track"):
            self.box(x, y - 5.5, 12, 11, key.tone, round_=2.5)
        if key.kind == "track":
            self.line((x + 12, x + 12), (y - 7, y + 7), INK, wide=1.6)
        elif key.kind == "band":
            patch = Rectangle((x, y - 5), 20, 10, facecolor=key.tone.light, alpha=0.25, linewidth=0)
            self._sheet.add_patch(patch)
        elif key.kind == "dashed":
            self.line(ends, sides, key.tone, wide=1.4, style="--")
        elif key.kind == "level":
            self.line(ends, sides, key.tone, wide=1.4, style="-.")
        elif key.kind in ("line", "faint"):
            self.line(ends, sides, key.tone, wide=2.0 if key.kind == "line" else 1.2)
            self.line((x + 10,), (y,), key.tone, marker=key.marker)

    def png(self) -> bytes:
        stream = io.BytesIO()
        FigureCanvasAgg(self.figure)
        with styled():
            self.figure.savefig(stream, format="png", dpi=_DPI * SHARP, facecolor=self.figure.get_facecolor())
        return stream.getvalue()

    def svg(self) -> str:
        """The picture as text that stands alone."""
        stream = io.StringIO()
        FigureCanvasSVG(self.figure)
        nothing: dict[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}
        with styled():
            self.figure.savefig(stream, format="svg", facecolor=self.figure.get_facecolor(), metadata=nothing)
        text = re.sub(r"<metadata>.*?</metadata>\s*|<!DOCTYPE.*?>\s*", "", stream.getvalue(), flags=re.DOTALL)
        text = re.sub(rf' id="(?:{_UNUSED})_[\d.]+"', "", text)
        text = re.sub(r'(width|height)="([\d.]+)pt"', r'\1="\2"', text)
        return re.sub(r"font-family: [^;\"]*", f"font-family: {FONTS}", text)


_UNUSED = r"figure|axes|patch|text|line2d|matplotlib\.axis|[xy]tick|\w*Collection"
"""Names that matplotlib gives to everything, the same ones in every picture of a page."""

_GAP, _LEGEND_STEP = 18.0, 20.0


def _sample_width(key: Key) -> float:
    return 18.0 if key.kind in ("box", "track") else 26.0


def _rows(keys: Sequence[Key], width: float) -> list[list[tuple[float, Key]]]:
    """Each entry with its place in its row."""
    rows: list[list[tuple[float, Key]]] = []
    at = width
    for key in keys:
        needed = _sample_width(key) + width_of(key.text, SMALL)
        if not rows or at + needed > width:
            rows.append([])
            at = 0.0
        rows[-1].append((at, key))
        at += needed + _GAP
    return rows


def legend_height(keys: Sequence[Key], width: float) -> float:
    """Pixels that ``Canvas.legend`` takes."""
    return _LEGEND_STEP * len(_rows(keys, width))
