"""How fast a plan's service is under stated requests, and whether that keeps stated limits. Pure, and all estimates.

It knows a plan, and judges nothing but limits on time. What it costs, and what else could be chosen, it does not know.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from toolchain.planning.forecast import Band, Estimate, verdict
from toolchain.planning.latency import (
    compute_format,
    decode,
    decode_floor_s,
    factors,
    in_flight_tokens_per_s,
    prefill,
    prefill_floor_s,
    unpacks,
)
from toolchain.planning.plan import Plan
from toolchain.quantization import WEIGHTS
from toolchain.units import parse_seconds

VERDICTS = ("met", "open", "missed", "unreachable")
"""Of ``forecast.verdict``, best first."""


@dataclass(frozen=True)
class Load:
    """The requests that speed is estimated for, in tokens."""

    prompt: int
    output: int


@dataclass(frozen=True)
class Slo:
    """Limits that a service should keep, in seconds; None: no limit."""

    ttft_s: float | None = None
    itl_s: float | None = None

    @classmethod
    def parse(cls, text: str) -> Slo:
        """``"ttft=1s,itl=50ms"``. Raises ValueError that says how it is written."""
        found: dict[str, float] = {}
        for part in text.split(","):
            key, _, value = (piece.strip() for piece in part.partition("="))
            if key not in ("ttft", "itl") or key in found:
                raise ValueError(f"{part.strip()!r} is not a limit; write it as ttft=1s,itl=50ms")
            found[key] = parse_seconds(value)
        return cls(found.get("ttft"), found.get("itl"))


@dataclass(frozen=True)
class Speed:
    """Our estimates for one option: first tokens one prompt at a time, steps with all its sequences in flight."""

    ttft: Estimate
    itl: Estimate
    tokens_per_s: float
    """Output tokens of the device, requests of the load always waiting; several services share its time."""
    ttft_band: Band
    itl_band: Band
    tokens_band: Band
    assumptions: tuple[str, ...]
    guessed: str = ""
    """The format that it multiplies in, where nothing was ever measured in it on this architecture; else empty."""
    unpacked_from_s: float | None = None
    """Of weights that are unpacked: TTFT of weights in the format that they are unpacked to."""
    ttft_verdict: str = ""
    """What the estimate says of the limit while all services are busy; empty without a limit."""
    itl_verdict: str = ""

    @property
    def verdict(self) -> str:
        """The worse of both; empty without limits."""
        found = [one for one in (self.ttft_verdict, self.itl_verdict) if one]
        return max(found, key=VERDICTS.index, default="")

    @property
    def sure_ttft_s(self) -> float:
        """What ranks: the estimate, or the bad end of its error where it is guessed.

        Weights that are unpacked never rank before those that need not be: what an estimate sees in short prompts,
        where reading weights takes longest, nobody measured (TensorRT-LLM issues 1565, 2487: they are slower).
        """
        least = max(self.ttft.seconds, self.unpacked_from_s or 0.0)
        return least * (1 + self.ttft_band.worst if self.guessed else 1)

    @property
    def sure_tokens_per_s(self) -> float:
        """As ``sure_ttft_s``."""
        return self.tokens_per_s / (1 + self.tokens_band.worst if self.guessed else 1)


def speed_of(plan: Plan, load: Load, slo: Slo) -> Speed | None:
    """The estimates for the load; None on a CPU."""
    made, known = plan.deployment, plan.latency
    if made is None or known is None:
        return None
    at_once = max(1, min(plan.limits.max_batch_size, plan.memory.sequences_at_full_length))
    context = load.prompt + load.output // 2
    name = compute_format(plan.weights)
    plain = replace(made, weights=WEIGHTS["none" if name == "fp16" else name])
    first = Estimate(load.prompt, 1, prefill(made, load.prompt).total_s, prefill_floor_s(made, load.prompt))
    step = Estimate(context, at_once, decode(made, at_once, context).total_s, decode_floor_s(made, at_once, context))
    return Speed(
        ttft=first,
        itl=step,
        tokens_per_s=in_flight_tokens_per_s(made, at_once, load.prompt, load.output),
        ttft_band=known.ttft_band,
        itl_band=known.itl_band,
        tokens_band=known.tokens_band,
        assumptions=known.assumptions,
        guessed=name if (plan.device.arch, name) in factors().assumed else "",
        unpacked_from_s=prefill(plain, load.prompt).total_s if unpacks(plan.weights) else None,
        ttft_verdict=_verdict(first, slo.ttft_s, known.ttft_band, plan.services),
        itl_verdict=_verdict(step, slo.itl_s, known.itl_band, plan.services),
    )


def _verdict(estimate: Estimate, limit_s: float | None, allowed: Band, services: int) -> str:
    """What the estimate says of a limit while all services are busy: they take turns, each as long as alone.

    Our assumption, which counts against several services. The floor is that of one alone.
    """
    if limit_s is None:
        return ""
    return verdict(replace(estimate, seconds=estimate.seconds * services), limit_s, allowed)
