"""One way to serve a model: a device, formats, copies of the service; and what a plan says of it at a load. Pure.

Where a recipe leaves open how many sequences run at once, as many are taken as the memory and the limit on the time
between tokens allow. It compares nothing: ``choice`` does. Speed is estimated, never measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from toolchain.device import Device, Price, device
from toolchain.engine import Limits
from toolchain.errors import PlanError, RecipeError
from toolchain.family import LlamaConfig
from toolchain.planning.decisions import Notes, check_formats
from toolchain.planning.load import VERDICTS, Load, Slo, Speed, speed_of
from toolchain.planning.memory import WEIGHT_LINES, MemoryPlan
from toolchain.planning.money import Score, score, tokens_per_usd
from toolchain.planning.plan import Plan, make_plan, memory_of
from toolchain.planning.price_list import PriceList
from toolchain.quantization import KV, WEIGHTS
from toolchain.recipe import Quantization, Recipe, RecipeLimits
from toolchain.release import backends, usable
from toolchain.units import format_bytes
from toolchain.variant import for_device, settle

MOST_AT_ONCE = 256
"""Sequences in flight that are tried where nobody names a number. Our choice."""

MOST_SERVICES = 8
"""Copies of a service on one device that ``auto`` tries. Our choice."""


@dataclass(frozen=True)
class Asked:
    """What all options have in common."""

    recipe: Recipe
    config: LlamaConfig
    load: Load
    slo: Slo = field(default=Slo())
    services: int | None = 1
    """None: as many as fit, each number of them an option of its own."""
    prices: PriceList = field(default=PriceList())
    draft: LlamaConfig | None = None
    """Of the draft model, where the recipe names one."""
    quantized: Quantization | None = None
    """What the weights are already, where another tool quantized them: they cannot become anything else."""
    host_memory_bytes: int | None = None
    """Of a device that does not state its own, the CPU; None: enough."""


@dataclass(frozen=True)
class Option:
    """One row: what it is, whether it fits, and where it does, what it holds, how fast it is and what it costs."""

    device: str
    title: str
    weights: str
    kv: str
    services: int
    own: bool
    """Whether the recipe itself asks for these formats and services."""
    why_not: str = ""
    """The first reason why it cannot run; empty where it can."""
    nearest: str = ""
    """What would have to change, where it cannot run."""
    backend: str = ""
    release: str | None = None
    releases: tuple[str, ...] = ()
    """Those that list these formats here, oldest first (facts/releases.yaml); the plan takes the newest."""
    limits: Limits | None = None
    sequences: int = 0
    """Of full length in the cache of one service."""
    weight_bytes: int = 0
    """Of one service, with scales, embedding and head."""
    total_bytes: int = 0
    free_bytes: int | None = None
    gpus: int = 1
    speed: Speed | None = None
    """None on a CPU, and where it cannot run."""
    price: Price | None = None
    tokens_per_usd: float | None = None
    score: Score | None = None
    """FEDML's, with the estimated TTFT of services that are asked one at a time."""
    cautions: tuple[str, ...] = ()
    plan: Plan | None = field(default=None, repr=False, compare=False)

    @property
    def fits(self) -> bool:
        return not self.why_not

    @property
    def usd_per_hour(self) -> float | None:
        """Of all its GPUs."""
        return self.price.usd_per_hour * self.gpus if self.price else None

    @property
    def name(self) -> str:
        """``"rtx4090 fp8/fp8 x1"``: unique among the options of one choice."""
        return f"{self.device} {self.weights}/{self.kv} x{self.services}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, without the plan."""
        found = asdict(replace(self, plan=None))
        del found["plan"]
        verdict_of_both = self.speed.verdict if self.speed else None
        return {"name": self.name, "fits": self.fits, **found, "verdict": verdict_of_both or None}


def options(asked: Asked, name: str) -> Iterator[Option]:
    """Every option on one device, by its name: all formats that some backend there has, or why it has not."""
    target = device(name)
    try:
        base = for_device(asked.recipe, name)
    except RecipeError as error:
        yield Option(name, target.title, "-", "-", 1, own=False, why_not=error.message, nearest=error.hint)
        return
    own, _ = settle(base)
    for weights, kv in _formats(asked, target, base):
        most = MOST_AT_ONCE
        for services in range(1, MOST_SERVICES + 1) if asked.services is None else (asked.services,):
            mine = bool(base.text) and (weights, kv, services) == (
                own.quantization.weights,
                own.kv_cache.dtype,
                own.services,
            )
            made = _option(asked, base, target, weights, kv, services, most, own=mine)
            if not made.fits and asked.services is None and services > 1:
                break
            most = made.limits.max_batch_size if made.limits else most
            yield made


