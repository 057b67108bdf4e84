"""Promises about a ledger's file: what it refuses, what survives a kill, and that others can check it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ROOT
from toolchain.errors import ArtifactError
from toolchain.ledger.book import Ledger
from toolchain.ledger.checking import verify
from toolchain.ledger.record import Head, Usage, canonical, parse, plain
from toolchain.ledger.totals import report, usages

WRITER = """
import sys
from pathlib import Path
from tests.ledger.test_book import used
from toolchain.ledger.book import Ledger
with Ledger.open(Path(sys.argv[1]), "e") as ledger:
    for minute in range(10**6):
        print(ledger.append([used(minute), used(minute, replica="two")]), flush=True)
"""


def used(minute: int = 0, **other: Any) -> Usage:
    facts: dict[str, Any] = {
        "begin_ms": minute * 60_000,
        "end_ms": (minute + 1) * 60_000,
        "provider": "anna",
        "node": "n1",
        "device": "rtx4090",
        "replica": "one",
        "gpus": 2,
        "gpu_ms": 120_000,
        "node_ms": 60_000,
        "price_per_hour": Decimal("0.44"),
        "requests": 3,
        "tokens_in": 40,
        "tokens_out": 500,
        "continued": 1,
    }
    return Usage(**{**facts, **other})


def written(path: Path, count: int = 4) -> Path:
    with Ledger.open(path, "e") as ledger:
        for minute in range(count):
            ledger.append([used(minute)])
    return path


def test_a_record_of_usage_comes_back_as_it_was(tmp_path: Path) -> None:
    path = written(tmp_path / "l", 3)
    assert list(usages(path)) == [used(0), used(1), used(2)]
    with Ledger.open(path, "e") as ledger:
        assert ledger.append([used(3)]).number == 5
    assert verify(path).sound
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_the_chain_can_be_checked_with_sha256sum_and_json_alone(tmp_path: Path) -> None:
    path = written(tmp_path / "l")
    previous = "0" * 64
    for number, body, told in sqlite3.connect(path).execute("SELECT * FROM records ORDER BY number"):
        done = subprocess.run(["sha256sum"], input=body.encode(), capture_output=True, check=True)
        found = json.loads(body)
        assert (found["number"], found["previous"]) == (number, previous)
        previous = done.stdout.decode().split()[0]
        assert previous == told


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE records SET body = body",
        "DELETE FROM records WHERE number = 3",
        "INSERT OR REPLACE INTO records SELECT number, body, hash FROM records WHERE number = 5",
        "INSERT INTO records VALUES (9, '{\"number\": 9}', 'x')",
        'INSERT INTO records VALUES (6, \'{"number": 6, "previous": "x"}\', \'x\')',
        "INSERT INTO records (body, hash) SELECT body, hash FROM records WHERE number = 5",
    ],
)
def test_the_file_refuses_all_but_the_next_record(tmp_path: Path, statement: str) -> None:
    path = written(tmp_path / "l")
    connection = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError, match="a record of a ledger"):
        connection.execute(statement)
    connection.close()
    assert verify(path).sound


def test_kill_9_loses_no_record_that_was_given_out_and_breaks_no_chain(tmp_path: Path) -> None:
    path = tmp_path / "l"
    for _ in range(3):
        argv = [sys.executable, "-c", WRITER, str(path)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=ROOT) as writer:
            assert writer.stdout is not None
            lines = [writer.stdout.readline() for _ in range(20)]
            os.kill(writer.pid, signal.SIGKILL)
            last = [*lines, *writer.stdout.read().split()][-1]
        found = verify(path, Head.parse(last))
        assert found.sound, found.faults
        assert found.head is not None
        assert found.head.number % 2 == 1  # an append of two is there whole or not at all


def test_readers_see_whole_appends_while_it_is_written(tmp_path: Path) -> None:
    path, done = tmp_path / "l", threading.Event()
    with Ledger.open(path, "e") as ledger:
        seen: list[int] = []
        broken: list[object] = []

        def read() -> None:
            while not done.is_set():
                verdict = verify(path)
                seen.append(verdict.records)
                broken.extend(verdict.faults)

        readers = [threading.Thread(target=read) for _ in range(3)]
        for reader in readers:
            reader.start()
        for minute in range(60):
            ledger.append([used(minute), used(minute)])
        done.set()
        for reader in readers:
            reader.join()
    assert not broken
    assert all(count % 2 == 1 for count in seen)


def test_two_writers_make_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "l"
    with Ledger.open(path, "e") as one, Ledger.open(path, "e") as two:
        for minute in range(5):
            one.append([used(minute)])
            two.append([used(minute)])
    assert verify(path).records == 11
    assert verify(path).sound


def test_a_ledger_of_another_endpoint_is_not_continued(tmp_path: Path) -> None:
    path = written(tmp_path / "l")
    with pytest.raises(ArtifactError, match="the ledger of the endpoint e, not of f"):
        Ledger.open(path, "f")


@pytest.mark.parametrize("content", [b"", b"not a database at all, but some text" * 200])
def test_a_file_that_is_no_ledger_is_refused_or_begun(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "l"
    path.write_bytes(content)
    if content:
        with pytest.raises(ArtifactError, match="cannot be used"):
            Ledger.open(path, "e")
        assert not verify(path).sound
    else:
        Ledger.open(path, "e").close()
        assert verify(path).sound


def test_a_ledger_with_a_damaged_end_is_not_appended_to(tmp_path: Path) -> None:
    path = written(tmp_path / "l")
    connection = sqlite3.connect(path)
    connection.executescript("DROP TRIGGER records_stay; UPDATE records SET hash = 'x' WHERE number = 5")
    connection.close()
    with pytest.raises(ArtifactError, match="record 5 was changed"):
        Ledger.open(path, "e")


@given(st.decimals(0, 10**6, places=6), st.integers(0, 10**12))
def test_money_is_exact_to_twelve_decimals(price: Decimal, node_ms: int) -> None:
    earned = used(price_per_hour=price, node_ms=node_ms).earned
    numerator, denominator = price.as_integer_ratio()
    told, parts = earned.as_integer_ratio()
    assert abs(told * denominator * 3_600_000 - numerator * node_ms * parts) * 2 * 10**12 <= (
        parts * denominator * 3_600_000
    )


@given(st.text(), st.integers(0))
def test_any_name_has_one_canonical_text(name: str, count: int) -> None:
    usage = used(provider=name, tokens_out=count)
    fields = {"kind": "usage", "number": 7, "previous": "0" * 64, **usage.fields()}
    body = canonical(fields)
    assert body.isascii()
    assert Usage.of(parse(body)) == usage
    assert hashlib.sha256(body.encode()).hexdigest()


def test_totals_are_the_sums_of_what_was_booked(tmp_path: Path) -> None:
    path, day = tmp_path / "l", 24 * 60
    with Ledger.open(path, "e") as ledger:
        ledger.append([used(0), used(0, replica="two"), used(day, node="n2", provider="=evil()"), used(day, node="n2")])
    by_day = report(path, ("day", "provider"))
    assert list(by_day.groups) == [("1970-01-01", "anna"), ("1970-01-02", "=evil()"), ("1970-01-02", "anna")]
    assert by_day.groups["1970-01-01", "anna"].columns() == {
        "requests": 6,
        "continued": 2,
        "tokens_in": 80,
        "tokens_out": 1000,
        "gpu_seconds": "240",
        "node_seconds": "120",
        "earned_usd": "0.014666666666",
    }
    assert sum(total.earned for total in by_day.groups.values()) == by_day.total.earned
    assert "1970-01-02,'=evil()," in by_day.csv()
    assert plain(Decimal("10.00")) == "10"
