"""A choice as a table: which rows, which columns, the lines below it. Pure text: how it is drawn ``console`` knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from toolchain.device import Price, devices
from toolchain.planning.choice import GOALS, BreakEven, Choice, best_of_each
from toolchain.planning.forecast import KIND
from toolchain.planning.option import Option
from toolchain.planning.price_list import PriceList, age_days

COLUMNS = (
    *("", "device", "weights", "cache", "services", "TRT-LLM", "at once", "TTFT", "ITL", "tokens/s", "off by"),
    *("$/h", "tokens/$", "score", "SLO", "remarks, or why not"),
)


@dataclass(frozen=True)
class Sheet:
    """What is printed."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def sheet(choice: Choice, prices: PriceList, *, every: bool = False) -> Sheet:
    """The best option of each device, the Pareto set and the recipe's own; of one device, and with ``every``, all."""
    shown = _shown(choice, every=every)
    beaten = {one.name for one in choice.pareto}
    rows = tuple(_row(one, "*" if one.name in beaten else "", choice, prices) for one in shown)
    load = f"{choice.load.prompt} tokens in, {choice.load.output} out"
    title = f"{GOALS[choice.goal].title}; {load} ({KIND})"
    return Sheet(title, COLUMNS, rows, tuple(_notes(choice, shown, prices)))


def _shown(choice: Choice, *, every: bool) -> list[Option]:
    if every or len({one.device for one in choice.ranked}) == 1:
        return list(choice.ranked)
    kept = {one.name for one in (*best_of_each(choice.ranked), *choice.pareto)}
    return [one for one in choice.ranked if one.name in kept or one.own]


def _row(one: Option, mark: str, choice: Choice, prices: PriceList) -> tuple[str, ...]:
    head = (mark, one.title, one.weights, one.kv, str(one.services), one.release or "-")
    usd = _usd(one, choice, prices)
    if not one.fits:
        return (*head, *("-",) * 5, usd, *("-",) * 3, one.why_not)
    at_once = str(min(one.sequences, one.limits.max_batch_size)) if one.limits else "-"
    if one.speed is None:
        why = "no estimate for a CPU: measure it"
        return (*head, at_once, *("?",) * 4, usd, "?", "?", "?", "; ".join([why, *_remarks(one)]))
    speed = one.speed
    scored = "-" if one.score is None else "over" if one.score.value is None else f"{one.score.value:.2f}"
    return (
        *head,
        at_once,
        f"{speed.ttft.seconds * 1000:.0f} ms",
        f"{speed.itl.seconds * 1000:.1f} ms",
        f"{speed.tokens_per_s:.0f}",
        f"x{1 + speed.ttft_band.worst:.2f}",
        usd,
        "-" if one.tokens_per_usd is None else f"{one.tokens_per_usd / 1e6:.2f} M",
        scored,
        speed.verdict or "-",
        "; ".join(_remarks(one)),
    )


def _usd(one: Option, choice: Choice, prices: PriceList) -> str:
    price = one.price or prices.of(one.device)
    if price is None:
        return "?"
    old = "!" if prices.old(price, choice.today) else ""
    return f"{price.usd_per_hour * one.gpus:g}{old}"


def _remarks(one: Option) -> Iterator[str]:
    """In a few words; the whole of it stands in the plan."""
    if one.own:
        yield "the recipe"
    if one.backend and one.backend != devices()[one.device].backends[0]:
        yield one.backend
    if one.speed and one.speed.unpacked_from_s:
        times = one.speed.ttft.seconds / one.speed.unpacked_from_s
        yield f"unpacked: first token x{times:.2f}" + (" (this short only)" if times < 1 else "")
    if one.plan and one.plan.gate == "required":
        yield "must be verified"
    if one.kv == "int8" and one.speed:
        yield "INT8 cache: check quality"
    if one.speed and one.speed.guessed:
        yield f"{one.speed.guessed} on {devices()[one.device].arch} is a guess: ranked by its bad end"
    if one.speed and one.speed.verdict == "unreachable":
        yield "the data sheet's peaks forbid it"


def _notes(choice: Choice, shown: Sequence[Option], prices: PriceList) -> Iterator[str]:
    if choice.pareto:
        also = " and services" if choice.goal == "density" else ""
        yield f"*: no other option is as good in TTFT, tokens/s and price{also} and better in one (Pareto set)."
    yield "TTFT: one prompt at a time, without queue and server. tokens/s: of the GPU, all sequences in flight."
    yield "off by: the factor by which a row's TTFT may be too long or too short. SLO: judged with that error."
    if any(one.services > 1 for one in shown):
        yield "Services of one GPU share its time: limits are held against all of them busy at once, our assumption."
        yield "The score counts them asked one at a time, as FEDML's table does."
    for told in choice.break_even:
        yield break_even_line(told)
    if any(one.speed and one.speed.guessed for one in shown):
        yield "A guess is ranked, and breaks even, by the bad end of its error: its estimate is what the row shows."
    yield from _price_notes(choice, shown, prices)
    yield "Ranked by speed, memory and money; what a format does to the text must be measured."
    hidden = len(choice.ranked) - len(shown)
    if hidden:
        yield f"{hidden} more options: -v shows all of them, --json too."


def break_even_line(told: BreakEven) -> str:
    """``"tokens per dollar: rtx4090 fp8/fp8 x1 is best at $0.64/h and stops winning above $0.87/h, ..."``"""
    best = f"{told.measure}: {told.winner} is best at ${told.usd_per_hour:g}/h"
    until = f"stops winning above ${told.until_usd_per_hour:.2f}/h"
    return f"{best} and {until}, where {told.rival} at ${told.rival_usd_per_hour:g}/h is better."


def _price_notes(choice: Choice, shown: Sequence[Option], prices: PriceList) -> Iterator[str]:
    """Each price with its vendor, kind, date and source; then who has none, and who has an old one."""
    names = list(dict.fromkeys(one.device for one in shown))
    found = {name: prices.of(name) for name in names}
    for name, price in found.items():
        if price:
            yield _price_line(devices()[name].title, price, choice, prices)
    missing = [name for name, price in found.items() if price is None]
    if missing:
        yield f"no price of {', '.join(missing)}: --price {missing[0]}=0.44"
    if any(price and prices.old(price, choice.today) for price in found.values()):
        yield f"!: older than {prices.old_days} days. Give today's: --price {names[0]}=0.44, or --prices FILE"


def _price_line(title: str, price: Price, choice: Choice, prices: PriceList) -> str:
    age = age_days(price, choice.today)
    if age is None:
        return f"{title}: ${price.usd_per_hour:g}/h, as you say"
    where = " ".join(filter(None, (price.vendor, price.offer, price.region)))
    old = "!" if prices.old(price, choice.today) else ""
    about = "about " if price.estimated else ""
    when = f"{price.date}, {age} days old{old}"
    return f"{title}: {about}${price.usd_per_hour:g}/h {where}, {price.kind}, {when} ({price.source})"