def _formats(asked: Asked, target: Device, base: Recipe) -> Iterator[tuple[str, str]]:
    """Pairs of formats that the device's backends know; 32 bits of cache are for comparisons only."""
    known = [backends()[name] for name in _backends(target, base)]
    weights = dict.fromkeys(name for accepts in known for name in accepts.weights)
    if asked.quantized:
        weights = dict.fromkeys([asked.quantized.weights])
    caches = dict.fromkeys(name for accepts in known for name in accepts.kv if name != "fp32")
    return ((one, other) for one in weights for other in caches)


def _backends(target: Device, base: Recipe) -> tuple[str, ...]:
    return (base.backend,) if base.backend in target.backends else target.backends


def _option(
    asked: Asked, base: Recipe, target: Device, weights: str, kv: str, services: int, most: int, *, own: bool
) -> Option:
    """The option with the first backend that runs it, or the first one's refusal."""
    refused: PlanError | None = None
    for backend in _backends(target, base):
        recipe = _recipe(asked, base, target, weights, kv, services, backend)
        try:
            _check(target, weights, kv, backend)
            extra = asked.services is None and services > 1  # its refusal is not shown
            return _made(asked, _fitting(asked, recipe, most, advise=not extra), own=own)
        except PlanError as error:
            refused = refused or error
    assert refused is not None
    reason, hint = refused.reasons[0], refused.hint
    return Option(target.name, target.title, weights, kv, services, own, why_not=reason, nearest=hint)


def _recipe(asked: Asked, base: Recipe, target: Device, weights: str, kv: str, services: int, backend: str) -> Recipe:
    """The recipe with these formats; int4 by AWQ, unless it names int4 itself. The device's first backend is unsaid."""
    quantization = asked.quantized or base.quantization
    if quantization.weights != weights:
        method = {"method": "awq"} if weights == "int4" else {}
        quantization = Quantization.model_validate({"weights": weights, **method})
    return base.model_copy(
        update={
            "quantization": quantization,
            "kv_cache": base.kv_cache.model_copy(update={"dtype": kv}),
            "services": services,
            "backend": base.backend if backend in (base.backend, target.backends[0]) else backend,
        }
    )


def memory_needed(asked: Asked, one: Option) -> MemoryPlan | None:
    """The memory of an option, also of one that does not fit, for which the least counts: one sequence at a time.

    None where it is refused for another reason than its memory.
    """
    if one.plan:
        return one.plan.memory
    if not one.why_not.startswith("memory: "):
        return None
    target = device(one.device)
    base = for_device(asked.recipe, one.device)
    for backend in _backends(target, base):
        recipe = _recipe(asked, base, target, one.weights, one.kv, one.services, backend)
        limits = recipe.limits.model_copy(update={"max_batch_size": 1})
        known: dict[str, Any] = {"draft": asked.draft, "host_memory_bytes": asked.host_memory_bytes}
        with suppress(PlanError):
            return memory_of(recipe.model_copy(update={"limits": limits}), asked.config, **known)
    return None


def _check(target: Device, weights: str, kv: str, backend: str) -> None:
    """Refuse what the device or the backend lacks, before anything is computed."""
    notes = Notes()
    check_formats(WEIGHTS[weights], KV[kv], target, backend, notes)
    notes.raise_if_refused(target.name)


