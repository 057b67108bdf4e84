"""Whether a plan fits into the device's memory; and where it does not, by how much, and what would. Pure.

It asks ``memory`` again and again: with the recipe's choices, and with one or two of them changed. It does not know
speed, prices or other devices, and it decides nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from toolchain.device import Device
from toolchain.engine import Limits
from toolchain.family import LlamaConfig
from toolchain.planning.decisions import Notes
from toolchain.planning.kv_window import KvWindow
from toolchain.planning.memory import RESERVE, MemoryPlan, memory_plan
from toolchain.planning.speculation import Speculation
from toolchain.quantization import KV, WEIGHTS, KvScheme, WeightScheme
from toolchain.recipe import Recipe
from toolchain.release import backends
from toolchain.units import MIB, format_bytes, parse_bytes


@dataclass(frozen=True)
class Cache:
    """What decides how much of the cache a sequence takes, and who shares the device."""

    window: KvWindow | None
    speculation: Speculation | None

    def sequence_tokens(self, limits: Limits) -> int:
        drafted = self.speculation.tokens if self.speculation else 0
        return self.window.kept(limits.max_seq_len) if self.window else limits.max_seq_len + drafted


@dataclass(frozen=True)
class _Change:
    """What is asked with something else than the recipe says."""

    weights: WeightScheme
    kv: KvScheme
    limits: Limits
    services: int
    reserve: int


def capacity(
    recipe: Recipe,
    config: LlamaConfig,
    weights: WeightScheme,
    kv: KvScheme,
    limits: Limits,
    target: Device,
    notes: Notes,
    cache: Cache,
    *,
    fused: bool,
    host: int | None,
    advise: bool = True,
) -> MemoryPlan:
    """The memory of the plan; refuses what does not fit, and says by how much and what would, with its numbers.

    ``fused``: a prompt's attention is one kernel. ``host``: the memory of a device that does not state its own.
    ``advise``: whether to look for what would fit.
    """
    size, reserve = recipe.kv_cache.size, parse_bytes(recipe.reserve or 0)

    def ask(asked: _Change) -> MemoryPlan:
        return memory_plan(
            config,
            asked.weights,
            asked.kv,
            asked.limits,
            target,
            tp=recipe.parallel.tp,
            pp=recipe.parallel.pp,
            services=asked.services,
            unfused_attention=not fused,
            group_size=recipe.quantization.group_size,
            kv_tokens=recipe.kv_cache.max_tokens,
            kv_pool_bytes=parse_bytes(size) if size else None,
            host_memory_bytes=host,
            sequence_tokens=cache.sequence_tokens(asked.limits),
            draft=cache.speculation.draft if cache.speculation else None,
            reserve_bytes=asked.reserve,
        )

    asked = _Change(weights, kv, limits, recipe.services, reserve)
    found = ask(asked)
    if found.missing_bytes:
        better = list(_better(asked, recipe.chosen_backend, target, ask)) if advise else []
        has = "" if found.available is None else f", {found.available // MIB} MiB"
        notes.refuse(
            f"memory: {_spoken(weights)} weights and {kv.name} KV need {format_bytes(found.total)}, "
            f"{-(-found.missing_bytes // MIB)} MiB more than the {target.title} has{has} (largest: {_largest(found)})",
            "Any one of these would fit: " + "; ".join(better) if better else _no_change(target),
        )
    elif not found.fits:
        key, needed = "size" if size else "max_tokens", cache.sequence_tokens(limits)
        reason = f"kv_cache.{key} holds {found.max_kv_tokens} tokens, not one sequence of {needed}"
        notes.refuse(reason, f"Use kv_cache max_tokens: {needed} or more, or a shorter max_seq_len")
    return found


def _spoken(weights: WeightScheme) -> str:
    return weights.name if weights.quant_algo else "unquantized"


def _no_change(target: Device) -> str:
    return (
        f"Nothing that a recipe can change makes it fit on one {target.title}: another device, or parallel: {{tp: 2}}"
    )


def _better(asked: _Change, backend: str, target: Device, ask: Callable[[_Change], MemoryPlan]) -> Iterator[str]:
    """Single changes that fit, each as a recipe says it and with what it holds; pairs only where no single one does."""

    def told(change: _Change, words: str) -> Iterator[str]:
        found = ask(change)
        if found.fits:
            count, length = found.sequences_at_full_length, change.limits.max_seq_len
            yield f"{words} ({count} sequence{'s' * (count != 1)} of {length} tokens)"

    accepts = backends()[backend]
    weights = [WEIGHTS[name] for name in accepts.weights if _helps(WEIGHTS[name], target)]
    kv = [KV[name] for name in accepts.kv if _helps(KV[name], target)]
    before = False
    for line in _single(asked, weights, kv, told, ask):
        before = True
        yield line
    if before:
        return
    for scheme in weights:
        for cache in kv:
            both = replace(asked, weights=scheme, kv=cache)
            yield from told(both, f"weights: {scheme.name} with kv_cache dtype: {cache.name}")
        shorter = partial(_with, asked, scheme)
        for key, limits in _halvings(asked.limits, _fits(shorter, ask)):
            yield from told(shorter(limits), f"weights: {scheme.name} with {key}: {getattr(limits, key)}")


def _fits(made: Callable[[Limits], _Change], ask: Callable[[_Change], MemoryPlan]) -> Callable[[Limits], bool]:
    return lambda limits: ask(made(limits)).fits


def _with(asked: _Change, weights: WeightScheme, limits: Limits) -> _Change:
    return replace(asked, weights=weights, limits=limits)


def _single(
    asked: _Change,
    weights: list[WeightScheme],
    kv: list[KvScheme],
    told: Callable[[_Change, str], Iterator[str]],
    ask: Callable[[_Change], MemoryPlan],
) -> Iterator[str]:
    """One thing changed."""
    for scheme in weights:
        yield from told(replace(asked, weights=scheme), f"weights: {scheme.name}")
    for cache in kv:
        yield from told(replace(asked, kv=cache), f"kv_cache dtype: {cache.name}")
    for key, limits in _halvings(asked.limits, lambda one: ask(replace(asked, limits=one)).fits):
        yield from told(replace(asked, limits=limits), f"{key}: {getattr(limits, key)}")
    for fewer in range(asked.services - 1, 0, -1):
        if ask(replace(asked, services=fewer)).fits:
            yield from told(replace(asked, services=fewer), f"services: {fewer}")
            break
    if asked.reserve:
        yield from told(replace(asked, reserve=0), f"no {RESERVE}")


def _halvings(limits: Limits, fits: Callable[[Limits], bool]) -> Iterator[tuple[str, Limits]]:
    """For each limit alone, the largest halving of it that ``fits``: (the recipe's key, the limits with it)."""
    for key, least in (("max_input_len", 256), ("max_seq_len", 256), ("max_batch_size", 1)):
        value = getattr(limits, key) // 2
        while value >= least:
            changed = _within(replace(limits, **{key: value}))
            if fits(changed):
                yield key, changed
                break
            value //= 2


def _within(limits: Limits) -> Limits:
    """Limits made consistent again after one of them shrank."""
    prompt = min(limits.max_input_len, limits.max_seq_len)
    tokens = min(limits.max_num_tokens, limits.max_batch_size * limits.max_seq_len)
    return replace(limits, max_input_len=prompt, max_num_tokens=tokens)


def _helps(scheme: WeightScheme | KvScheme, target: Device) -> bool:
    return scheme.quant_algo is not None and scheme.needs <= target.dtypes


def _largest(memory: MemoryPlan) -> str:
    """The largest term that is not the cache, which takes what is left: ``"MLP weights: 15.82 GiB"``."""
    fixed = (line for line in memory.lines if not line.name.endswith("KV cache"))
    line = max(fixed, key=lambda line: line.bytes)
    return f"{line.name}: {format_bytes(line.bytes)}"
