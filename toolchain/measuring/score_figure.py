"""The table of scores as a figure: measured ones first, published ones below them in another color. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolchain.drawing import Bar, Bars, Figure
from toolchain.drawing.palette import BLUE, GRAY
from toolchain.measuring.scoring import Row

TITLE = "Economic score"
_MEASURED, _PUBLISHED = "measured", "published, not measured"


def score_figure(rows: Sequence[Row], published: Sequence[Mapping[str, Any]]) -> Figure:
    """``scoring.row``s of one load, and ``scoring.published``'s -> bars with their latency and price beside them."""
    bars = [
        Bar(
            one.title,
            one.score,
            f"beyond {one.threshold_s:g} s" if one.score is None else f"{one.score:.3f}",
            f"{one.latency_s * 1000:.0f} ms, ${one.price.usd_per_hour:g}/h {one.price.vendor}",
            BLUE,
        )
        for one in rows
    ]
    bars += [Bar(one["title"], one["score"], f"{one['score']:.3f}", _PUBLISHED, GRAY) for one in published]
    legend = ((_MEASURED, BLUE), (_PUBLISHED, GRAY)) if published else ()
    return Figure(
        TITLE,
        Bars(tuple(bars), legend),
        caption="services / (latency in s x price in $/h): a longer bar is more service for the money",
        conditions=_conditions(rows),
    )


def _conditions(rows: Sequence[Row]) -> str:
    first = rows[0]
    limit = "" if first.threshold_s is None else f", none beyond {first.threshold_s:g} s"
    asked = f"{first.input_tokens or 'mixed'} tokens in, {first.output_tokens or 'mixed'} out, {first.load}"
    prices = dict.fromkeys(f"{one.price.vendor} {one.price.kind} {one.price.date}" for one in rows)
    return f"Latency: {first.statistic}{limit}; {asked}. Prices: {', '.join(prices)}."
