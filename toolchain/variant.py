"""A recipe for one of several devices, and with its open formats settled. Pure.

``per_device`` in a recipe changes keys for one device; ``auto`` leaves a number format to the device. Both are gone
from what comes out of here. It knows formats, devices and backends; whether the whole fits is not decided here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from toolchain.device import Device, closest_device, device, devices, find_device
from toolchain.errors import RecipeError
from toolchain.quantization import KV, WEIGHTS
from toolchain.recipe import Recipe, contradictions
from toolchain.release import backends

AUTO = "auto"


class Choice(NamedTuple):
    """A format that a recipe left open: the recipe's key, what was chosen, and why."""

    key: str
    value: str
    reason: str


def for_device(recipe: Recipe, name: str) -> Recipe:
    """The recipe with ``device: name`` and what its ``per_device`` says of it. Raises RecipeError with all problems."""
    found = find_device(name)
    if found is None:
        near = closest_device(name)
        meant = f" (did you mean {near!r}?)" if near else ""
        raise RecipeError(f"--device {name}: no such device{meant}", hint="One of: " + ", ".join(devices()))
    changes = recipe.per_device.get(found.name)
    given = recipe.model_dump(exclude_unset=True)
    merged = _merge(given, changes.model_dump(exclude_unset=True) if changes else {})
    merged |= {"name": recipe.name, "device": found.name}
    if not found.is_cpu:
        merged.pop("cpu", None)
    problems = [f"{'.'.join(where)}: {message}" for where, message in contradictions(merged)]
    try:
        made = Recipe.model_validate(merged)
    except ValidationError as error:
        problems += [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        made = recipe
    if problems:
        raise RecipeError(
            f"{recipe.path}: for the {found.name}: " + "; ".join(problems), hint=f"per_device: {found.name}: ..."
        )
    return made.from_file(recipe.text, recipe.path)


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def settle(recipe: Recipe) -> tuple[Recipe, tuple[Choice, ...]]:
    """The recipe without ``auto``, and what was chosen: FP8 where the device multiplies it, else int4 by AWQ.

    The cache: FP8 where the device has it, else INT8, as far as the backend takes them, else 16 bits.
    """
    asked, target = recipe.quantization, device(recipe.device)
    backend = recipe.chosen_backend
    changes: dict[str, Any] = {}
    chosen: list[Choice] = []
    if asked.weights == AUTO:
        weights, reason = _weights(target, backend)
        method = {"method": "awq"} if weights == "int4" and "method" not in asked.model_fields_set else {}
        changes["quantization"] = asked.model_copy(update={"weights": weights, **method})
        chosen.append(Choice("quantization.weights", weights, reason))
    if recipe.kv_cache.dtype == AUTO:
        kv, reason = _cache(target, backend)
        changes["kv_cache"] = recipe.kv_cache.model_copy(update={"dtype": kv})
        chosen.append(Choice("kv_cache.dtype", kv, reason))
    return (recipe.model_copy(update=changes) if changes else recipe), tuple(chosen)


def _weights(target: Device, backend: str) -> tuple[str, str]:
    takes = backends()[backend].weights
    if not target.is_cpu and "fp8" in takes and WEIGHTS["fp8"].needs <= target.dtypes:
        return "fp8", f"auto: the {target.title} multiplies FP8"
    if "int4" in takes and WEIGHTS["int4"].needs <= target.dtypes:
        why = "on a CPU the bytes of the weights decide" if target.is_cpu else f"the {target.title} has no FP8"
        return "int4", f"auto: {why}, and int4 is the smallest"
    return "none", f"auto: {backends()[backend].title} has neither FP8 nor int4 on the {target.title}"


def _cache(target: Device, backend: str) -> tuple[str, str]:
    takes = backends()[backend].kv
    for name in ("fp8", "int8"):
        if name in takes and KV[name].needs <= target.dtypes:
            return name, f"auto: the smallest cache that the {target.title} has with {backends()[backend].title}"
    return "fp16", f"auto: {backends()[backend].title} has no smaller cache on the {target.title}"
