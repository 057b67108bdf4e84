"""From what was summed over each sequence to means with standard errors. Pure arithmetic; it knows no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """A number and its standard error, which says how much it depends on the text; None for a single sequence."""

    value: float
    error: float | None

    def to_json(self) -> dict[str, Any]:
        """Numbers that JSON does not have become null."""
        return {name: one if one is not None and math.isfinite(one) else None for name, one in asdict(self).items()}


def mean_of(sums: Sequence[float], counts: Sequence[int]) -> Measure:
    """Sum and number of tokens of each sequence -> the mean of a token.

    The mean is m = sum(s) / sum(n), a ratio of sums over sequences, because tokens of one sequence are not independent;
    its linearized standard error is sqrt(k / (k - 1) * sum((s - m n)^2)) / sum(n) (Cochran, Sampling Techniques, 1977,
    section 6.4).
    """
    tokens, many = sum(counts), len(sums)
    mean = math.fsum(sums) / tokens
    if many < 2:
        return Measure(mean, None)
    squares = math.fsum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    return Measure(mean, math.sqrt(many / (many - 1) * squares) / tokens)


def exponential(mean: Measure) -> Measure:
    """exp(m), its error by the delta method: exp(m) * error."""
    try:
        value = math.exp(mean.value)
    except OverflowError:
        return Measure(math.inf, None)
    return Measure(value, None if mean.error is None else value * mean.error)


@dataclass(frozen=True)
class Predictions:
    """What one model predicts, summed over the tokens of each sequence, against the unquantized model."""

    nats: tuple[float, ...]
    """Negative log-likelihood of the text."""
    kl: tuple[float, ...]
    """KL(unquantized || this one) of the next token's distribution, in nats."""
    agree: tuple[int, ...]
    """Tokens where both find the same one the likeliest."""

    def measures(self, original: Predictions, counts: Sequence[int]) -> dict[str, Measure]:
        """``perplexity``, ``perplexity_ratio`` (of the same text), ``kl`` (nats a token), ``top1_agreement``."""
        more = [own - other for own, other in zip(self.nats, original.nats, strict=True)]
        return {
            "perplexity": exponential(mean_of(self.nats, counts)),
            "perplexity_ratio": exponential(mean_of(more, counts)),
            "kl": mean_of(self.kl, counts),
            "top1_agreement": mean_of(self.agree, counts),
        }
