"""What speed costs: the economic score, tokens per dollar, break-even prices; FEDML's scores taken apart. Pure.

The score is FEDML's: services / (latency x price) under a latency threshold. It knows prices as rows with a date and a
source, and latencies as seconds that somebody measured or estimated. It does not choose devices.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from toolchain import workspace
from toolchain.device import Price, device, prices
from toolchain.family import LlamaConfig, published
from toolchain.planning.latency import Deployment, prefill, prefill_floor_s
from toolchain.quantization import KV, WEIGHTS

SECONDS_PER_HOUR = 3600
LONGEST_PROMPT = 4096
"""Of Llama-2, whose positions end there."""

ANCHORS = ("a100 vllm", "rtx4090 x1")
"""The rows that the published speedup of 1.88 compares."""


@dataclass(frozen=True)
class Score:
    """An economic score with everything that it is made of."""

    services: int
    latency_s: float
    usd_per_hour: float
    threshold_s: float | None
    value: float | None
    """None where the latency is beyond the threshold: such a service does not count."""


def score(services: int, latency_s: float, usd_per_hour: float, threshold_s: float | None = None) -> Score:
    """services / (latency in s x price in $/h); none beyond the threshold. ValueError for what is not positive."""
    for name, given in (("services", services), ("latency_s", latency_s), ("usd_per_hour", usd_per_hour)):
        if given <= 0:
            raise ValueError(f"{name} {given} must be more than 0")
    counts = threshold_s is None or latency_s <= threshold_s
    value = services / (latency_s * usd_per_hour) if counts else None
    return Score(services, latency_s, usd_per_hour, threshold_s, value)


def tokens_per_usd(tokens_per_s: float, usd_per_hour: float) -> float:
    """Output tokens for one dollar: 1000 tokens/s at $3.60/h are 1 000 000."""
    if usd_per_hour <= 0:
        raise ValueError(f"usd_per_hour {usd_per_hour} must be more than 0")
    return tokens_per_s * SECONDS_PER_HOUR / usd_per_hour


def break_even_usd_per_hour(services: int, latency_s: float, rival: Score) -> float | None:
    """The price above which this stops winning against ``rival``; None where the rival does not count at all."""
    return None if rival.value is None else services / (latency_s * rival.value)


@dataclass(frozen=True)
class Row:
    """One published score."""

    name: str
    title: str
    device: str
    engine: str
    services: int
    score: float
    weights: str
    """Assumed, as ``kv``: the table does not say."""
    kv: str

    @property
    def latency_x_price(self) -> float:
        """s x $/h: what a score pins down without any assumption."""
        return self.services / self.score

    def latency_s(self, usd_per_hour: float) -> float:
        """The latency that the score means at this price."""
        return self.latency_x_price / usd_per_hour


@functools.cache
def published_rows() -> tuple[Row, ...]:
    """FEDML's table: ``facts/score_table.yaml``."""
    return tuple(Row(**row) for row in workspace.facts("score_table")["rows"])


@dataclass(frozen=True)
class PriceSet:
    """One price per device, the latencies that the scores then mean, and which claims of the page fail."""

    prices: Mapping[str, Price]
    latencies_s: Mapping[str, float]
    """Row -> seconds."""
    speedup: float
    """vLLM on the A100 over ours on the RTX 4090; published as up to 1.88."""
    longest_prompt: int
    """Tokens: one more, and some row would be faster than arithmetic allows; 0 where every prompt is."""
    failed: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not self.failed


SPEEDUP_TOLERANCE = 0.1
"""How far a price set's speedup may be from the published one: two prices are rarely given to three digits."""


def prices_then(name: str) -> tuple[Price, ...]:
    """The public prices of a device in the time of FEDML's table, cheapest first."""
    until = str(workspace.facts("score_table")["prices_until"])
    return tuple(price for price in prices(name) if price.date <= until)


def price_sets(among: Callable[[str], Sequence[Price]] = prices_then) -> Iterator[PriceSet]:
    """Every combination of one price per device of the table, with what it means and which claims it breaks."""
    rows = published_rows()
    names = list(dict.fromkeys(row.device for row in rows))
    for chosen in itertools.product(*(among(name) for name in names)):
        yield _price_set(rows, dict(zip(names, chosen, strict=True)))


def _price_set(rows: Sequence[Row], chosen: Mapping[str, Price]) -> PriceSet:
    facts = workspace.facts("score_table")
    latencies = {row.name: row.latency_s(chosen[row.device].usd_per_hour) for row in rows}
    speedup = latencies[ANCHORS[0]] / latencies[ANCHORS[1]]
    claimed = facts["speedups"][ANCHORS[1]]
    longest = min(longest_prompt(row, latencies[row.name]) for row in rows)
    failed = [
        f"{row.title}: {latencies[row.name]:.2f} s is beyond the threshold of {facts['threshold_s']} s"
        for row in rows
        if latencies[row.name] > facts["threshold_s"]
    ]
    if abs(speedup / claimed - 1) > SPEEDUP_TOLERANCE:
        failed.append(f"the RTX 4090 would be {speedup:.2f} times as fast as vLLM on the A100, not {claimed}")
    return PriceSet(chosen, latencies, speedup, longest, tuple(failed))


@functools.cache
def _config() -> LlamaConfig:
    config = published(workspace.facts("score_table")["model"])
    assert config is not None
    return config


@functools.cache
def _deployment(name: str) -> Deployment:
    row = next(row for row in published_rows() if row.name == name)
    target = device(row.device)
    fused = target.sm is not None and target.sm >= 80
    return Deployment(_config(), WEIGHTS[row.weights], KV[row.kv], target, fused_attention=fused)


def longest_prompt(row: Row, latency_s: float) -> int:
    """The longest prompt whose floor is within this latency on the row's device; 0 where none is."""
    return _longest(lambda tokens: prefill_floor_s(_deployment(row.name), tokens) <= latency_s)


def estimated_prompt(row: Row, latency_s: float) -> int:
    """The longest prompt that by our estimate has its first token within this latency."""
    return _longest(lambda tokens: predicted_s(row, tokens) <= latency_s)


def predicted_s(row: Row, tokens: int) -> float:
    """Our estimate of TTFT for a row's device and formats. Services of one GPU are asked one at a time."""
    return prefill(_deployment(row.name), tokens).total_s


def _longest(fits: Callable[[int], bool]) -> int:
    """The largest number of tokens that fits, up to LONGEST_PROMPT; whatever is shorter than it must fit too."""
    low, high = 0, LONGEST_PROMPT + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
