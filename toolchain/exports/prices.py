"""What the machines of a service cost by the hour: from SkyPilot's catalog where it is on this machine, else our table.

SkyPilot keeps the catalog of each cloud that it was asked about in ``~/.sky/catalogs``. GCP's lists GPUs apart from the
machines that they need, so those rows say too little and are passed over.
"""

from __future__ import annotations

import csv
import datetime
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from toolchain.device import prices
from toolchain.errors import PlanError
from toolchain.exports.wanted import Kind, Wanted
from toolchain.planning.price_list import PriceList

CATALOGS = Path("~/.sky/catalogs/v8")
"""sky.skylet.constants.CATALOG_SCHEMA_VERSION of SkyPilot 0.14.1."""
_KINDS = {"spot": "SpotPrice", "on-demand": "Price"}


@dataclass(frozen=True)
class Offer:
    """The cheapest machine for one replica of a kind."""

    label: str
    kind: str
    """``"on-demand"``, ``"spot"``, or ``"yours"``: the deployment's own price."""
    usd_per_hour: float
    """Of the whole machine, with all GPUs of a replica; from our table, its GPUs alone."""
    vendor: str
    region: str
    date: str
    source: str


def offers(wanted: Wanted, catalogs: Path = CATALOGS) -> list[Offer]:
    """For each kind of device the price that the deployment names, else the cheapest known, spot and on demand."""
    folder = catalogs.expanduser()
    found = []
    for kind in wanted.kinds:
        rows = [*_own(wanted, kind)] or [*_catalog(kind, folder)] or [*_table(kind)]
        for how in ("yours", *_KINDS):
            fitting = [row for row in rows if row.kind == how]
            if fitting:
                found.append(min(fitting, key=lambda row: row.usd_per_hour))
    return found


def check_budget(wanted: Wanted, known: list[Offer]) -> None:
    """Raises PlanError where even the cheapest known offers would cost more than ``max_price_per_hour``."""
    budget = wanted.deployment.max_price_per_hour
    rented = [one for one in known if wanted.spot or one.kind != "spot"]
    if budget is None or {one.label for one in rented} != {kind.label for kind in wanted.kinds}:
        return
    least = {kind.label: min(one.usd_per_hour for one in rented if one.label == kind.label) for kind in wanted.kinds}
    total = sum(kind.least * least[kind.label] for kind in wanted.kinds)
    if total > budget:
        raise PlanError(
            f"max_price_per_hour: {budget:g} does not pay for {wanted.least} replicas: the cheapest known offers come "
            f"to {total:.2f} dollars an hour",
            hint=f"max_price_per_hour: {total:.2f}   # or fewer replicas, or another device",
        )


def _own(wanted: Wanted, kind: Kind) -> Iterator[Offer]:
    """``prices`` of the deployment: by GPU and hour, of a device, or of one at a provider."""
    own: Mapping[str, float] = getattr(wanted.deployment, "prices", {})
    for cloud in ("", *kind.device.skypilot_clouds):
        name = f"{cloud.lower()}/{kind.device.name}" if cloud else kind.device.name
        if name in own:
            yield Offer(kind.label, "yours", own[name] * max(1, kind.gpus), cloud, "", "", f"prices: {name}")


def _catalog(kind: Kind, folder: Path) -> Iterator[Offer]:
    for cloud in kind.device.skypilot_clouds:
        file = folder / cloud.lower() / "vms.csv"
        if not file.is_file():
            continue
        date = datetime.date.fromtimestamp(file.stat().st_mtime).isoformat()
        with file.open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                yield from _machine(kind, cloud, row, date)


def _machine(kind: Kind, cloud: str, row: dict[str, str], date: str) -> Iterator[Offer]:
    if row.get("AcceleratorName") != kind.device.skypilot or not row.get("InstanceType"):
        return
    if _number(row.get("AcceleratorCount")) != kind.gpus:
        return
    for how, column in _KINDS.items():
        if usd := _number(row.get(column)):
            yield Offer(
                kind.label, how, usd, cloud, row.get("Region") or "", date, "SkyPilot's catalog on this machine"
            )


def _number(text: str | None) -> float:
    try:
        return float(text or 0)
    except ValueError:
        return 0.0


def _table(kind: Kind) -> Iterator[Offer]:
    """Prices of one GPU, as ``facts/prices.yaml`` has them, without those that a newer one has long replaced."""
    known = prices(kind.device.name)
    for how in _KINDS:
        rows = [price for price in known if price.kind == how]
        for price in PriceList().of_today(rows) if rows else ():
            usd = price.usd_per_hour * max(1, kind.gpus)
            yield Offer(kind.label, how, usd, price.vendor, price.region or "", price.date, price.source)
