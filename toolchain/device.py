"""The devices that we plan for, and what they cost: one entry each in ``facts/devices.yaml`` and ``facts/prices.yaml``.

A device says what it *has* (SM, memory, number formats, backends). It does not know quantizations, recipes or models:
``plan`` joins what a quantization needs with what a device has.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from toolchain import workspace
from toolchain.errors import RecipeError
from toolchain.units import MIB


@dataclass(frozen=True)
class Device:
    """One kind of GPU, or the CPU."""

    name: str
    title: str
    aliases: tuple[str, ...]
    reported_as: tuple[str, ...]
    """The names that the driver's tools print for it."""
    data_center: bool
    """Whether CUDA's forward compatibility is for this card: a newer image on an older driver."""
    arch: str
    sm: int | None
    """Compute capability times ten (89 for 8.9); None for a CPU."""
    memory_mib: int | None
    """Total memory as the driver reports it; None where the machine must be asked."""
    bandwidth_gb_s: float | None
    tflops: Mapping[str, float]
    """Dense peak by number format, 10^12 operations per second, 16-bit and 8-bit floats with FP32 accumulation."""
    dtypes: frozenset[str]
    power_w: int | None
    backends: tuple[str, ...]
    """Backends that can run here, the default first."""
    skypilot: str
    """Its name in SkyPilot's catalog; empty where none of its clouds has it."""
    skypilot_clouds: tuple[str, ...]
    """Of SkyPilot's clouds those that have it and run a task in a docker image."""
    notes: str
    date: str
    sources: Mapping[str, str]
    """Names of fields, joined by a comma -> where their values come from."""
    estimated: frozenset[str]
    """Values that are derived, or not read in a primary source: ``"bandwidth_gb_s"`` or ``"tflops.int4"``."""

    @property
    def is_cpu(self) -> bool:
        return self.sm is None

    @property
    def memory_bytes(self) -> int | None:
        return None if self.memory_mib is None else self.memory_mib * MIB


@dataclass(frozen=True)
class Price:
    """One public price of one GPU for one hour, with its vendor, date and source."""

    device: str
    usd_per_hour: float
    vendor: str
    offer: str
    region: str | None
    kind: str
    """``"on-demand"`` or ``"spot"``."""
    date: str
    source: str
    estimated: bool


@functools.cache
def devices() -> Mapping[str, Device]:
    """Name -> device, in the order of ``facts/devices.yaml``."""
    return MappingProxyType({name: _device(name, row) for name, row in workspace.facts("devices").items()})


def _device(name: str, row: Mapping[str, Any]) -> Device:
    return Device(
        name=name,
        title=row["title"],
        aliases=tuple(row["aliases"]),
        reported_as=tuple(row["reported_as"]),
        data_center=row["data_center"],
        arch=row["arch"],
        sm=row["sm"],
        memory_mib=row["memory_mib"],
        bandwidth_gb_s=row["bandwidth_gb_s"],
        tflops=MappingProxyType({dtype: float(peak) for dtype, peak in row["tflops"].items()}),
        dtypes=frozenset(row["dtypes"]),
        power_w=row["power_w"],
        backends=tuple(row["backends"]),
        skypilot=row.get("skypilot", {}).get("name", ""),
        skypilot_clouds=tuple(row.get("skypilot", {}).get("clouds", ())),
        notes=row["notes"],
        date=str(row["date"]),
        sources=MappingProxyType(dict(row["source_of"])),
        estimated=frozenset(row["estimated"]),
    )


def _plain(name: str) -> str:
    """``"NVIDIA GeForce RTX 4090"`` -> ``"rtx4090"``: how names are compared."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"nvidia|geforce|tesla", "", name.lower()))


@functools.cache
def _spellings() -> Mapping[str, str]:
    """Every accepted spelling, as ``_plain`` gives it -> the device's name."""
    return MappingProxyType(
        {_plain(word): name for name, entry in devices().items() for word in (name, entry.title, *entry.aliases)}
    )


def find_device(name: str) -> Device | None:
    """The device of that name or alias (``"RTX 4090"``, ``"A100"``), whatever the case and punctuation, or None."""
    known = _spellings().get(_plain(name))
    return devices()[known] if known else None


def reported_device(name: str) -> Device | None:
    """The device that the driver's tools call so: ``"Tesla T4"``, ``"NVIDIA A100-SXM4-40GB MIG 3g.20gb"``; or None.

    Exact, unlike ``find_device``: an ``"NVIDIA GeForce RTX 4090 D"`` is another card.
    """
    whole = name.partition(" MIG ")[0].strip()
    return next((entry for entry in devices().values() if whole in entry.reported_as), None)


def closest_device(name: str) -> str:
    """The name of the known device that is spelled most like ``name``, or ``""``."""
    near = get_close_matches(_plain(name), list(_spellings()), n=1, cutoff=0.6)
    return _spellings()[near[0]] if near else ""


def device(name: str) -> Device:
    """The device of that name or alias. Raises RecipeError with the nearest name and the list."""
    found = find_device(name)
    if found is None:
        near = closest_device(name)
        raise RecipeError(
            f"device {name!r} is not known" + (f" (did you mean {near!r}?)" if near else ""),
            hint="Known devices: " + ", ".join(devices()),
        )
    return found


@functools.cache
def prices(name: str) -> tuple[Price, ...]:
    """Every price that we have of a device (its name, not an alias), cheapest first; empty where there is none."""
    found = [
        Price(
            device=row["device"],
            usd_per_hour=float(row["usd_per_hour"]),
            vendor=row["vendor"],
            offer=row["offer"],
            region=row["region"],
            kind=row["kind"],
            date=str(row["date"]),
            source=row["source"],
            estimated=bool(row.get("estimated", False)),
        )
        for row in workspace.facts("prices")
        if row["device"] == name
    ]
    return tuple(sorted(found, key=lambda price: (price.usd_per_hour, price.vendor, price.offer)))
