"""Promises about ``scalellm ledger``: what it prints, and its exit codes."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.ledger.test_book import used
from toolchain.cli import verbs
from toolchain.errors import ArtifactError
from toolchain.ledger.book import FILE, Ledger


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "endpoints" / "my-llama"
    folder.mkdir(parents=True)
    with Ledger.open(folder / FILE, "my-llama") as ledger:
        ledger.append([used(0), used(1, node="n2", provider="bert"), used(24 * 60, node="n2", provider="bert")])
    return tmp_path


def asked(work: Path, *arguments: str) -> Result:
    return CliRunner().invoke(verbs, ["ledger", *arguments, "--work", str(work)], catch_exceptions=True)


def test_a_sound_ledger_is_said_to_be_one(work: Path) -> None:
    done = asked(work, "verify", "my-llama")
    assert done.exit_code == 0
    assert "my-llama: 4 records, none changed. Head: 4:" in done.output


def test_a_head_that_was_kept_shows_what_was_cut_off(work: Path, tmp_path: Path) -> None:
    file = work / "endpoints" / "my-llama" / FILE
    kept, kept_json = tmp_path / "kept.txt", tmp_path / "kept.json"
    kept.write_text(asked(work, "head", "my-llama").output)
    kept_json.write_text(asked(work, "head", "my-llama", "--json").output)
    connection = sqlite3.connect(file)
    (trigger,) = connection.execute("SELECT sql FROM sqlite_schema WHERE name = 'records_remain'").fetchone()
    connection.executescript(f"DROP TRIGGER records_remain; DELETE FROM records WHERE number > 2; {trigger}")
    connection.close()
    assert asked(work, "verify", "my-llama").exit_code == 0
    for head in (str(kept), str(kept_json), kept.read_text()):
        done = asked(work, "verify", str(file), "--head", head, "--json")
        assert done.exit_code == ArtifactError.exit_code
        (fault,) = json.loads(done.output)["faults"]
        assert fault == {"number": 3, "what": "records 3 to 4 are missing, which the kept head names: cut off"}


def test_a_report_adds_up_by_what_is_asked_for(work: Path) -> None:
    found = json.loads(asked(work, "report", "my-llama", "--json").output)
    assert [(one["provider"], one["node"], one["tokens_out"]) for one in found["groups"]] == [
        ("anna", "n1", 500),
        ("bert", "n2", 1000),
    ]
    assert found["total"]["earned_usd"] == "0.021999999999"
    table = list(csv.DictReader(io.StringIO(asked(work, "report", "my-llama", "--by", "day", "--csv").output)))
    assert [(line["day"], line["requests"]) for line in table] == [("1970-01-01", "6"), ("1970-01-02", "3")]
    late = json.loads(asked(work, "report", "my-llama", "--since", "1970-01-02", "--json").output)
    assert late["total"]["requests"] == 3
    shown = asked(work, "report", "my-llama", "--by", "provider,node,device,replica,day").output
    assert all(word in shown for word in ("gpu seconds", "earned usd", "1970-01-02", "total", "0.021999999999"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("report", "my-llama", "--by", "moon"), "'moon' is none of"),
        (("report", "my-llama", "--by", "day,day"), "twice"),
        (("report", "my-llama", "--csv", "--json"), "not both"),
        (("verify", "my-llama", "--head", "nonsense"), "not a head"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_words(work: Path, arguments: tuple[str, ...], words: str) -> None:
    done = asked(work, *arguments)
    assert done.exit_code == 2
    assert words in done.output


def test_an_endpoint_without_a_ledger_is_named(work: Path) -> None:
    done = asked(work, "report", "other")
    assert isinstance(done.exception, ArtifactError)
    assert "endpoints/other/ledger.sqlite: there is no ledger" in done.exception.message
