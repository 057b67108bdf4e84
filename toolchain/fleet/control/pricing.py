"""What a node costs: what it names itself, else what the deployment pays for such a device, else a public price. Pure.

One place for all who need it: the controller's budget, the meter, and what readers are shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from toolchain.device import find_device
from toolchain.planning.price_list import PriceList

Nodes = Mapping[str, Mapping[str, Any]]
"""By the board's keys, as they tell of themselves."""


def priced(nodes: Nodes, prices: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """The nodes with their price, where one is known. ``prices``: US dollars per GPU and hour, per machine where there
    is no GPU, by ``provider/device`` or by device.
    """
    return {key: {**said, "price_per_hour": _price(said, prices)} for key, said in nodes.items()}


def _price(said: Mapping[str, Any], prices: Mapping[str, float]) -> Any:
    """Of the whole node; as the node says it, be it nonsense, which is for others to refuse."""
    named, gpus, device = said.get("price_per_hour"), said.get("gpus"), str(said.get("device", ""))
    if named is not None or not isinstance(gpus, int):
        return named
    each = prices.get(f"{said.get('provider', '')}/{device}", prices.get(device))
    if each is None:
        each = public_price(device)
    return None if each is None else float(Decimal(str(each)) * max(1, gpus))


def public_price(device: str) -> float | None:
    """US dollars for one such GPU and hour on demand: the cheapest recent one of ``facts/prices.yaml``."""
    known = find_device(device)
    found = PriceList().of(known.name) if known else None
    return found.usd_per_hour if found else None
