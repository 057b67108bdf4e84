"""Whether a ledger is as it was written: finds what was changed, removed, put in, moved or cut off, and says which.

Each record's text must have its hash, stand at its number, and name the hash of the one before it. What was cut off at
the end, and a last record that was replaced, only a head can show that was kept elsewhere (``scalellm ledger head``,
the endpoint's ``/status``): the chain alone cannot know how long it was.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import ArtifactError
from toolchain.ledger.book import SCHEMA, reading, rows
from toolchain.ledger.record import GENESIS, NOTHING, Head, hash_of, is_hash, parse


@dataclass(frozen=True)
class Fault:
    """Something that is not as it was written."""

    number: int
    """The record; 0 for the file as a whole."""
    what: str


@dataclass(frozen=True)
class Verdict:
    """What a look at all records found."""

    endpoint: str
    """Empty where the first record does not say it."""
    records: int
    head: Head | None
    """None of an empty ledger."""
    faults: tuple[Fault, ...]

    @property
    def sound(self) -> bool:
        return not self.faults


def verify(path: Path, kept: Head | None = None, most: int = 20) -> Verdict:
    """Look at every record; at most ``most`` faults are named, the first of them first. ``kept``: a head from before.
    Raises ArtifactError where there is no ledger.
    """
    check = _Check(kept)
    try:
        with reading(path) as connection:
            check.schema(connection)
            for row in rows(connection):
                check.row(*row)
                if len(check.faults) >= most:
                    break
            else:
                check.end()
    except ArtifactError as error:
        if not isinstance(error.__cause__, (sqlite3.Error, ValueError, LookupError)):
            raise
        check.faults.append(Fault(0, f"the file is not a sound SQLite database: {error.__cause__}"))
    return Verdict(check.endpoint, check.count, check.head, tuple(check.faults[:most]))


class _Check:
    """The records one by one, and what is wrong with them."""

    def __init__(self, kept: Head | None) -> None:
        self.kept = kept
        self.endpoint = ""
        self.count = 0
        self.head: Head | None = None
        self.faults: list[Fault] = []
        self._next, self._previous = 1, NOTHING

    def schema(self, connection: sqlite3.Connection) -> None:
        found = dict(connection.execute("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL"))
        for name in SCHEMA.keys() | found.keys():
            if found.get(name) != SCHEMA.get(name):
                self.faults.append(Fault(0, f"the file's own guards were changed: {name}"))

    def row(self, number: int, body: object, told: object) -> None:
        if number > self._next:
            self._fault(self._next, _missing(self._next, number - 1))
        elif number < self._next:
            self._fault(number, f"record {number} is one too many")
        self.faults += [Fault(number, what) for what in self._wrong(number, body, told)]
        found = hash_of(body) if isinstance(body, str) else ""
        if self.kept is not None and number == self.kept.number and found != self.kept.hash:
            self._fault(
                number, f"record {number} is not the one that the kept head names: it or one before was replaced"
            )
        self._next, self._previous = number + 1, str(told) if is_hash(told) else found
        self.count, self.head = self.count + 1, Head(number, found)

    def _wrong(self, number: int, body: object, told: object) -> Iterator[str]:
        if not isinstance(body, str) or not is_hash(told):
            yield f"record {number} was changed: it is no text with a hash"
            return
        if hash_of(body) != told:
            yield f"record {number} was changed: its text does not have its hash"
        try:
            found = parse(body)
        except ValueError as error:
            yield f"record {number} was changed: {error}"
            return
        yield from self._out_of_place(number, found)

    def _out_of_place(self, number: int, found: dict[str, Any]) -> Iterator[str]:
        if found["number"] != number:
            yield f"at place {number} stands the record of number {found['number']}: one was moved, put in or removed"
        if found["previous"] != self._previous and number == self._next:
            before = f"record {number - 1} was changed or replaced" if number > 1 else "it names one before the first"
            yield f"record {number} does not follow the one before it: {before}"
        if (found["kind"] == GENESIS) != (number == 1):
            yield f"record {number}: a ledger has one first record, and it comes first"
        if number == 1:
            self.endpoint = str(found.get("endpoint", ""))

    def end(self) -> None:
        if not self.count:
            self._fault(0, "the ledger holds no record")
        if self.kept is not None and self.kept.number >= self._next:
            self._fault(self._next, f"{_missing(self._next, self.kept.number)}, which the kept head names: cut off")

    def _fault(self, number: int, what: str) -> None:
        self.faults.append(Fault(number, what))


def _missing(first: int, last: int) -> str:
    return f"record {first} is missing" if first == last else f"records {first} to {last} are missing"
