"""What a ledger adds up to: by provider, node, device, replica or day (UTC). Sums are exact: integers and Decimal."""

from __future__ import annotations

import csv
import datetime
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from toolchain.ledger.book import reading, rows
from toolchain.ledger.record import USAGE, Usage, plain

BY = ("provider", "node", "device", "replica", "day")
COLUMNS = ("requests", "continued", "tokens_in", "tokens_out", "gpu_seconds", "node_seconds", "earned_usd")


@dataclass
class Total:
    """Sums of records."""

    requests: int = 0
    continued: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    gpu_ms: int = 0
    node_ms: int = 0
    earned: Decimal = field(default_factory=Decimal)

    def add(self, usage: Usage) -> None:
        self.requests += usage.requests
        self.continued += usage.continued
        self.tokens_in += usage.tokens_in
        self.tokens_out += usage.tokens_out
        self.gpu_ms += usage.gpu_ms
        self.node_ms += usage.node_ms
        self.earned += usage.earned

    def columns(self) -> dict[str, Any]:
        """For people and programs: counts as integers, times and money as decimal strings."""
        return {
            "requests": self.requests,
            "continued": self.continued,
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "gpu_seconds": plain(Decimal(self.gpu_ms) / 1000),
            "node_seconds": plain(Decimal(self.node_ms) / 1000),
            "earned_usd": plain(self.earned),
        }


@dataclass(frozen=True)
class Report:
    """Totals by group, and of everything."""

    by: tuple[str, ...]
    groups: dict[tuple[str, ...], Total]
    """In the order of their names."""
    total: Total

    def lines(self) -> Iterator[dict[str, Any]]:
        """One a group: its names, then its columns."""
        for names, total in self.groups.items():
            yield dict(zip(self.by, names, strict=True)) | total.columns()

    def csv(self) -> str:
        """With a line of names; texts that a spreadsheet would take for a formula stand behind an apostrophe."""
        stream = io.StringIO()
        writer = csv.DictWriter(stream, [*self.by, *COLUMNS], lineterminator="\n")
        writer.writeheader()
        for line in self.lines():
            writer.writerow({name: _harmless(value) for name, value in line.items()})
        return stream.getvalue()


def report(
    path: Path,
    by: Sequence[str] = ("provider", "node"),
    since: datetime.date | None = None,
    until: datetime.date | None = None,
) -> Report:
    """Of the intervals that begin from ``since`` to the end of ``until`` (UTC). Raises ArtifactError for a record that
    cannot be read; whether the chain is sound, ``checking.verify`` says.
    """
    groups: dict[tuple[str, ...], Total] = {}
    total = Total()
    for usage in usages(path):
        day = day_of(usage)
        if (since and day < since) or (until and day > until):
            continue
        names = tuple(day.isoformat() if name == "day" else str(getattr(usage, name)) for name in by)
        groups.setdefault(names, Total()).add(usage)
        total.add(usage)
    return Report(tuple(by), dict(sorted(groups.items())), total)


def usages(path: Path) -> Iterator[Usage]:
    """Every record of usage, the oldest first. Raises ArtifactError."""
    with reading(path) as connection:
        for _number, body, _hash in rows(connection):
            found = json.loads(str(body))
            if found["kind"] == USAGE:
                yield Usage.of(found)


def day_of(usage: Usage) -> datetime.date:
    """Its day in UTC."""
    return datetime.datetime.fromtimestamp(usage.begin_ms / 1000, datetime.UTC).date()


def _harmless(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
