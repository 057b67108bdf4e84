"""Takes today's prices from a checkout of SkyPilot's public catalog and writes them into toolchain/facts/prices.yaml.

    git clone --filter=blob:none https://github.com/skypilot-org/skypilot-catalog CATALOG
    python scripts/refresh_prices.py CATALOG            # print the rows
    python scripts/refresh_prices.py CATALOG --write    # replace the rows below the mark in prices.yaml

One row for each device, vendor and kind: the cheapest instance, its price by GPU, with the region and the date of the
commit that last changed the vendor's file. Rows above the mark are by hand and stay. Then: `python -m tests.golden`.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from toolchain import workspace
from toolchain.device import Device, Price, devices
from toolchain.errors import RecipeError, ScalellmError
from toolchain.planning.price_list import KINDS, read_prices

PRICES = Path(__file__).parents[1] / "toolchain" / "facts" / "prices.yaml"
MARK = "# Written by scripts/refresh_prices.py from here on: a change by hand would be lost."
ADDRESS = "https://github.com/skypilot-org/skypilot-catalog"
SCHEMA = re.compile(r"Latest catalog schema version\W+(v\d+)")
"""In the catalog's README: it may hold a newer folder that nothing fills yet."""

VENDORS = {
    "aws": "AWS", "azure": "Azure", "cudo": "Cudo", "do": "DigitalOcean", "fluidstack": "FluidStack",
    "hyperbolic": "Hyperbolic", "lambda": "Lambda", "nebius": "Nebius", "oci": "OCI", "paperspace": "Paperspace",
    "runpod": "RunPod", "seeweb": "Seeweb", "vast": "Vast.ai", "verda": "Verda", "yotta": "Yotta",
}  # fmt: skip
"""Folder of the catalog -> vendor. Not GCP, which lists GPUs apart from the machines that they need; not resellers."""

MEMORY_TOLERANCE = 0.08
"""Vendors state a card's memory as its chips' or as what the driver leaves of it: 46068 or 49152 MiB for an L40S."""

LEAST_MEMORY_MIB = 1024
"""What is less is no card's memory: 0 for unknown, or gigabytes."""

CPU_VCPUS, CPU_MEMORY_GIB = 16, 64
"""A machine for the CPU engine has at least this: our choice, room for Llama-2-13B in 4 to 8 bits."""


@dataclass(frozen=True)
class Origin:
    """Where a vendor's rows are from."""

    vendor: str
    path: str
    """Of the file, in the catalog."""
    commit: str
    date: str
    """Of the commit, YYYY-MM-DD."""


def rows(catalog: Path) -> list[Price]:
    """The cheapest price of each device, vendor and kind in a checkout. Raises RecipeError for what is none."""
    readme = catalog / "README.md"
    schema = SCHEMA.search(readme.read_text(encoding="utf-8")) if readme.is_file() else None
    if schema is None:
        raise RecipeError(f"{catalog}: not a checkout of SkyPilot's catalog", hint=f"git clone {ADDRESS}")
    found: list[Price] = []
    for folder, vendor in VENDORS.items():
        path = f"catalogs/{schema[1]}/{folder}/vms.csv"
        if (catalog / path).is_file():
            commit, date = _last_change(catalog, path)
            with (catalog / path).open(encoding="utf-8", newline="") as file:
                found += cheapest(csv.DictReader(file), Origin(vendor, path, commit, date))
    return sorted(found, key=lambda one: (list(devices()).index(one.device), one.vendor, KINDS.index(one.kind)))


def _last_change(catalog: Path, path: str) -> tuple[str, str]:
    """(commit, date) of the last change of a file."""
    if _git(catalog, "rev-parse", "--is-shallow-repository") == "true":
        raise RecipeError(
            f"{catalog}: a shallow clone does not know when a file last changed",
            hint=f"git clone --filter=blob:none {ADDRESS}",
        )
    commit, _, date = _git(catalog, "log", "-1", "--format=%h %cs", "--abbrev=8", "--", path).partition(" ")
    return commit, date


