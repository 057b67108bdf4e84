"""Promises of ``drawing``: pictures that can be read by everybody, pages that need no network, nothing half written."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from tests.conftest import ROOT
from tests.drawn import Picture
from toolchain.drawing import Bar, Bars, Figure, Level, Line, Lines, Part, Stack, Stacks, Table, save
from toolchain.drawing.canvas import Canvas
from toolchain.drawing.palette import INK, NARROW, PAPER, SERIES, SHADES, SOFT, WIDE, contrast, on, shade, tones
from toolchain.drawing.sheet import inline, picture
from toolchain.errors import ArtifactError, RecipeError

LONG = "a name that somebody gave to a report without thinking of who would have to draw it, $1.50 <b>&</b>"


def part(name: str, value: float, color: int) -> Part:
    return Part(name, value, f"{value:g} GiB", color)


BARS = Figure(
    "Bars",
    Bars(
        (Bar("short", 20.0, "20.0", "100 ms, $0.64/h"), Bar(LONG, 5.0, "5.0", LONG, 6), Bar("none", None, "beyond 1 s"))
    ),
    caption="What is longer is better. " * 5,
    conditions="p50, 512 tokens in. " * 9,
)
STACKS = Figure(
    "Stacks",
    Stacks(
        (
            Stack("fits", (part("weights", 8, 0), part("cache", 4, 1)), 16, "fp8 / fp8", "12 of 16 GiB"),
            Stack(LONG, (part("weights", 24, 0), part("cache", 4, 1)), 16, LONG, "12 GiB too large", bad=True),
        ),
        "GiB",
        room="memory of the device",
    ),
)
LINES = Figure(
    "Lines",
    Lines(
        (
            Line("fp16", ((64, 0.02), (1024, 0.3)), (0.01, 0.2), (0.03, 0.4), (0.009, 0.15)),
            Line(LONG, ((64, 0.01), (1024, 0.2)), color=1),
        ),
        "tokens of the prompt",
        "time to first token",
        x_log=True,
        y_log=True,
        x_ticks=(64, 100, 128, 256, 512, 1000, 1024),
        levels=(Level(0.25, "limit: 250 ms"),),
        floor="floor",
        band="error",
    ),
)
EVERY = (BARS, STACKS, LINES)
TABLE = Table("Requests", ("name", "count"), (("<i>ours</i>", "3"),))


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_a_page_needs_no_network_and_holds_every_figure_and_its_numbers(tmp_path: Path) -> None:
    save([*EVERY, TABLE], tmp_path / "page.html", title=LONG, about=["One <sentence>."])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "b", "i", "sentence"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert not re.findall(r"url\((?!#)|@import", text)
    assert (page.tags.count("figure"), page.tags.count("svg"), page.tags.count("table")) == (3, 6, 4)
    for word in (LONG, "One <sentence>.", "12 GiB too large", "<i>ours</i>", "limit: 250 ms"):
        assert word in page.words


def test_a_page_has_the_readers_colors(tmp_path: Path) -> None:
    save(EVERY, tmp_path / "page.html", title="Colors")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b(?!\")", drawn)
    assert set(re.findall(r"var\(--([\w-]+)\)", drawn)) <= set(re.findall(r"--([\w-]+): #", text))


def test_a_picture_is_sharp_and_a_drawing_has_real_text(tmp_path: Path) -> None:
    save(EVERY, tmp_path / "all.png", title="All")
    head = (tmp_path / "all.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">I", head[16:20])[0] == 2 * WIDE
    save([BARS], tmp_path / "bars.SVG", title="Bars")
    assert {"20.0", "100 ms, $0.64/h", "beyond 1 s"} <= set(Picture(tmp_path / "bars.SVG").texts)


def test_the_same_figures_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save(EVERY, tmp_path / f"{name}.html", title="All")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_what_goes_beyond_the_room_is_drawn_beyond_it(tmp_path: Path) -> None:
    save([STACKS], tmp_path / "stacks.svg", title="Stacks")
    drawn = Picture(tmp_path / "stacks.svg")
    room = drawn.width("room-1")
    assert drawn.width("beyond-1") == pytest.approx(room * 12 / 16, rel=0.01)
    assert drawn.span("beyond-1")[0] == pytest.approx(drawn.span("room-1")[1], abs=0.1)
    assert drawn.span("part-1-1")[1] == pytest.approx(drawn.span("beyond-1")[1], abs=2)
    assert "beyond-0" not in drawn.ids


def test_curves_lie_where_their_numbers_are(tmp_path: Path) -> None:
    save([LINES], tmp_path / "lines.svg", title="Lines")
    drawn = Picture(tmp_path / "lines.svg")
    (_, first), (_, second) = drawn.points("line-0")
    (_, third), (_, fourth) = drawn.points("line-1")
    # A logarithmic axis: equal ratios are equal distances.
    assert (second - fourth) / (first - third) == pytest.approx(0.585 / 1.0, abs=0.01)
    assert "floor-0" in drawn.ids
    assert "floor-1" not in drawn.ids


@pytest.mark.parametrize("figure", EVERY, ids=lambda figure: figure.title)
@pytest.mark.parametrize("width", [None, WIDE, NARROW], ids=["file", "page", "phone"])
def test_no_text_leaves_the_picture_or_lies_on_another(figure: Figure, width: int | None) -> None:
    canvas = inline(figure, width) if width else picture([figure])
    boxes = text_boxes(canvas)
    assert len(boxes) > 4
    for text, box in boxes:
        assert box.x0 >= -1, text
        assert box.x1 <= canvas.width + 1, text
        assert box.y0 >= -1, text
        assert box.y1 <= canvas.height + 1, text
    for (one, first), (other, second) in combinations(boxes, 2):
        wide = min(first.x1, second.x1) - max(first.x0, second.x0)
        high = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert min(wide, high) <= 1, (one, other)


def text_boxes(canvas: Canvas):  # type: ignore[no-untyped-def]
    """What is drawn; matplotlib also has ticks beyond the ends of an axis, which are not."""
    renderer = FigureCanvasAgg(canvas.figure).get_renderer()
    canvas.figure.draw(renderer)
    hidden = set()
    for axes in canvas.figure.axes:
        inside = axes.get_window_extent(renderer)
        for tick in axes.yaxis.get_major_ticks():
            at = axes.transData.transform((1, tick.get_loc()))[1]
            hidden |= {tick.label1} if not inside.y0 - 0.5 <= at <= inside.y1 + 0.5 else set()
    texts = [one for one in canvas.figure.findobj(Text) if one.get_visible() and one.get_text().strip()]
    return [(one.get_text(), one.get_window_extent(renderer)) for one in texts if one not in hidden]


def test_text_can_be_read_on_both_papers() -> None:
    for tone in (INK, SOFT):
        assert contrast(tone.light, PAPER.light) >= 4.5
        assert contrast(tone.dark, PAPER.dark) >= 4.5
    for tone in (shade(color, amount) for color in range(len(SERIES)) for amount in SHADES):
        assert contrast(tone.light, on(tone).light) >= 4.0
        assert contrast(tone.dark, on(tone).dark) >= 4.0


def test_every_color_has_its_own_value_so_that_a_page_can_name_it() -> None:
    assert len({tone.light for tone in tones()}) == len(tones()) == len({tone.name for tone in tones()})


@pytest.mark.parametrize("name", ["plot.pdf", "plot", "plot.svg.gz", ".svg"])
def test_another_ending_is_refused_with_those_there_are(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match=r"\.svg, \.png or \.html"):
        save(EVERY, tmp_path / name, title="All")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such"):
        save(EVERY, tmp_path / "no such" / "plot.svg", title="All")
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(ArtifactError, match="is a folder"):
        save(EVERY, tmp_path / "folder.svg", title="All")


_FULL = """
import resource, signal, sys
from pathlib import Path
from tests.drawing.test_drawing import BARS
from toolchain.drawing import save
from toolchain.errors import ArtifactError
save([BARS], Path("before.svg"), title="Bars")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    save([BARS], Path("plot.svg"), title="Bars")
except ArtifactError as error:
    print(error.message)
"""


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", _FULL], cwd=tmp_path, env=here, capture_output=True, text=True)
    assert found.stdout.startswith("plot.svg: cannot be written: "), found.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["before.svg"]
