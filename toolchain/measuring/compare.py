"""Two reports side by side: ratios with bootstrap intervals, or the reasons why they must not be compared. Pure.

What is compared (service, door, engine, device) may differ, and what it was asked may not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from toolchain.errors import RejectedError
from toolchain.measuring.report import Conditions, Report, Run
from toolchain.measuring.statistics import Ratio, percentile, ratio_of_percentiles, ratio_of_rates

LENGTHS_APART = 0.05
"""How far the median lengths of answers may be apart: more text takes more time."""
FAILED = 0.05
"""A run that lost more of its requests than this tells of the lucky ones."""
_QUANTITIES = (("ttft_s", 50), ("ttft_s", 90), ("itl_s", 50), ("itl_s", 90), ("e2e_s", 50), ("e2e_s", 90))


@dataclass(frozen=True)
class Line:
    """One quantity of one run. ``ratio`` is B over A."""

    quantity: str
    a: float
    b: float
    ratio: Ratio


@dataclass(frozen=True)
class Comparison:
    """One run of both."""

    conditions: Conditions
    lines: tuple[Line, ...]


def compare(a: Report, b: Report, *, other_prompts: bool = False, seed: int = 0) -> list[Comparison]:
    """RejectedError, naming every difference, where the two were not asked the same.

    ``other_prompts``: role-play prompts of the same lengths may be others. So one server can be compared with itself,
    for instance through two doors, although it keeps the prompts of the first measurement in its cache.
    """
    if reasons := list(unlike(a, b, other_prompts)):
        raise RejectedError(
            "these reports were not measured alike:\n" + "\n".join(f"  {reason}" for reason in reasons),
            hint="measure both with the same prompts, lengths, load, pattern and number of requests",
        )
    return [
        Comparison(left.conditions, tuple(_lines(left, right, seed)))
        for left, right in zip(a.runs, b.runs, strict=True)
    ]


def unlike(a: Report, b: Report, other_prompts: bool = False) -> Iterator[str]:
    """What differs and must not, in words."""
    if a.simulated != b.simulated:
        yield f"simulated: {a.simulated} in A, {b.simulated} in B"
    if len(a.runs) != len(b.runs):
        yield f"runs: {len(a.runs)} in A, {len(b.runs)} in B"
        return
    for number, (left, right) in enumerate(zip(a.runs, b.runs, strict=True), 1):
        where = f"run {number}, " if len(a.runs) > 1 else ""
        roleplay = left.conditions.prompt_set == right.conditions.prompt_set == "roleplay"
        ignored = frozenset({"prompts_sha256"} if other_prompts and roleplay else ())
        yield from (f"{where}{reason}" for reason in differences(left.conditions, right.conditions, ignored))
        yield from (f"{where}{reason}" for reason in _answers(left, right))


def differences(a: Conditions, b: Conditions, ignored: frozenset[str] = frozenset()) -> Iterator[str]:
    """``"input_tokens: 512 in A, 1024 in B"`` for each condition that differs and is not ignored."""
    for name in Conditions.model_fields:
        left, right = getattr(a, name), getattr(b, name)
        if left != right and name not in ignored:
            yield f"{name}: {left} in A, {right} in B"


def _answers(a: Run, b: Run) -> Iterator[str]:
    """Whether the answers, too, are alike enough."""
    lengths = []
    for name, run in (("A", a), ("B", b)):
        good = [one.output_tokens for one in run.requests if not one.error]
        if len(good) < (1 - FAILED) * len(run.requests) or not good:
            yield f"{len(run.requests) - len(good)} of {len(run.requests)} requests failed in {name}"
            return
        lengths.append(median(good))
    if abs(lengths[0] - lengths[1]) > max(1, LENGTHS_APART * max(lengths)):
        yield f"answers: {lengths[0]:g} tokens in A, {lengths[1]:g} in B (medians)"


def _lines(a: Run, b: Run, seed: int) -> Iterator[Line]:
    for quantity, percent in _QUANTITIES:
        left, right = a.values(quantity), b.values(quantity)  # type: ignore[arg-type]
        if left and right and min(left) > 0 and min(right) > 0:
            ratio = ratio_of_percentiles(left, right, percent, seed=seed)
            name = f"p{percent}"
            yield Line(f"{quantity} {name}", percentile(left, percent), percentile(right, percent), ratio)
    if a.conditions.load.kind == "closed":  # in an open loop the rate is given, not measured
        pairs = [[(one.output_tokens, one.e2e_s or 0.0) for one in run.requests if not one.error] for run in (a, b)]
        rates = [run.summary()["tokens_per_s"] for run in (a, b)]
        if all(tokens > 0 and took > 0 for side in pairs for tokens, took in side):
            yield Line("tokens_per_s", rates[0], rates[1], ratio_of_rates(pairs[0], pairs[1], seed=seed))
