"""The file in which a ledger is kept: SQLite, written by one, read by many at once.

Every append is one transaction in a write-ahead log that is synced before it counts
(https://www.sqlite.org/pragma.html#pragma_synchronous, FULL; read 2026-11): after ``kill -9`` or a power cut the file
holds all records of an append or none of them. Triggers refuse to change or remove a record, and to add one that does
not name the hash of the last. Whoever owns the file can drop them: that is what the chain and a head kept elsewhere
are for.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from toolchain.errors import ArtifactError
from toolchain.ledger.record import GENESIS, NOTHING, USAGE, Head, Usage, body_of, genesis, hash_of, parse

FILE = "ledger.sqlite"
_APPLICATION = 0x5343_4C47
"""SQLite's application_id: the letters SCLG."""
_WAIT_S = 10.0
"""For another writer."""
SCHEMA = {
    "records": "CREATE TABLE records (number INTEGER PRIMARY KEY, body TEXT NOT NULL, hash TEXT NOT NULL) STRICT",
    "records_stay": "CREATE TRIGGER records_stay BEFORE UPDATE ON records "
    "BEGIN SELECT RAISE(ABORT, 'a record of a ledger is never changed'); END",
    "records_remain": "CREATE TRIGGER records_remain BEFORE DELETE ON records "
    "BEGIN SELECT RAISE(ABORT, 'a record of a ledger is never removed'); END",
    "records_follow": "CREATE TRIGGER records_follow BEFORE INSERT ON records "
    "WHEN NEW.number IS NOT (SELECT coalesce(max(number), 0) + 1 FROM records) "
    "OR json_extract(NEW.body, '$.number') IS NOT NEW.number "
    "OR json_extract(NEW.body, '$.previous') IS NOT "
    f"coalesce((SELECT hash FROM records ORDER BY number DESC LIMIT 1), '{NOTHING}') "
    "BEGIN SELECT RAISE(ABORT, 'a record of a ledger follows the last one'); END",
    "usage": "CREATE VIEW usage AS SELECT number, "
    + ", ".join(
        f"json_extract(body, '$.{name}') AS {name}"
        for name in (
            *("begin_ms", "end_ms", "provider", "node", "device", "replica", "gpus", "node_ms", "gpu_ms"),
            *("price_per_hour", "earned", "requests", "tokens_in", "tokens_out", "continued"),
        )
    )
    + f" FROM records WHERE json_extract(body, '$.kind') = '{USAGE}'",
}
"""By name, as SQLite keeps them; ``usage`` is for people with a SQL shell."""


class Ledger:
    """An open ledger to which records are appended. One thread at a time."""

    def __init__(self, path: Path, connection: sqlite3.Connection, endpoint: str) -> None:
        self.path, self.endpoint = path, endpoint
        self._connection = connection

    @classmethod
    def open(cls, path: Path, endpoint: str) -> Self:
        """Begun where it is missing. Raises ArtifactError for a file that is another one's, or damaged at its end."""
        with _errors(path):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            connection = sqlite3.connect(path, timeout=_WAIT_S, isolation_level=None, check_same_thread=False)
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                found = cls(path, connection, endpoint)
                found._begin()
                found._check(endpoint)
            except BaseException:
                connection.close()
                raise
        return found

    def append(self, usages: Sequence[Usage]) -> Head:
        """All of them or none; returns when they are on the disk. Raises ArtifactError, ValueError for a wrong one."""
        for usage in usages:
            usage.check()
        with _errors(self.path), self._transaction():
            return self._append([{"kind": USAGE, **usage.fields()} for usage in usages])

    @property
    def head(self) -> Head:
        with _errors(self.path):
            return head_of(self._connection)

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self) -> None:
        with self._transaction():
            (known,) = self._connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
            if known:
                return
            self._connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            for statement in SCHEMA.values():
                self._connection.execute(statement)
            self._append([genesis(self.endpoint, time.time_ns() // 1_000_000)])

    def _check(self, endpoint: str) -> None:
        first = record_at(self._connection, 1)
        if first is None or first.get("kind") != GENESIS:
            raise _damaged(self.path, "it has no first record")
        if first["endpoint"] != endpoint:
            raise ArtifactError(f"{self.path}: the ledger of the endpoint {first['endpoint']}, not of {endpoint}")
        head = head_of(self._connection)
        record_at(self._connection, head.number)

    def _append(self, records: Sequence[dict[str, object]]) -> Head:
        number, previous = 0, NOTHING
        with contextlib.suppress(LookupError):
            head = head_of(self._connection)
            number, previous = head.number, head.hash
        for fields in records:
            number += 1
            body = body_of(fields, number, previous)
            previous = hash_of(body)
            self._connection.execute("INSERT INTO records VALUES (?, ?, ?)", (number, body, previous))
        return Head(number, previous)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise


@contextlib.contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that sees one state of the file and changes nothing, also while it is appended to. Raises
    ArtifactError.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: there is no ledger", hint="an endpoint of `scalellm deploy` begins it")
    with _errors(path):
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=_WAIT_S)
        try:
            connection.text_factory = lambda raw: raw.decode(errors="surrogateescape")
            connection.execute("BEGIN")
            yield connection
        finally:
            connection.close()


def rows(connection: sqlite3.Connection) -> Iterator[tuple[int, object, object]]:
    """Number, text and hash of each record, in their order; as they are found, whatever was done to them."""
    yield from connection.execute("SELECT number, body, hash FROM records NOT INDEXED ORDER BY number")


def head_of(connection: sqlite3.Connection) -> Head:
    """Raises LookupError where there is no record."""
    found = connection.execute("SELECT number, hash FROM records ORDER BY number DESC LIMIT 1").fetchone()
    if found is None:
        raise LookupError("no record")
    return Head(int(found[0]), str(found[1]))


def record_at(connection: sqlite3.Connection, number: int) -> dict[str, object] | None:
    """Its fields; None where there is none. Raises ValueError where it is damaged."""
    found = connection.execute("SELECT body, hash FROM records WHERE number = ?", (number,)).fetchone()
    if found is None:
        return None
    if hash_of(found[0]) != found[1]:
        raise ValueError(f"record {number} was changed")
    return parse(found[0])


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, LookupError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written: {error.strerror}") from error


def _damaged(path: Path, why: str) -> ArtifactError:
    return ArtifactError(f"{path}: this ledger cannot be used: {why}", hint=f"scalellm ledger verify {path}")
