"""One HTML page of figures and tables that needs no network: inline SVG in the reader's colors, wide and narrow.

Every figure comes with its numbers as a table, folded away, for those who listen to a page or copy from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape

from toolchain.drawing.canvas import Canvas
from toolchain.drawing.chart import Figure, Rows, Table
from toolchain.drawing.palette import FONTS, NARROW, WIDE, css, tones
from toolchain.drawing.sheet import inline

_STYLE = f"""
:root {{ color-scheme: light dark; {css(dark=False)} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {css(dark=True)} }} }}
body {{ font: 15px/1.55 {FONTS}; color: var(--ink); background: var(--paper); margin: 0 auto; max-width: {WIDE}px;
  padding: 2.2rem 20px 3rem }}
h1 {{ font-size: 1.55rem; line-height: 1.25; margin: 0 0 .5rem; text-wrap: balance }}
h2 {{ font-size: 1.15rem; line-height: 1.3; margin: 0 0 .2rem; text-wrap: balance }}
p {{ margin: .2rem 0 }} .soft {{ color: var(--soft) }} .small {{ font-size: 12.5px }}
figure, section {{ margin: 2.6rem 0 0; padding: 1.6rem 0 0; border-top: 1px solid var(--grid) }}
figure svg {{ display: block; width: 100%; height: auto; margin: 1rem 0 .6rem }} svg.narrow {{ display: none }}
@media (max-width: 640px) {{ svg.wide {{ display: none }} figure svg.narrow {{ display: block }} }}
details {{ margin-top: .5rem }} summary {{ color: var(--soft); font-size: 12.5px; cursor: pointer }}
.scroll {{ overflow-x: auto; background:
  linear-gradient(to right, var(--paper) 40%, transparent) 0 0 / 2.5rem 100% local no-repeat,
  linear-gradient(to left, var(--paper) 40%, transparent) 100% 0 / 2.5rem 100% local no-repeat,
  linear-gradient(to right, var(--grid), transparent) 0 0 / .8rem 100% scroll no-repeat,
  linear-gradient(to left, var(--grid), transparent) 100% 0 / .8rem 100% scroll no-repeat }}
table {{ border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin-top: .5rem }}
th, td {{ text-align: right; padding: .3rem 1.1rem .3rem 0; border-bottom: 1px solid var(--grid); white-space: nowrap }}
th {{ color: var(--soft); font-weight: 500; vertical-align: bottom }}
.w {{ text-align: left; white-space: normal; min-width: 6.2rem; max-width: 18rem; overflow-wrap: break-word }}
td:last-child, th:last-child {{ padding-right: 0 }}
@media (max-width: 640px) {{ th, td {{ padding-right: .8rem }} }}
footer {{ margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--grid) }}
"""


def page(parts: Sequence[Figure | Table], title: str, about: Sequence[str] = ()) -> str:
    """The text of the page. ``about``: sentences below the heading."""
    body = (_figure(part) if isinstance(part, Figure) else _section(part) for part in parts)
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style></head><body>",
            f"<header><h1>{escape(title)}</h1>",
            *(f'<p class="soft">{escape(text)}</p>' for text in about),
            "</header>",
            *body,
            "</body></html>\n",
        ]
    )


def _figure(figure: Figure) -> str:
    caption = f'<p class="soft">{escape(figure.caption)}</p>' if figure.caption else ""
    conditions = f'<p class="soft small">{escape(figure.conditions)}</p>' if figure.conditions else ""
    drawn = "\n".join(
        _inline(inline(figure, width), figure.title, name) for name, width in (("wide", WIDE), ("narrow", NARROW))
    )
    numbers = (
        f'<details><summary>The numbers</summary><div class="scroll">{_table(figure.chart.rows())}</div></details>'
    )
    heading = f"<figcaption><h2>{escape(figure.title)}</h2>{caption}</figcaption>"
    return f"<figure>{heading}\n{drawn}\n{conditions}{numbers}</figure>"


def _section(table: Table) -> str:
    caption = f'<p class="soft">{escape(table.caption)}</p>' if table.caption else ""
    body = _table((table.columns, table.table_rows), table.left)
    return f'<section><h2>{escape(table.title)}</h2>{caption}<div class="scroll">{body}</div></section>'


def _table(rows: Rows, left: frozenset[int] = frozenset({0})) -> str:
    def row(cells: Sequence[str], tag: str) -> Iterator[str]:
        yield "<tr>"
        for index, cell in enumerate(cells):
            yield f'<{tag} class="w">' if index in left else f"<{tag}>"
            yield f"{escape(cell)}</{tag}>"
        yield "</tr>"

    columns, body = rows
    lines = ["".join(row(columns, "th")), *("".join(row(cells, "td")) for cells in body)]
    return f"<table><thead>{lines[0]}</thead><tbody>{''.join(lines[1:])}</tbody></table>"


def _inline(canvas: Canvas, title: str, name: str) -> str:
    """A picture inside a page: its size is the page's, its colors are variables, and the table says it in words."""
    text = canvas.svg()
    text = text[text.index("<svg") :]
    text = re.sub(r' (?:width|height)="[\d.]+"', "", text, count=2)
    text = re.sub(r' id="(?:bar|part|room|beyond|line|floor)-[\d-]+"', "", text)
    text = text.replace("<svg ", f'<svg class="{name}" role="img" aria-label="{escape(title)}" ', 1)
    return _HEX.sub(lambda found: _NAMES.get(found[0], found[0]), text).strip()


_HEX = re.compile(r"#[0-9a-f]{6}")
_NAMES = {tone.light: f"var(--{tone.name})" for tone in tones()}
