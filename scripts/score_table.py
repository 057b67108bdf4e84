"""Computes FEDML's published economic scores again and writes what follows from them: docs/score-table.md.

    python scripts/score_table.py            # print the page
    python scripts/score_table.py --write    # write docs/score-table.md

Everything in it is arithmetic over facts/score_table.yaml, facts/prices.yaml and our latency estimates.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from toolchain import workspace
from toolchain.device import Price, device
from toolchain.planning.money import (
    ANCHORS,
    PriceSet,
    Row,
    estimated_prompt,
    predicted_s,
    price_sets,
    prices_then,
    published_rows,
    score,
)

PAGE = Path(__file__).parents[1] / "docs" / "score-table.md"
PROMPTS = (512, 640, 1024, 2048, 4096)
PAIR = ("a100-80gb", "rtx4090")
EXAMPLE = {"a100-80gb": 3.67, "l4": 1.00, "t4": 1.204, "rtx4090": 0.64}
"""Prices of the predicted scores: of the set whose rows agree best on one prompt, by our estimates."""
EXAMPLE_PROMPT = 512
"""About that prompt."""


def page() -> str:
    """The whole page as Markdown."""
    return "\n".join([*_head(), *_products(), *_sets(), *_predictions(), ""])


def _head() -> Iterator[str]:
    facts = workspace.facts("score_table")
    yield "# FEDML's economic scores, computed again"
    yield ""
    yield "Written by `python scripts/score_table.py --write`; a test compares. Scores and claims are those of"
    yield f"[FEDML's page]({facts['source']}),"
    yield "which prints neither latencies nor prices; prices are those of `toolchain/facts/prices.yaml` until"
    yield f"{facts['prices_until']}, each with vendor, date and source. We measured nothing: what follows is"
    yield "arithmetic, and estimates where it says so."
    yield ""
    yield f"    score = services / (latency in s x price in $ per hour), latency <= {facts['threshold_s']} s"


def _products() -> Iterator[str]:
    rows = published_rows()
    first = rows[0].latency_x_price
    yield ""
    yield "## What a score pins down without any assumption"
    yield ""
    yield "| row | score | latency x price (s x $/h) | vLLM's over this |"
    yield "|--|--|--|--|"
    for row in rows:
        product = row.latency_x_price
        yield f"| {row.title} | {row.score} | {product:.6f} | {first / product:.3f} |"
    yield ""
    product = {row.name: row.latency_x_price for row in rows}
    said, limit_s = workspace.facts("score_table")["speedups"], workspace.facts("score_table")["threshold_s"]
    two, three = (product[name] / product["a100 x1"] for name in ("a100 x2", "a100 x3"))
    dearer = product[ANCHORS[0]] / product[ANCHORS[1]] / said[ANCHORS[1]]
    yield f"* One A100 price is in all four rows: vLLM over 3 services is {first / product['a100 x3']:.3f},"
    yield f"  and the page says {said['a100 x3']}."
    yield f"* 2 services take {two:.3f} times as long as 1: they were asked one at a time. 3 take {three:.3f} times"
    yield "  as long."
    yield f"* The T4 is within {limit_s:g} s only at ${product['t4 x1'] / limit_s:.3f}/h or more,"
    yield f"  the L4 only at ${product['l4 x1'] / limit_s:.3f}/h or more."
    yield f"* An RTX 4090 that is {said[ANCHORS[1]]} times as fast as vLLM on the A100 means an A100 that costs"
    yield f"  {dearer:.2f} times as much."


def _sets() -> Iterator[str]:
    every = list(price_sets())
    holding = _distinct([made for made in every if made.holds])
    count = sum(made.holds for made in every)
    yield ""
    yield "## Which prices satisfy every row"
    yield ""
    yield f"Of {len(every)} combinations of one public price per GPU, {count} keep every row under 1 s and the RTX 4090"
    yield "within 10 % of 1.88 times as fast. The last columns: the longest prompt that no row's floor forbids (every"
    yield "GPU at the peak of its data sheet, in the formats below), and the prompts that our estimates give for the"
    yield "rows' latencies, from the shortest to the longest (without 3 services, which wait for one another)."
    yield ""
    yield "| A100 | L4 | T4 | RTX 4090 | x1 / x2 / x3 ms | L4 ms | T4 ms | 4090 ms | speedup | floor | our estimates |"
    yield "|--|--|--|--|--|--|--|--|--|--|--|"
    for made in holding:
        yield _set_row(made)
    longest = max(made.longest_prompt for made in holding)
    same = next(made for made in every if all(made.prices[n].vendor == "RunPod" and not _spot(made, n) for n in PAIR))
    pair = " and ".join(f"${same.prices[name].usd_per_hour:.2f}" for name in PAIR)
    yield ""
    yield f"So the prompt was not longer than {longest} tokens. One vendor's prices for A100 and RTX 4090 (RunPod on"
    yield f"demand, {pair}) do not give the scores: the RTX 4090 would be {same.speedup:.1f} times as fast."


def _distinct(sets: Sequence[PriceSet]) -> list[PriceSet]:
    """One of the sets that have the same prices from different offers."""
    found = {tuple(price.usd_per_hour for price in made.prices.values()): made for made in reversed(sets)}
    return list(reversed(found.values()))


def _spot(made: PriceSet, name: str) -> bool:
    return made.prices[name].kind == "spot"


def _set_row(made: PriceSet) -> str:
    def cost(name: str) -> str:
        price: Price = made.prices[name]
        return f"${price.usd_per_hour:.2f} {price.vendor}" + (" spot" if _spot(made, name) else "")

    ms = {name: f"{seconds * 1e3:.0f}" for name, seconds in made.latencies_s.items()}
    ours = [estimated_prompt(row, made.latencies_s[row.name]) for row in _ours() if row.name != "a100 x3"]
    cells = [cost("a100-80gb"), cost("l4"), cost("t4"), cost("rtx4090")]
    cells += [f"{ms['a100 x1']} / {ms['a100 x2']} / {ms['a100 x3']}", ms["l4 x1"], ms["t4 x1"], ms["rtx4090 x1"]]
    cells += [f"{made.speedup:.2f}", str(made.longest_prompt), f"{min(ours)} to {max(ours)}"]
    return "| " + " | ".join(cells) + " |"


def _predictions() -> Iterator[str]:
    yield ""
    yield "## What we would predict"
    yield ""
    yield "TTFT in ms by our estimates, which may be off by the errors that `scalellm plan` prints. Formats of weights"
    yield "and cache are our assumption, and services of one GPU are asked one at a time."
    yield ""
    yield "| row | weights, cache | " + " | ".join(f"{tokens} tokens" for tokens in PROMPTS) + " |"
    yield "|--|--|" + "--|" * len(PROMPTS)
    for row in _ours():
        times = " | ".join(f"{predicted_s(row, tokens) * 1e3:.0f}" for tokens in PROMPTS)
        yield f"| {row.title} | {row.weights}, {row.kv} | {times} |"
    yield ""
    yield f"Scores that follow for {EXAMPLE_PROMPT} tokens: with {_named(EXAMPLE)};"
    yield "and with each GPU's cheapest price on demand then, which shows how much of a score is the choice of prices."
    yield "Prompt and prices of the first were chosen because they agree with the published scores: that is no proof of"
    yield "either."
    yield ""
    yield "| row | published | these prices | cheapest on demand |"
    yield "|--|--|--|--|"
    for row in _ours():
        cheapest = min(price.usd_per_hour for price in prices_then(row.device) if price.kind == "on-demand")
        yield f"| {row.title} | {row.score:.2f} | {_score(row, EXAMPLE[row.device])} | {_score(row, cheapest)} |"


def _named(chosen: dict[str, float]) -> str:
    return ", ".join(f"{device(name).title} ${usd:.2f}" for name, usd in chosen.items())


def _ours() -> list[Row]:
    return [row for row in published_rows() if row.engine != "vLLM"]


def _score(row: Row, usd_per_hour: float) -> str:
    limit = workspace.facts("score_table")["threshold_s"]
    made = score(row.services, predicted_s(row, EXAMPLE_PROMPT), usd_per_hour, limit)
    return "over 1 s" if made.value is None else f"{made.value:.2f} (${usd_per_hour:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/score-table.md")
    if parser.parse_args().write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")


if __name__ == "__main__":
    main()