def _fitting(asked: Asked, recipe: Recipe, most: int, *, advise: bool) -> Plan:
    """The plan with as many sequences at once as the recipe says; or as many as fit, and keep the limit on ITL.

    ``advise``: of ``make_plan``, for the refusal that is raised; those on the way to a plan need no advice.
    """

    known: dict[str, Any] = {"draft": asked.draft, "host_memory_bytes": asked.host_memory_bytes}

    def plan(batch: int, *, advise: bool = False) -> Plan:
        limits = recipe.limits.model_copy(update={"max_batch_size": batch})
        return make_plan(recipe.model_copy(update={"limits": limits}), asked.config, **known, advise=advise)

    if "max_batch_size" in recipe.limits.model_fields_set:
        most = min(most, recipe.limits.max_batch_size)
        if most == recipe.limits.max_batch_size:
            try:
                return plan(most)
            except PlanError as error:
                if not error.reasons[0].startswith("memory: "):
                    if len(error.reasons) == 1:
                        raise
                    return plan(most, advise=advise)
    found = plan(1, advise=advise)
    batch = _at_most(found, most)
    while batch > 1:
        try:
            larger = plan(batch)
        except PlanError:
            batch //= 2
            continue
        if larger.memory.sequences_at_full_length >= batch and _keeps(asked, larger, found):
            return larger
        batch //= 2
    return found


def _at_most(one: Plan, most: int) -> int:
    """The largest power of two whose sequences may fit beside each other, seen from a plan of one at a time."""
    if one.memory.free_bytes is None:
        room = RecipeLimits().max_batch_size
    else:
        squared = sum(line.bytes for line in one.memory.lines if line.name == "attention workspace") // one.services
        each = one.memory.kv_bytes_per_sequence + squared
        room = 1 + int(one.memory.free_bytes / one.services / each)
    return 1 << (max(1, min(room, most)).bit_length() - 1)


def _keeps(asked: Asked, larger: Plan, one: Plan) -> bool:
    """Whether the limit on ITL is kept as well as by one sequence at a time."""
    if asked.slo.itl_s is None or larger.deployment is None:
        return True
    found = [speed_of(plan, asked.load, asked.slo) for plan in (larger, one)]
    together, alone = (VERDICTS.index(speed.itl_verdict) for speed in found if speed)
    return together <= alone


def _made(asked: Asked, plan: Plan, *, own: bool) -> Option:
    """What a plan says, as an option."""
    price, short = asked.prices.of(plan.device.name), _too_short(plan, asked.load)
    if short:
        named = (plan.device.name, plan.device.title, plan.weights.name, plan.kv.name, plan.services, own)
        return Option(*named, why_not=short, nearest=f"other limits in the recipe (per_device: {plan.device.name})")
    option = Option(
        plan.device.name,
        plan.device.title,
        plan.weights.name,
        plan.kv.name,
        plan.services,
        own,
        backend=plan.backend,
        release=plan.release.version if plan.release else None,
        releases=_releases(plan),
        limits=plan.limits,
        sequences=plan.memory.sequences_at_full_length,
        weight_bytes=sum(line.bytes for line in plan.memory.lines if line.name in WEIGHT_LINES) // plan.services,
        total_bytes=plan.memory.total,
        free_bytes=plan.memory.free_bytes,
        gpus=plan.tp * plan.pp,
        speed=speed_of(plan, asked.load, asked.slo),
        price=price,
        cautions=plan.warnings,
        plan=plan,
    )
    if option.speed is None or option.usd_per_hour is None:
        return option
    scored = score(option.services, option.speed.ttft.seconds, option.usd_per_hour, asked.slo.ttft_s)
    return replace(option, score=scored, tokens_per_usd=tokens_per_usd(option.speed.tokens_per_s, option.usd_per_hour))


def _too_short(plan: Plan, load: Load) -> str:
    """Why limits that are named for a device do not take the load."""
    limits = plan.limits
    if load.prompt > limits.max_input_len:
        return f"limits.max_input_len {limits.max_input_len}: a prompt of {load.prompt} tokens is longer"
    if load.prompt + load.output > limits.max_seq_len:
        return f"limits.max_seq_len {limits.max_seq_len}: {load.prompt} tokens in and {load.output} out are longer"
    return ""


def _releases(plan: Plan) -> tuple[str, ...]:
    if plan.release is None or plan.device.sm is None:
        return ()
    if plan.recipe.tensorrt_llm:
        return (plan.release.version,)
    needs = (plan.weights.needs | plan.kv.needs) & plan.device.dtypes
    return tuple(one.version for one in usable(plan.device.sm, plan.backend, needs))


def holds(option: Option) -> str:
    """``"18 x 1280 tokens, 2.31 GiB free"``: the cache of one service, and what is left of the device."""
    if option.limits is None:
        return ""
    free = "" if option.free_bytes is None else f", {format_bytes(option.free_bytes)} free"
    return f"{option.sequences} x {option.limits.max_seq_len} tokens{free}"
