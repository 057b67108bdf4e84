"""Promises about ``verify``: no change to a ledger stays unseen, and the first one is named."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.ledger.test_book import written
from toolchain.errors import ArtifactError
from toolchain.ledger.book import SCHEMA, reading, rows
from toolchain.ledger.checking import verify
from toolchain.ledger.record import Head, canonical, hash_of

LAST = 9
Row = tuple[int, str, str]
Fake = Callable[[list[Row], int, int], list[Row]]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("ledger") / "sound.sqlite", LAST - 1)


@pytest.fixture(scope="module")
def head(sound: Path) -> Head:
    found = verify(sound)
    assert found.sound
    assert found.head is not None
    return found.head


def forged(sound: Path, target: Path, fake: Callable[[list[Row]], list[Row]]) -> Path:
    """A copy with other rows, its triggers as they were: what somebody does who owns the file."""
    shutil.copy(sound, target)
    connection = sqlite3.connect(target)
    known = connection.execute("SELECT * FROM records ORDER BY number").fetchall()
    triggers = [name for name in SCHEMA if name.startswith("records_")]
    for name in triggers:
        connection.execute(f"DROP TRIGGER {name}")
    connection.execute("DELETE FROM records")
    connection.executemany("INSERT INTO records VALUES (?, ?, ?)", fake(known))
    for name in triggers:
        connection.execute(SCHEMA[name])
    connection.commit()
    connection.close()
    return target


def rehashed(row: Row, **fields: object) -> Row:
    """Another text with a hash that fits it."""
    body = canonical({**json.loads(row[1]), **fields})
    return row[0], body, hash_of(body)


def changed(known: list[Row], at: int, _other: int) -> list[Row]:
    number, body, told = known[at]
    return [*known[:at], (number, canonical({**json.loads(body), "tokens_out": 10**6}), told), *known[at + 1 :]]


def replaced(known: list[Row], at: int, _other: int) -> list[Row]:
    fields = {"tokens_out": 10**6} if at else {"created_ms": 5}
    return [*known[:at], rehashed(known[at], **fields), *known[at + 1 :]]


def removed(known: list[Row], at: int, _other: int) -> list[Row]:
    return known[:at] + known[at + 1 :]


def removed_and_closed_up(known: list[Row], at: int, _other: int) -> list[Row]:
    rest = removed(known, at, 0)
    return [(number, body, told) for number, (_number, body, told) in enumerate(rest, 1)]


def renumbered(known: list[Row], at: int, _other: int) -> list[Row]:
    """Removed, and every later record written anew with its number, its hash as it was before."""
    rest = removed(known, at, 0)
    return [rehashed((number, *row[1:]), number=number) for number, row in enumerate(rest, 1)]


def inserted(known: list[Row], at: int, other: int) -> list[Row]:
    rest = [*known[:at], known[other], *known[at:]]
    return [(number, body, told) for number, (_number, body, told) in enumerate(rest, 1)]


def swapped(known: list[Row], at: int, other: int) -> list[Row]:
    rest = list(known)
    rest[at], rest[other] = (known[at][0], *known[other][1:]), (known[other][0], *known[at][1:])
    return rest


def written_anew(known: list[Row], at: int, _other: int) -> list[Row]:
    """One changed, and the whole chain behind it made to fit: only a head that was kept elsewhere shows it."""
    found: list[Row] = list(known[:at])
    for row in replaced(known, at, 0)[at:]:
        previous = found[-1][2] if found else "0" * 64
        found.append(rehashed(row, previous=previous))
    return found


FAKES: list[Fake] = [changed, replaced, removed, removed_and_closed_up, renumbered, inserted, swapped, written_anew]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fake=st.sampled_from(FAKES), at=st.integers(0, LAST - 1), other=st.integers(0, LAST - 1))
def test_any_single_change_is_found(
    sound: Path, head: Head, tmp_path_factory: pytest.TempPathFactory, fake: Fake, at: int, other: int
) -> None:
    target = tmp_path_factory.getbasetemp() / "forged.sqlite"
    before: list[Row] = []

    def apply(known: list[Row]) -> list[Row]:
        before.extend(known)
        return fake(known, at, other)

    forged(sound, target, apply)
    with reading(target) as connection:
        same = list(rows(connection)) == before
    assert verify(target, head).sound == same


@pytest.mark.parametrize(
    ("fake", "number", "what"),
    [
        (changed, 4, "its text does not have its hash"),
        (replaced, 5, "record 4 was changed or replaced"),
        (removed, 4, "record 4 is missing"),
        (removed_and_closed_up, 4, "at place 4 stands the record of number 5"),
        (inserted, 4, "at place 4 stands the record of number 7"),
        (swapped, 4, "at place 4 stands the record of number 7"),
        (written_anew, LAST, "is not the one that the kept head names"),
    ],
)
def test_the_first_fault_names_the_record(
    sound: Path, head: Head, tmp_path: Path, fake: Fake, number: int, what: str
) -> None:
    found = verify(forged(sound, tmp_path / "l", lambda known: fake(known, 3, 6)), head)
    assert found.faults[0].number == number
    assert what in found.faults[0].what


@pytest.mark.parametrize("left", range(LAST))
def test_what_is_cut_off_is_found_by_the_head_that_was_kept(sound: Path, head: Head, tmp_path: Path, left: int) -> None:
    path = forged(sound, tmp_path / "l", lambda known: known[:left])
    found = verify(path, head)
    assert not found.sound
    assert f"record{'s' if left < LAST - 1 else ''} {left + 1}" in found.faults[-1].what
    assert verify(path).sound == (left > 0)


def test_what_was_appended_after_a_head_was_kept_is_sound(sound: Path) -> None:
    with reading(sound) as connection:
        for number, _body, told in itertools.islice(rows(connection), 5):
            assert verify(sound, Head(number, str(told))).sound
            assert not verify(sound, Head(number, "0" * 64)).sound


def test_dropped_guards_are_found(sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "l"
    shutil.copy(sound, path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TRIGGER records_remain")
    assert [fault.what for fault in verify(path).faults] == ["the file's own guards were changed: records_remain"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(at=None, change=128)
@given(at=st.integers(0, 2**16) | st.none(), change=st.integers(1, 255))
def test_no_flipped_byte_of_the_file_changes_a_record_unseen(
    sound: Path, head: Head, tmp_path_factory: pytest.TempPathFactory, at: int | None, change: int
) -> None:
    raw = bytearray(sound.read_bytes())
    at = raw.index(b" TEXT NOT NULL") if at is None else at % len(raw)
    raw[at] ^= change
    target = tmp_path_factory.getbasetemp() / "flipped.sqlite"
    target.write_bytes(raw)
    if verify(target, head).sound:
        with reading(target) as one, reading(sound) as two:
            assert list(rows(one)) == list(rows(two))


def test_where_there_is_no_ledger_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no ledger"):
        verify(tmp_path / "l")


@pytest.mark.parametrize("text", ["", "7", "7:x", f"0:{'0' * 64}", f"-1:{'0' * 64}", f"7:{'G' * 64}"])
def test_a_head_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a head"):
        Head.parse(text)
