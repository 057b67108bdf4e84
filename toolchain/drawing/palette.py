"""The one style of every picture: colors for light and dark paper, fonts, sizes in pixels.

The series are the colors of Okabe and Ito, which people with any of the common kinds of color blindness can tell apart
(https://jfly.uni-koeln.de/color/, 2008), in an order that keeps neighbors apart in brightness too; their yellow is left
out, because it cannot be seen on white. For dark paper they are lighter. No meaning hangs on color alone: lines have
markers, bars have names.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tone:
    """A color on light and on dark paper, as ``#rrggbb``; ``name`` is its CSS variable."""

    name: str
    light: str
    dark: str


PAPER = Tone("paper", "#ffffff", "#14171c")
INK = Tone("ink", "#1b2430", "#e6e9ee")
SOFT = Tone("soft", "#5b6675", "#9aa5b4")
GRID = Tone("grid", "#e3e7ec", "#2a3039")
TRACK = Tone("track", "#eceff3", "#242a33")
BAD = Tone("bad", "#b3261e", "#ff8a80")
"""Of limits and of what goes beyond them."""
ON_COLOR = {
    (True, True): Tone("on-ll", "#fffffe", "#fffffe"),
    (True, False): Tone("on-ld", "#fefefe", "#111316"),
    (False, True): Tone("on-dl", "#111317", "#fdfdfd"),
    (False, False): Tone("on-dd", "#111318", "#111318"),
}
"""Text on a color: (light on light paper, light on dark paper) -> tone. Each has its own value on light paper."""

SERIES = (
    Tone("c0", "#0072b2", "#4fb0ea"),
    Tone("c1", "#e69f00", "#f0b73c"),
    Tone("c2", "#009e73", "#2fc79c"),
    Tone("c3", "#cc79a7", "#e7a0c8"),
    Tone("c4", "#d55e00", "#ff8f4a"),
    Tone("c5", "#56b4e9", "#a5d8f8"),
    Tone("c6", "#8a94a3", "#7d8896"),
    Tone("c7", "#4b5563", "#c3cad4"),
)
BLUE, ORANGE, GREEN, PINK, VERMILION, SKY, GRAY, DARK = range(8)

TONES = (PAPER, INK, SOFT, GRID, TRACK, BAD, *ON_COLOR.values(), *SERIES)

SHADES = (0.0, 0.3, 0.5, 0.68)
"""How far a color goes toward paper, where one kind has several pieces."""

FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
"""Of SVG and HTML, whose readers have fonts. Places are computed for DejaVu Sans, which is wider than all of them."""

TITLE, TEXT, SMALL = 17.0, 12.5, 11.0
"""Sizes of text."""

WIDE, NARROW = 860, 350
"""Widths of a picture: of files and desktops, and of phones."""


def shade(color: int, amount: float) -> Tone:
    """A series' color, ``amount`` of the way to the paper."""
    tone = SERIES[color % len(SERIES)]
    if not amount:
        return tone
    light, dark = (_mixed(one, paper, amount) for one, paper in ((tone.light, PAPER.light), (tone.dark, PAPER.dark)))
    return Tone(f"{tone.name}-{round(amount * 100)}", light, dark)


def on(tone: Tone) -> Tone:
    """The color of text on a color: on each paper the one that stands out more."""
    return ON_COLOR[_takes_light(tone.light), _takes_light(tone.dark)]


def tones() -> tuple[Tone, ...]:
    """Every color that a picture may have, each with its own value on light paper."""
    return (*TONES, *(shade(color, amount) for color in range(len(SERIES)) for amount in SHADES[1:]))


def css(dark: bool) -> str:
    """``"--ink: #1b2430; ..."``"""
    return " ".join(f"--{tone.name}: {tone.dark if dark else tone.light};" for tone in tones())


def _mixed(color: str, paper: str, amount: float) -> str:
    pairs = ((int(color[at : at + 2], 16), int(paper[at : at + 2], 16)) for at in (1, 3, 5))
    return "#" + "".join(f"{round(one + (other - one) * amount):02x}" for one, other in pairs)


def luminance(color: str) -> float:
    """Relative luminance of ``#rrggbb``, 0 to 1 (WCAG 2.2, https://www.w3.org/TR/WCAG22/#dfn-relative-luminance)."""
    parts = (int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colors, 1 to 21 (WCAG 2.2)."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _takes_light(color: str) -> bool:
    return contrast(color, "#fffffe") > contrast(color, "#111318")
