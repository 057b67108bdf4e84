"""What a plan says of speed: TTFT, ITL and tokens per second with their floors, and how far they may be off. Pure.

Chooses at which prompts, contexts and batches ``latency`` is asked, and judges a limit (an SLO) against an estimate,
its error and its floor. Everything in it is an estimate, never a measurement. It does not know recipes or prices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from toolchain import workspace
from toolchain.engine import Limits
from toolchain.planning.latency import (
    Deployment,
    compute_format,
    decode,
    decode_floor_s,
    factors,
    in_flight_ceiling,
    in_flight_tokens_per_s,
    prefill,
    prefill_floor_s,
    unpacks,
)

PROMPTS = (512, 1024, 2048, 4096)
"""Prompt lengths that every plan answers for, as far as max_input_len goes."""

DRAFTED = "steps of one token each: what the draft model gains depends on how often it guesses right"
KIND = "our estimate, not a measurement"


@dataclass(frozen=True)
class Estimate:
    """One step: a prompt's (TTFT, without queue and server) or that of one token for each sequence (ITL)."""

    tokens: int
    """Of the prompt; or in the cache of each sequence."""
    batch: int
    seconds: float
    floor_s: float
    """What the data sheet's peaks allow at best."""


@dataclass(frozen=True)
class Band:
    """How far an estimate may be off, in either direction: 0.3 means from 1 / 1.3 to 1.3 times the estimate."""

    worst: float
    typical: float | None
    """Median; None where nothing was measured."""
    why: str


@dataclass(frozen=True)
class Forecast:
    """The speed of one service that has its GPU to itself."""

    kind: str
    ttft: tuple[Estimate, ...]
    """By prompt length, one prompt at a time; the last is max_input_len."""
    itl: tuple[Estimate, ...]
    """At batch 1 and with as many sequences as limits and cache allow, contexts half full."""
    prompt: int
    output: int
    sequences: int
    tokens_per_s: float
    """Output tokens of all sequences, requests of ``prompt`` and ``output`` tokens always waiting."""
    ceiling_tokens_per_s: float
    ttft_band: Band
    itl_band: Band
    tokens_band: Band
    assumptions: tuple[str, ...]


def forecast(made: Deployment, limits: Limits, fitting: int, *, drafted: bool = False) -> Forecast:
    """The speed of a service whose cache holds ``fitting`` sequences of max_seq_len. Not for a CPU: we have no factors.

    ``drafted``: whether a draft model speculates, which is not in the estimates.
    """
    prompt = limits.max_input_len if limits.max_input_len < limits.max_seq_len else max(1, limits.max_seq_len // 2)
    output = max(1, limits.max_seq_len - prompt)
    sequences = max(1, min(limits.max_batch_size, fitting))
    half = max(1, limits.max_seq_len // 2)
    return Forecast(
        kind=KIND,
        ttft=tuple(_first(made, tokens) for tokens in _prompts(limits)),
        itl=tuple(_next(made, batch, half) for batch in sorted({1, sequences})),
        prompt=prompt,
        output=output,
        sequences=sequences,
        tokens_per_s=in_flight_tokens_per_s(made, sequences, prompt, output),
        ceiling_tokens_per_s=in_flight_ceiling(made, sequences, prompt, output),
        ttft_band=band(made, "ttft_ms"),
        itl_band=band(made, "itl_ms"),
        tokens_band=band(made, "in_flight_tokens_per_s"),
        assumptions=(*assumptions(made), *([DRAFTED] if drafted else [])),
    )


def _prompts(limits: Limits) -> list[int]:
    return sorted({tokens for tokens in PROMPTS if tokens < limits.max_input_len} | {limits.max_input_len})


def _first(made: Deployment, tokens: int) -> Estimate:
    return Estimate(tokens, 1, prefill(made, tokens).total_s, prefill_floor_s(made, tokens))


def _next(made: Deployment, batch: int, context: int) -> Estimate:
    return Estimate(context, batch, decode(made, batch, context).total_s, decode_floor_s(made, batch, context))


def assumptions(made: Deployment) -> Iterator[str]:
    """What no measurement stands behind here; nothing for a device and formats that published tables cover."""
    device, name = made.device, compute_format(made.weights)
    if not _covered(made):
        yield f"no published TensorRT-LLM latencies of the {device.title} were fitted: {device.arch} stands for it"
    if (device.arch, name) in factors().assumed:
        row = workspace.facts("latency")["compute"][device.arch][name]
        yield f"the share of the {name} peak on {device.arch} is taken {row['assumed']}"
    if unpacks(made.weights) and device.arch != "Turing":
        yield f"how much unpacking {made.weights.name} weights slows a prompt was measured on Turing alone"
    if made.pp > 1:
        yield "no pipeline parallel measurement was compared"


def _covered(made: Deployment) -> bool:
    """Whether published TensorRT-LLM tables have this device."""
    return made.device.name in workspace.facts("latency")["measured"]


def band(made: Deployment, metric: str) -> Band:
    """How far an estimate of this metric (a name of ``errors`` in facts/latency.yaml) may be off here.

    Steps of one token read weights and do not multiply much: formats that no prompt was measured in do not widen ITL's.
    """
    facts = workspace.facts("latency")
    if not _covered(made) or (metric != "itl_ms" and any(assumptions(made))):
        return Band(float(facts["unmeasured"]["worst"]), None, facts["unmeasured"]["why"])
    found = facts["errors"][metric]
    why = f"worst and median of {found['rows']} published values that nothing was fitted to"
    return Band(float(found["worst"]), float(found["median"]), why)


def verdict(estimate: Estimate, limit_s: float, allowed: Band) -> str:
    """What an estimate says of a limit, as one word.

    ``unreachable``: the floor alone is longer, so nothing that computes in this format meets it. ``missed``: longer
    even if the estimate is as much too long as it may be. ``met``: shorter even if it is as much too short. Else
    ``open``.
    """
    if estimate.floor_s > limit_s:
        return "unreachable"
    if estimate.seconds / (1 + allowed.worst) > limit_s:
        return "missed"
    return "met" if estimate.seconds * (1 + allowed.worst) <= limit_s else "open"
