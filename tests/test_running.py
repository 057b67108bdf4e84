"""A folder in which one process is at work: found while it is, and not for a moment longer."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from toolchain.errors import ArtifactError, EndpointError
from toolchain.running import STATE, Place

WORK = """
import signal, sys, time
from pathlib import Path
from toolchain.running import Place
if sys.argv[2] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
with Place(Path(sys.argv[1])).hold(RuntimeError) as record:
    record({"door": "here"})
    print("at work", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def work(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-c", WORK, str(tmp_path), getattr(request, "param", "")]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def gone(place: Place) -> bool:
    """The kernel drops a lock when the process has ended, which is soon after it was killed."""
    deadline = time.monotonic() + 10
    while place.state() is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    return place.state() is None


def test_a_process_is_found_while_it_is_at_work(work: subprocess.Popen[str], tmp_path: Path) -> None:
    assert Place(tmp_path).state() == {"pid": work.pid, "door": "here"}
    work.kill()
    work.wait()
    assert gone(Place(tmp_path))
    assert (tmp_path / STATE).exists(), "what a killed process leaves counts for nothing"


def test_a_second_process_is_refused_and_changes_nothing(work: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="taken"), Place(tmp_path).hold(lambda: ArtifactError("taken")):
        pass
    assert Place(tmp_path).state() == {"pid": work.pid, "door": "here"}


def test_who_is_asked_to_end_has_ended(work: subprocess.Popen[str], tmp_path: Path) -> None:
    assert Place(tmp_path).end(10)
    assert work.wait(10) != 0
    assert not Place(tmp_path).end(10)


@pytest.mark.parametrize("work", ["deaf"], indirect=True)
def test_who_does_not_end_in_time_is_named(work: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match=f"pid {work.pid} has not stopped within 0.3 s"):
        Place(tmp_path).end(0.3)
    assert work.poll() is None


def test_where_nothing_ever_was_nothing_runs(tmp_path: Path) -> None:
    assert Place(tmp_path / "nowhere").state() is None
    with Place(tmp_path).hold(lambda: ArtifactError("taken")):
        assert Place(tmp_path).state() is not None
        (tmp_path / STATE).write_text("{")
        assert Place(tmp_path).state() == {"pid": 0}, "at work, though it does not say how"
    assert Place(tmp_path).state() is None
    assert not (tmp_path / STATE).exists()
