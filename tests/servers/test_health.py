"""The judgment over a running server: what counts as dead, hung, or merely busy."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from toolchain.servers.triton import causes
from toolchain.servers.triton.health import Health, Policy, members
from toolchain.servers.triton.ports import free_ports
from toolchain.servers.triton.probe import Verdict, one_token

POLICY = Policy(period_s=0.0, deadline_s=0.3, timeouts=3, busy_limit_s=1.2)


def group_of(script: str) -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", script], start_new_session=True) as process:
        yield process.pid
        process.kill()


@pytest.fixture
def idle_group() -> Iterator[int]:
    yield from group_of("import time; time.sleep(300)")


@pytest.fixture
def busy_group() -> Iterator[int]:
    yield from group_of("while True: pass")


def no_answer(deadline_s: float) -> Verdict:
    time.sleep(deadline_s)
    return Verdict("timeout", seconds=deadline_s)


def looks(health: Health, limit: int = 20) -> tuple[int, str]:
    """How often ``trouble`` had to look until it found some, and what it was."""
    for count in range(1, limit):
        if reason := health.trouble():
            return count, reason
    raise AssertionError("no trouble found")


def test_silence_of_an_idle_server_is_a_hang_after_three_timeouts(idle_group: int) -> None:
    assert looks(Health(POLICY, idle_group, no_answer))[0] == 3


def test_silence_of_a_working_server_is_borne_until_the_busy_limit(busy_group: int) -> None:
    count, reason = looks(Health(POLICY, busy_group, no_answer))
    assert count > POLICY.timeouts
    assert "no token for" in reason


def test_two_error_answers_in_a_row_are_trouble_and_one_is_not(idle_group: int) -> None:
    answers = iter(["failed", "ok", "failed", "busy", "refused", "failed"])
    health = Health(POLICY, idle_group, lambda _deadline_s: Verdict(next(answers), "broken"))
    assert looks(health) == (6, "broken")


def test_a_lost_worker_is_probed_at_once_and_needs_one_failure() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True) as process:
        health = Health(Policy(), process.pid, lambda _deadline_s: Verdict("failed", "not healthy"))
        assert health.trouble() is None, "the first probe is due only after the period"
        process.kill()
    assert health.trouble() == "not healthy"


def test_costly_probes_become_rare(idle_group: int) -> None:
    now = [100.0]
    asked = []

    def probe(_deadline_s: float) -> Verdict:
        asked.append(now[0])
        return Verdict("ok", seconds=1.0)

    health = Health(Policy(period_s=5.0, max_duty=0.05), idle_group, probe, clock=lambda: now[0])
    for _ in range(120):
        now[0] += 0.5
        health.trouble()
    assert asked == [105.0, 125.0, 145.0]


def test_members_are_the_living_processes_of_a_group(busy_group: int) -> None:
    time.sleep(0.3)
    assert members(busy_group)[busy_group] > 0
    assert os.getpid() not in members(busy_group)
    assert members(2**22 + 1) == {}


def test_a_probe_of_nobody_is_refused() -> None:
    verdict = one_token(("127.0.0.1", free_ports().http), "tensorrt_llm_bls", 1.0)
    assert (verdict.state, verdict.alive) == ("refused", False)


LOADING = 'I1122 11:14:54.281774 1 model_lifecycle.cc:472] "loading: bad:1"\n'
FAILED = "E1122 11:14:55.089004 1 model_lifecycle.cc:642] \"failed to load 'bad' version 1: "


AT = r"\n\nAt:\n  /r/bad/1/model.py(3): initialize\n"
"""How Triton writes a Python traceback into one line of its log."""


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        (
            f'{FAILED}Internal: ValueError: no engine: /x/y{AT}"',
            "model bad does not load: ValueError: no engine: /x/y",
            "",
        ),
        (
            f"{FAILED}Internal: ModuleNotFoundError: No module named 'torch'{AT}",
            "needs the Python module torch",
            "install",
        ),
        (f"{FAILED}Internal: SyntaxError: expected ':' (model.py, line 1)\"", "SyntaxError: expected ':'", ""),
        (f'{FAILED}Internal: MemoryError: <EMPTY MESSAGE>{AT}"', "model bad ran out of memory", "scalellm plan"),
        (f"{FAILED}Internal: Stub process 'bad_0_0' is not healthy.\"", "Python process of model bad died", "dmesg"),
        ("stub: libfoo.so.1: cannot open shared object file: No such file", "the library libfoo.so.1 is missing", ""),
        ("http_server.cc:1] \"Socket '127.0.0.1:8000' already in use \"", "in use: 127.0.0.1:8000", "other ports"),
        ("error: creating server: Internal - failed to load all models", "failed to load all models", ""),
    ],
)
def test_the_log_names_its_cause(tmp_path: Path, line: str, message: str, hint: str) -> None:
    log = tmp_path / "log"
    log.write_text(LOADING + line + "\nerror: creating server: Internal - failed to load all models\n")
    cause = causes.diagnose(log)
    assert cause is not None
    assert message in cause.message
    assert "At:" not in cause.message
    assert hint in cause.hint


def test_a_log_without_a_known_cause_gives_none(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(LOADING)
    assert causes.diagnose(tmp_path / "log") is None
    assert causes.still_loading(tmp_path / "log") == ["bad"]
    assert not causes.failed_model(tmp_path / "log")
