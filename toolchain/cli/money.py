"""The verb that prices measurements: score."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain.cli.flags import PATH, common, open_screen

if TYPE_CHECKING:
    from toolchain.console import Screen
    from toolchain.measuring.report import Report
    from toolchain.measuring.scoring import Priced, Row

_DEAREST = 1000.0
"""Dollars per hour: above it the price is a typing error."""


def _seconds(_ctx: click.Context, param: click.Parameter, text: str | None) -> float | None:
    """``"1s"``, ``"800ms"``, ``"1.5"`` -> seconds."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s)?\s*", text)
    if not match or not float(match[1]):
        raise click.BadParameter(f"{text!r} is not a time; write it as 1s or 800ms", param=param)
    return float(match[1]) / (1000 if match[2] == "ms" else 1)


def _prices(_ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> dict[str, float]:
    """``("rtx4090=$0.64", "1.69")`` -> {device's name or "": dollars per hour}."""
    from toolchain.device import device

    found = {}
    for text in texts:
        name, _, amount = text.rpartition("=")
        match = re.fullmatch(r"\s*\$?(\d+(?:\.\d+)?)\s*", amount)
        if not match or not 0 < float(match[1]) <= _DEAREST:
            raise click.BadParameter(
                f"{text!r} is not a price of a GPU for an hour; write it as $0.64 or rtx4090=0.64", param=param
            )
        found[device(name).name if name else ""] = float(match[1])
    return found


@click.command()
@click.argument("reports", nargs=-1, required=True, type=PATH)
@click.option("--price", callback=_prices, multiple=True, metavar="[DEVICE=]USD", help="Of the GPU for an hour.")
@click.option("--vendor", default="", metavar="NAME", help="Whose price it is; without --price, from scalellm's table.")
@click.option("--spot", is_flag=True, help="The table's spot price instead of on demand.")
@click.option("--price-date", metavar="YYYY-MM-DD", help="When --price was asked for. [default: today]")
@click.option("--threshold", "threshold_s", callback=_seconds, metavar="TIME", help="Beyond it there is no score.")
@click.option(
    "--statistic",
    type=click.Choice(["mean", "p50", "p90", "p99"]),
    default="p50",
    show_default=True,
    help="Which TTFT is the latency.",
)
@click.option("--input-tokens", type=click.IntRange(min=1), help="Of a report of several runs, those of this prompt.")
@click.option("--concurrency", type=click.IntRange(min=1), help="Of a report of several runs, this closed loop.")
@click.option("--rate", type=float, help="Of a report of several runs, this open loop.")
@click.option("--plot", type=PATH, metavar="FILE.svg|png|html", help="Draw the scores as bars.")
@click.option("--published", is_flag=True, help="Show FEDML's table beside it: published, not measured.")
@common
def score(
    reports: tuple[Path, ...], json_output: bool, verbose: int, published: bool, plot: Path | None, **given: Any
) -> None:
    """FEDML's economic score of measured services: services / (time to first token x price), inputs beside it.

    All reports must have been asked the same prompts under the same load; the number of services may differ. Simulated
    ones are refused. The break-even price is the one above which a row is no longer ahead of the best of the others.

    \b
    Examples:
      scalellm score 4090.json --price '$0.64' --vendor RunPod --threshold 1s
      scalellm score 4090.json a100.json l4.json --vendor RunPod --input-tokens 1024 --concurrency 1 --published
    """
    from dataclasses import asdict

    from toolchain.drawing import check, save
    from toolchain.measuring import scoring
    from toolchain.measuring.report import read
    from toolchain.measuring.score_figure import TITLE, score_figure

    if given["price"] and not given["vendor"]:
        raise click.UsageError("Say whose price it is: --vendor NAME")
    screen = open_screen(json_output, verbose)
    if plot:
        check(plot)
    load = f"concurrency {given['concurrency']}" if given["concurrency"] else None
    load = f"{given['rate']:g} requests/s" if given["rate"] else load
    read_ = {str(path): read(path) for path in reports}
    runs = {path: scoring.choose(report, path, given["input_tokens"], load) for path, report in read_.items()}
    scoring.refuse(read_, runs)
    rows = scoring.with_break_even(
        [
            scoring.row(read_[path], run, _price(read_[path], given), given["statistic"], given["threshold_s"])
            for path, run in runs.items()
        ]
    )
    _show(screen, rows)
    beside = scoring.published() if published else []
    if beside:
        _show_published(screen, beside, scoring.published_source())
    if plot:
        save([score_figure(rows, beside)], plot, title=TITLE)
        screen.say(f"Plot: {plot}")
    screen.emit({"rows": [asdict(one) for one in rows], "published": beside})


def _price(report: Report, given: dict[str, Any]) -> Priced:
    from toolchain.measuring.scoring import Priced, price_of

    asked = given["price"]
    usd = asked.get(report.device or "", asked.get(""))
    if usd is None:
        return price_of(report.device, given["vendor"], "spot" if given["spot"] else "on-demand")
    kind = "spot" if given["spot"] else "on-demand"
    return Priced(usd, given["vendor"], kind, given["price_date"] or date.today().isoformat(), "--price")


def _show(screen: Screen, rows: list[Row]) -> None:
    """The scores, and below them what they are made of."""
    told = []
    for one in rows:
        even = "-" if one.break_even_usd_per_hour is None else f"${one.break_even_usd_per_hour:.3f}/h"
        value = f"beyond {one.threshold_s:g} s" if one.score is None else f"{one.score:.3f}"
        latency, price = f"{one.latency_s * 1000:.1f} ms", f"${one.price.usd_per_hour:g}/h"
        told.append((one.title, value, str(one.services), latency, price, even))
    screen.table("", ("report", "score", "services", "latency", "price", "break-even"), told)
    first = rows[0]
    limit = "" if first.threshold_s is None else f", none beyond {first.threshold_s:g} s"
    screen.say(f"score = services / (latency in s x price in $/h){limit}")
    asked = f"{first.input_tokens or 'mixed'} tokens in, {first.output_tokens or 'mixed'} out, {first.load}"
    screen.say(f"latency: {first.statistic}, {asked}")
    for one in rows:
        cost = f"{one.price.vendor}, {one.price.kind}, {one.price.date} ({one.price.source})"
        screen.say(
            f"{one.title}: {one.device or 'unknown device'}, {one.pattern}, {one.requests} requests; price: {cost}"
        )
    if len({(one.price.vendor, one.price.kind) for one in rows}) > 1:
        screen.say("note: prices of different vendors or kinds; part of the difference is theirs")


def _show_published(screen: Screen, rows: list[dict[str, Any]], source: str) -> None:
    told = [(one["title"], f"{one['score']:.3f}", f"{one['latency_x_price']:.4f} s x $/h") for one in rows]
    screen.say()
    screen.table("published, not measured", ("row", "score", "latency x price"), told)
    screen.say(f"from {source}, which tells neither latencies nor prices")
