"""Where a recipe is refused: what works that is most like it, with its numbers. Pure.

First on the recipe's own device, with other formats or fewer sequences at once; where nothing does, on the smallest
other GPU. It changes nothing else of the recipe, so that it is silent about a pin or a split that nothing runs.
"""

from __future__ import annotations

from typing import Any

from toolchain.device import Device, device, devices
from toolchain.planning.option import Asked, Option, holds, options
from toolchain.quantization import WEIGHTS
from toolchain.recipe import Recipe
from toolchain.variant import settle


def alternative(asked: Asked) -> Option | None:
    """The option that is most like the recipe; None where no GPU has one."""
    own, _ = settle(asked.recipe)
    here = [one for one in options(asked, own.device) if one.fits]
    if here:
        return min(here, key=lambda one: _distance(one, own))
    for other in sorted(devices().values(), key=_memory):
        found = [] if other.is_cpu or other.name == own.device else list(options(asked, other.name))
        able = [one for one in found if one.fits]
        if able:
            return min(able, key=lambda one: _distance(one, own))
    return None


def _memory(one: Device) -> int:
    return one.memory_mib or 0


def _distance(one: Option, own: Recipe) -> tuple[Any, ...]:
    """How much is different: weights and their bits first, then the cache; among equals the shorter first token."""
    asked = own.quantization.weights
    bits = abs(WEIGHTS[one.weights].bits - WEIGHTS[asked].bits)
    ttft = one.speed.sure_ttft_s if one.speed else 0.0
    return (one.weights != asked, bits, one.kv != own.kv_cache.dtype, ttft, len(one.cautions), one.name)


def told(one: Option, own: Recipe) -> str:
    """``"Nearest that works: weights: fp8, kv_cache dtype: fp16 on the RTX 4090: 2 x 4096 tokens, ..."``"""
    changed = [f"weights: {one.weights}", f"kv_cache dtype: {one.kv}"]
    if one.limits and one.limits.max_batch_size != own.limits.max_batch_size:
        changed.append(f"max_batch_size: {one.limits.max_batch_size}")
    if one.device != own.device:
        changed.insert(0, f"device: {one.device}")
    if one.speed is None:
        return f"Nearest that works: {', '.join(changed)} on the {one.title}: {holds(one)}"
    first = f"first token of {one.speed.ttft.tokens} after {one.speed.ttft.seconds * 1000:.0f} ms by our estimate"
    return f"Nearest that works: {', '.join(changed)} on the {device(one.device).title}: {holds(one)}; {first}"
