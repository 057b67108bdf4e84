"""The calibration report as one HTML page that needs no network: what ``quantization_report.json`` says, to look at.

Ranges of K and V and their ratio, outlier channels, alphas, and output errors of each layer, and the worst matrices.
Bars are inline SVG; colors follow the reader's light or dark setting. It measures nothing: every number is in the JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

FILE = "quantization_report.html"
WORST = 10
"""Matrices that are listed as the worst."""
_BAR_WIDTH = 120
"""Pixels."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #667; --line: #d9dce1; --paper: #fff; --k: #2f6fb3;
  --v: #c26a1b; --bad: #b3362f; --good: #2c8455 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --soft: #9aa3af; --line: #383d45; --paper: #16181c;
  --k: #6aa9ec; --v: #eba15c; --bad: #ef7a72; --good: #67c596 } }
body { font: 14px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 70rem; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem } p { color: var(--soft); max-width: 46rem }
div.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .15rem .8rem .15rem 0; border-bottom: 1px solid var(--line); white-space: nowrap }
th { color: var(--soft); font-weight: 500 } td.n, th.n { text-align: right }
svg { vertical-align: middle } rect.k { fill: var(--k) } rect.v { fill: var(--v) } rect.bad { fill: var(--bad) }
rect.good { fill: var(--good) } dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem }
dt { color: var(--soft) } dd { margin: 0 }
"""


def render(report: Mapping[str, Any], *, title: str = "") -> str:
    """The parsed ``quantization_report.json`` -> the text of the page. Sections without data are left out."""
    calibration = report.get("calibration") or {}
    layers: Sequence[Mapping[str, Any]] = calibration.get("layers") or ()
    heading = "Calibration report" + (f": {title}" if title else "")
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>{escape(heading)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(heading)}</h1>",
        _summary(report, calibration),
        *_worst(report, layers),
        *_ranges(layers),
        *_outputs(layers),
        *_outliers(layers),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _summary(report: Mapping[str, Any], calibration: Mapping[str, Any]) -> str:
    names = ("weights", "method", "group_size", "scales", "clip", "fp8_scales", "smoothquant_alpha")
    pairs = {name: report.get(name) for name in names}
    pairs |= {name: calibration.get(name) for name in ("data", "samples", "tokens", "propagate", "digest")}
    rows = (f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(_said(value))}</dd>"
            for name, value in pairs.items() if value is not None)  # fmt: skip
    return f"<dl>{''.join(rows)}</dl>"


def _worst(report: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    errors: Mapping[str, float] = report.get("relative_error") or {}
    names = sorted(errors, key=lambda name: errors[name], reverse=True)[:WORST]
    if not names:
        return
    yield f"<h2>The {len(names)} worst matrices</h2><p>The error of the weights, ||W\u2032 - W|| / ||W||. With a "
    yield "method that minds the inputs it may well be larger than with plain rounding; what counts is the error of "
    yield "the layer\u2019s output, below.</p>"
    top = errors[names[0]]
    rows = ((escape(name), _number(errors[name]), _bars([(errors[name], "bad")], top)) for name in names)
    yield _table(("matrix", "#relative error", ""), rows)


def _ranges(layers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    known = [layer for layer in layers if layer.get("k_amax") is not None and layer.get("v_amax") is not None]
    if not known:
        return
    yield "<h2>Ranges of keys and values</h2><p>The largest magnitude in each layer, K after the rotary embedding. "
    yield "Where K is many times V, one scale for both would leave V few steps.</p>"
    top = max(max(layer["k_amax"], layer["v_amax"]) for layer in known)
    rows = (
        (
            str(layer["layer"]),
            _number(layer["k_amax"]),
            _number(layer["v_amax"]),
            _number(layer["k_amax"] / layer["v_amax"]) if layer["v_amax"] else "\u2013",
            _bars([(layer["k_amax"], "k"), (layer["v_amax"], "v")], top),
        )
        for layer in known
    )
    yield _table(("#layer", "#K", "#V", "#K / V", "K above, V below"), rows)


def _outputs(layers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    found = [
        (layer["layer"], name, group)
        for layer, name, group in _groups(layers)
        if group.get("output_error_before") is not None or group.get("alpha") is not None
    ]
    if not found:
        return
    yield "<h2>Errors of the outputs</h2><p>Of the matrices that read one input, named by the first: before is "
    yield "plain rounding, after is what was written; with SmoothQuant both round the inputs to 8 bits as well. Alpha "
    yield "is the power of the input channels\u2019 size by which AWQ or SmoothQuant scales them.</p>"
    errors = [group.get(key) or 0.0 for _, _, group in found for key in ("output_error_before", "output_error_after")]
    top = max(errors)
    rows = []
    for layer, name, group in found:
        before, after = group.get("output_error_before"), group.get("output_error_after")
        gain = f"{100 * (after / before - 1):+.1f} %" if before and after is not None else "\u2013"
        bars = _bars([(before or 0.0, "bad"), (after or 0.0, "good")], top)
        cells = (str(layer), escape(name), _number(group.get("alpha")), _number(before), _number(after), gain, bars)
        rows.append(cells)
    yield _table(("#layer", "input of", "#alpha", "#before", "#after", "#change", "before above, after below"), rows)


def _outliers(layers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    found = [(layer["layer"], name, group) for layer, name, group in _groups(layers) if group.get("amax") is not None]
    if not found:
        return
    yield "<h2>Inputs and their outlier channels</h2><p>The largest magnitude of each input, and the channels where it "
    yield "is largest, as channel: magnitude.</p>"
    top = max(group["amax"] for _, _, group in found)
    rows = (
        (
            str(layer),
            escape(name),
            _number(group["amax"]),
            _bars([(group["amax"], "k")], top),
            ", ".join(f"{int(index)}: {_number(amax)}" for index, amax in group.get("outlier_channels") or ()),
        )
        for layer, name, group in found
    )
    yield _table(("#layer", "input of", "#largest", "", "outlier channels"), rows)


def _groups(
    layers: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[Mapping[str, Any], str, Mapping[str, Any]]]:
    for layer in layers:
        for name, group in (layer.get("groups") or {}).items():
            yield layer, name, group


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already. A head that begins with # marks a column of numbers."""
    classes = [' class="n"' if head.startswith("#") else "" for head in heads]
    top = "".join(f"<th{c}>{escape(head.removeprefix('#'))}</th>" for c, head in zip(classes, heads, strict=True))
    body = "\n".join(
        "<tr>" + "".join(f"<td{c}>{cell}</td>" for c, cell in zip(classes, row, strict=True)) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _bars(values: Sequence[tuple[float, str]], top: float) -> str:
    """Bars under one another, as long as each (value, class) is of ``top``."""
    height = 8 if len(values) == 1 else 5
    rects = "".join(
        f'<rect class="{kind}" y="{place * (height + 1)}" width="{_BAR_WIDTH * value / top if top else 0:.1f}" '
        f'height="{height}"/>'
        for place, (value, kind) in enumerate(values)
    )
    size = f'width="{_BAR_WIDTH}" height="{len(values) * (height + 1)}"'
    return f'<svg {size} role="img" aria-hidden="true">{rects}</svg>'


def _number(value: float | None) -> str:
    return "\u2013" if value is None else f"{value:.4g}"


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else str(value)