def _git(catalog: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(catalog), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RecipeError(f"{catalog}: git {arguments[0]}: {done.stderr.strip()}", hint=f"git clone {ADDRESS}")
    return done.stdout.strip()


def cheapest(instances: Iterable[Mapping[str, str]], origin: Origin) -> list[Price]:
    """The rows of one ``vms.csv`` -> the cheapest of each device and kind, for one GPU and hour."""
    best: dict[tuple[str, str], Price] = {}
    for instance in instances:
        target = device_of(instance)
        for price in _prices(instance, target, origin) if target else ():
            key = (price.device, price.kind)
            if key not in best or _order(price) < _order(best[key]):
                best[key] = price
    return list(best.values())


def _order(price: Price) -> tuple[float, str, str]:
    return price.usd_per_hour, price.region or "", price.offer


def _prices(instance: Mapping[str, str], target: Device, origin: Origin) -> Iterator[Price]:
    """On demand and spot, as far as the row has them: 0 and nothing at all both mean none."""
    gpus = 1.0 if target.is_cpu else _number(instance["AcceleratorCount"])
    name, source = instance["InstanceType"], f"{ADDRESS} {origin.path} @{origin.commit}"
    offer = name if gpus == 1 else f"{name} / {gpus:g}"
    for kind, column in zip(KINDS, ("Price", "SpotPrice"), strict=True):
        usd = _number(instance.get(column, "")) / gpus
        if 0 < usd < math.inf:
            region = instance.get("Region", "").strip(", ") or None
            yield Price(
                target.name, round(usd, 4), origin.vendor, offer, region, kind, origin.date, source, estimated=False
            )


def device_of(instance: Mapping[str, str]) -> Device | None:
    """The device that an instance has; None for others, and where the row does not tell which of two cards it is."""
    name, count = instance.get("AcceleratorName", ""), _number(instance.get("AcceleratorCount", ""))
    if not instance.get("InstanceType"):
        return None
    if not name:
        return _cpu(instance)
    if count < 1:
        return None
    told = " ".join(instance.get(column, "") for column in ("InstanceType", "AcceleratorName", "GpuInfo")).lower()
    memory_mib = _memory_mib(instance.get("GpuInfo", ""), count)
    found = [one for one in devices().values() if _is(one, name, memory_mib, told)]
    return found[0] if len(found) == 1 else None


def _is(one: Device, name: str, memory_mib: set[float], told: str) -> bool:
    """Whether a row is this card: by its family and memory, or by its whole name where memory is unknown.

    A card with NVLink is sold with PCIe too, slower and cheaper: another device.
    """
    if one.is_cpu or not one.skypilot or one.memory_mib is None or ("pcie" in told and _has_nvlink(one)):
        return False
    if not memory_mib:
        return name.removesuffix("-SXM") == one.skypilot
    same = any(abs(mib / one.memory_mib - 1) <= MEMORY_TOLERANCE for mib in memory_mib)
    return same and name.partition("-")[0] == one.skypilot.partition("-")[0]


def _has_nvlink(one: Device) -> bool:
    return str(workspace.facts("latency")["interconnects"][one.name]["kind"]) == "nvlink"


def _memory_mib(told: str, count: float) -> set[float]:
    """What the memory of one card may be, of ``GpuInfo``; empty where it states none.

    Vendors state one card's and the sum, or one of them twice: then it may be either.
    """
    numbers = [re.search(rf"{key}\W+([\d.]+)", told) for key in ("SizeInMiB", "TotalGpuMemoryInMiB")]
    stated, total = (float(found[1]) if found else 0.0 for found in numbers)
    if min(stated, total) < LEAST_MEMORY_MIB:
        return set()
    return {total / count} if total > stated else {stated, stated / count}


def _cpu(instance: Mapping[str, str]) -> Device | None:
    enough = (
        _number(instance.get("vCPUs", "")) >= CPU_VCPUS and _number(instance.get("MemoryGiB", "")) >= CPU_MEMORY_GIB
    )
    return devices()["cpu"] if enough and instance.get("Arch", "") in ("", "x86_64") else None


def _number(text: str | None) -> float:
    """0 for what is no number."""
    try:
        return float(text or 0)
    except ValueError:
        return 0.0


def line(price: Price) -> str:
    """One row of prices.yaml."""
    values = {
        **{"device": price.device, "usd_per_hour": price.usd_per_hour, "vendor": price.vendor, "offer": price.offer},
        **{"region": price.region, "kind": price.kind},
    }
    told = ", ".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items())
    return f"- {{{told}, date: {price.date}, source: {json.dumps(price.source)}}}"


def refreshed(text: str, found: Iterable[Price]) -> str:
    """The text of prices.yaml with these rows below the mark. Raises RecipeError without a mark, and for a bad row."""
    by_hand, mark, _ = text.partition(MARK)
    if not mark:
        raise RecipeError(f"{PRICES}: the mark is missing", hint=f"This line, where the rows shall stand:\n{MARK}")
    made = by_hand + MARK + "\n\n" + "".join(line(price) + "\n" for price in found)
    read_prices(made, PRICES)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("catalog", type=Path, help="a clone of SkyPilot's catalog")
    parser.add_argument("--write", action="store_true", help="write prices.yaml")
    asked = parser.parse_args()
    try:
        found = rows(asked.catalog)
        made = refreshed(PRICES.read_text(encoding="utf-8"), found)
    except ScalellmError as error:
        raise SystemExit("\n".join(filter(None, (error.message, error.hint)))) from None
    if asked.write:
        PRICES.write_text(made, encoding="utf-8")
        print(f"{len(found)} prices of {len({one.device for one in found})} devices written; read the diff")
    else:
        print("\n".join(map(line, found)))


if __name__ == "__main__":
    main()
