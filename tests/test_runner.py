"""Foreign programs: their output, their failures, and that none of them outlives us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from toolchain import runner
from toolchain.errors import ToolError

PARENT = "import subprocess, time; p = subprocess.Popen(['sleep', '300']); print(p.pid, flush=True); time.sleep(300)"
"""A program with a child of its own, which a careless kill would orphan."""


def _wait_for(condition, deadline_s: float = 10.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def _is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def _start_parent(tmp_path: Path, **options) -> tuple[runner.Process, int]:
    process = runner.start([sys.executable, "-c", PARENT], log=tmp_path / "log", **options)
    _wait_for(lambda: (tmp_path / "log").read_text().strip())
    return process, int((tmp_path / "log").read_text())


def test_run_gives_output_exit_code_and_working_folder(tmp_path: Path) -> None:
    done = runner.run(["sh", "-c", "pwd; echo oops >&2; echo $X; exit 3"], cwd=tmp_path, env={"X": "7"}, check=False)
    assert (done.exit_code, done.stdout.split(), done.stderr) == (3, [str(tmp_path), "7"], "oops\n")


def test_run_failure_carries_the_last_words_and_the_hint() -> None:
    with pytest.raises(ToolError, match="exited with code 4") as caught:
        runner.run(["sh", "-c", "echo the disk is full >&2; exit 4"], hint="free some space")
    assert "the disk is full" in caught.value.message
    assert caught.value.hint == "free some space"


def test_run_names_a_program_that_does_not_exist() -> None:
    with pytest.raises(ToolError, match="no-such-program") as caught:
        runner.run(["no-such-program", "--flag"], hint="install it")
    assert "No such file" in caught.value.message
    assert caught.value.hint == "install it"


def test_run_kills_the_whole_group_after_its_deadline(tmp_path: Path) -> None:
    script = f"sleep 300 & echo $! > {tmp_path}/pid; wait"
    with pytest.raises(ToolError, match=r"did not finish within 0\.5 s"):
        runner.run(["sh", "-c", script], timeout_s=0.5)
    assert _is_gone(int((tmp_path / "pid").read_text()))


def test_kill_ends_children_of_the_program_and_deletes_what_it_was_told(tmp_path: Path) -> None:
    (tmp_path / "region-1").touch()
    process, child = _start_parent(tmp_path, delete=[f"{tmp_path}/region-*"])
    assert process.kill() == -signal.SIGKILL
    assert _is_gone(process.pid)
    assert _is_gone(child)
    assert not (tmp_path / "region-1").exists()


def test_a_program_that_ends_by_itself_leaves_no_child(tmp_path: Path) -> None:
    process, child = _start_parent(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    assert _is_gone(child)


def test_terminate_lets_the_program_finish_its_work(tmp_path: Path) -> None:
    script = "trap 'sleep 0.3; echo drained; exit 5' TERM; echo up; while :; do sleep 0.05; done"
    process = runner.start(["sh", "-c", script], log=tmp_path / "log")
    _wait_for(lambda: "up" in runner.tail(tmp_path / "log"))
    assert process.terminate(grace_s=10) == 5
    assert runner.tail(tmp_path / "log", 1) == "drained"


def test_terminate_kills_what_ignores_it(tmp_path: Path) -> None:
    process = runner.start(["sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.05; done"], log=tmp_path / "log")
    _wait_for(lambda: "up" in runner.tail(tmp_path / "log"))
    assert process.terminate(grace_s=0.2) == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_killed_runner(tmp_path: Path, number: signal.Signals) -> None:
    script = (
        f"import sys, time; from pathlib import Path; from toolchain import runner\n"
        f"p = runner.start([sys.executable, '-c', {PARENT!r}], log=Path({str(tmp_path / 'log')!r}),\n"
        f"                 afterwards=['touch', {str(tmp_path / 'cleaned')!r}])\n"
        f"print(p.pid, flush=True); time.sleep(300)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as outer:
        assert outer.stdout is not None
        pid = int(outer.stdout.readline())
        _wait_for(lambda: (tmp_path / "log").read_text().strip())
        outer.send_signal(number)
    child = int((tmp_path / "log").read_text())
    _wait_for(lambda: _is_gone(pid) and _is_gone(child) and (tmp_path / "cleaned").exists())


def test_tail_reads_the_end_of_a_large_file(tmp_path: Path) -> None:
    (tmp_path / "big").write_text("".join(f"line {i}\n" for i in range(100_000)))
    assert runner.tail(tmp_path / "big", 2) == "line 99998\nline 99999"
    assert runner.tail(tmp_path / "none") == ""


def test_follow_hands_over_every_line_while_the_program_runs(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("of an earlier program\n")
    script = "echo one; printf '10%%\\r20%%\\r'; while [ ! -e seen ]; do sleep 0.02; done; printf 'two\\nlast'; exit 3"
    heard: list[str] = []

    def hear(line: str) -> None:
        heard.append(line)
        if line == "one":
            (tmp_path / "seen").touch()

    with runner.start(["sh", "-c", script], log=tmp_path / "log", cwd=tmp_path) as process:
        assert process.follow(hear, every_s=0.05) == 3
    assert heard == ["one", "10%", "20%", "two", "last"]
