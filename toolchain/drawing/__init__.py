"""Pictures of numbers: charts as plain data in; an SVG, a PNG or one HTML page that needs no network out.

    figure = Figure("Score by device", Bars((Bar("RTX 4090", 20.0, "20.0"),)), conditions="TTFT p50, 512 tokens in")
    save([figure], Path("score.html"), title="Economic score")

``chart`` holds what can be drawn, ``palette`` the one style, ``canvas`` and its neighbors how it is drawn, ``page`` the
HTML. matplotlib is imported when something is drawn, and nowhere else. What the numbers mean is not known here, but
for ``plans``, which turns plans and comparisons into figures.
"""

from toolchain.drawing.chart import Bar, Bars, Figure, Level, Line, Lines, Part, Stack, Stacks, Table
from toolchain.drawing.save import ENDINGS, check, save

__all__ = [
    "ENDINGS",
    "Bar",
    "Bars",
    "Figure",
    "Level",
    "Line",
    "Lines",
    "Part",
    "Stack",
    "Stacks",
    "Table",
    "check",
    "save",
]
