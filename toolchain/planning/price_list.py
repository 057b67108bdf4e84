"""Which price counts for a device: the user's own, one of the user's file, or the cheapest recent public one. Pure.

A list of prices is a YAML file in the form of ``facts/prices.yaml``. Prices age, and with them what follows from them:
the caller says which day it is. It does not know what is bought.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from toolchain.device import Price, closest_device, devices, find_device, prices
from toolchain.errors import Problem, RecipeError
from toolchain.problems import Section, Text

OLD_DAYS = 180
"""A price that is older is marked, unless the caller has another limit. Our choice: public prices changed by a third
within a year (facts/prices.yaml, RTX 4090)."""

KINDS = ("on-demand", "spot")
_FORM = "- {device: rtx4090, usd_per_hour: 0.44, vendor: mine, kind: on-demand, date: 2026-11-22}"


class _Row(Section):
    """One price of a file."""

    device: Text
    usd_per_hour: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    vendor: Text
    kind: Literal["on-demand", "spot"]
    date: datetime.date
    offer: str = ""
    region: str | None = None
    source: str = ""
    estimated: bool = False


@dataclass(frozen=True)
class PriceList:
    """The prices that count."""

    rows: tuple[Price, ...] | None = None
    """Of a file, instead of the public ones; None: the public ones."""
    own: Mapping[str, Price] = field(default_factory=dict)
    """Device -> the price that was named for it."""
    every: Price | None = None
    """The price that was named for whatever device."""
    old_days: int = OLD_DAYS

    def of(self, name: str) -> Price | None:
        """What counts for a device, by its name: its own price, else the cheapest on demand, else the cheapest spot.

        Rows that are ``old_days`` older than the newest of their kind are passed over: that price is gone.
        """
        if name in self.own or self.every:
            return self.own.get(name, self.every)
        rows = prices(name) if self.rows is None else [row for row in self.rows if row.device == name]
        for kind in KINDS:
            known = [row for row in rows if row.kind == kind]
            if known:
                return min(self.of_today(known), key=lambda row: row.usd_per_hour)
        return None

    def of_today(self, known: list[Price]) -> list[Price]:
        """The rows that were true when the newest of them was, or at most ``old_days`` before."""
        newest = max(datetime.date.fromisoformat(row.date) for row in known if row.date)
        return [row for row in known if not self.old(row, newest)]

    def old(self, price: Price, today: datetime.date) -> bool:
        """Whether a price is older than it should be. What the user names counts as today's."""
        age = age_days(price, today)
        return age is not None and age > self.old_days


def age_days(price: Price, today: datetime.date) -> int | None:
    """Days since the price was true; None for one without a date, which the user named."""
    return max(0, (today - datetime.date.fromisoformat(price.date)).days) if price.date else None


def named(texts: Iterable[str]) -> tuple[dict[str, Price], Price | None]:
    """``["0.44"]`` or ``["rtx4090=0.44", "L4=0.60"]`` -> (device -> price, the price of all). Raises RecipeError."""
    own: dict[str, Price] = {}
    every: Price | None = None
    for text in texts:
        name, equals, number = text.rpartition("=")
        usd = _dollars(number, text)
        if not equals:
            every = _own("", usd)
            continue
        found = find_device(name)
        if found is None:
            near = closest_device(name)
            meant = f" (did you mean {near!r}?)" if near else ""
            raise RecipeError(f"--price {text}: no device {name!r}{meant}", hint="One of: " + ", ".join(devices()))
        own[found.name] = _own(found.name, usd)
    return own, every


def _dollars(number: str, text: str) -> float:
    try:
        usd = float(number)
    except ValueError:
        usd = 0.0
    if not 0 < usd < 1e6:
        raise RecipeError(f"--price {text}: not a price in dollars per hour", hint="--price 0.44   or rtx4090=0.44")
    return usd


def _own(device: str, usd: float) -> Price:
    return Price(device, usd, "yours", "", None, "on-demand", "", "--price", False)


def read_prices(text: str, path: Path) -> tuple[Price, ...]:
    """The text of a file of prices -> its rows. Raises RecipeError with every problem, each with its line."""
    hint = f"One line a price, as in toolchain/facts/prices.yaml:\n{_FORM}"
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {str(error).splitlines()[0]}", hint=hint) from error
    if not isinstance(node, yaml.SequenceNode) or not data:
        raise RecipeError(f"{path}: a file of prices is a list", hint=hint)
    problems: list[Problem] = []
    rows = [
        row
        for one, place in zip(data, node.value, strict=True)
        if (row := _price(one, str(path), place.start_mark.line + 1, problems))
    ]
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise RecipeError(f"{path}: {count} in this file of prices", hint=hint, problems=problems)
    return tuple(rows)


def _price(data: Any, file: str, line: int, problems: list[Problem]) -> Price | None:
    """One row; what is wrong with it goes to ``problems``."""
    try:
        row = _Row.model_validate(data)
    except ValidationError as error:
        for one in error.errors(include_url=False):
            problems.append(
                Problem(".".join(map(str, one["loc"])), one["msg"][:1].lower() + one["msg"][1:], file, line)
            )
        return None
    found = find_device(row.device)
    if found is None:
        message = f"{row.device!r} is not a known device"
        problems.append(Problem("device", message, file, line, closest_device(row.device)))
        return None
    date, source = row.date.isoformat(), row.source or file
    return Price(found.name, row.usd_per_hour, row.vendor, row.offer, row.region, row.kind, date, source, row.estimated)
