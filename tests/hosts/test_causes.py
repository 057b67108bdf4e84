"""The table of failures: what people met is recognized, and told with what to do and where it was met."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.hosts.fakes import make_job
from toolchain import workspace
from toolchain.hosts.causes import diagnose

ROWS: list[dict[str, Any]] = workspace.facts("build_failures")
REPORTED = [row for row in ROWS if "seen" in row]
PROGRESS = "[11/16/2024-00:05:47] [TRT-LLM] [I] Build TensorRT engine Unnamed Network 0\n"


@pytest.mark.parametrize("row", REPORTED, ids=lambda row: row["seen"][:40])
def test_what_somebody_met_is_told_with_its_own_entry(row: dict[str, Any], tmp_path: Path) -> None:
    job = make_job(tmp_path)
    cause = diagnose(f"{PROGRESS}{row['seen']}\nTraceback (most recent call last):\n", 1, job)
    assert cause is not None
    assert cause.source == row["source"]
    assert cause.advice
    assert not any("{" in text for text in (cause.message, *cause.advice)), "a placeholder was left"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row.get("seen", row.get("exit_codes")))[:40])
def test_every_entry_says_what_to_do_and_where_it_comes_from(row: dict[str, Any]) -> None:
    assert row["cause"]
    assert row["advice"]
    assert str(row["date"]) >= "2026-08-31"
    assert row.get("derived") or "://" in row["source"] or "itself" in row["source"]
    assert ("pattern" in row) == ("seen" in row) != ("exit_codes" in row)


def test_an_error_is_told_before_the_warnings_that_stand_above_it(tmp_path: Path) -> None:
    log = (
        "[TRT] [W] Requested amount of GPU memory (33555480576 bytes) could not be allocated. There may not be enough\n"
        "OSError: [Errno 28] No space left on device\n"
    )
    cause = diagnose(log, 1, make_job(tmp_path))
    assert cause is not None
    assert cause.message == "the disk is full"


@pytest.mark.parametrize("code", [137, -9])
def test_a_builder_that_was_killed_without_a_word_ran_out_of_memory(code: int, tmp_path: Path) -> None:
    cause = diagnose(PROGRESS, code, make_job(tmp_path))
    assert cause is not None
    assert "RAM" in cause.message


def test_what_nobody_met_has_no_cause(tmp_path: Path) -> None:
    assert diagnose(f"{PROGRESS}AssertionError: something new", 1, make_job(tmp_path)) is None


def test_advice_names_the_plans_own_release_image_and_driver(tmp_path: Path) -> None:
    cause = diagnose("docker: Error response from daemon: No such image: x", 125, make_job(tmp_path, version="0.21.0"))
    assert cause is not None
    assert cause.advice[0].startswith("docker pull nvcr.io/nvidia/tritonserver:25.08-trtllm-python-py3")
