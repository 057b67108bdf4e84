"""The parent of every long-running foreign program: when we die, however we die, nothing that we started outlives us.

``runner`` starts this file with ``python -I -S`` and gives it a description of the program (one line of JSON) on stdin;
stdin then stays open for as long as the runner lives. The guard answers on stdout with ``pid N`` or ``error TEXT``, and
at the end ``exit CODE``. It ends the program's whole process group when the program exits by itself (so that no
worker is orphaned), when the runner says ``kill``, and when stdin closes because the runner is gone, kill -9 included.
Then it waits for every process that it inherited, deletes the files named in ``delete`` and runs ``afterwards``.

Why a process and not only PR_SET_PDEATHSIG: the kernel clears that flag on fork, so it reaches the server but not the
server's own children, and it fires when the *thread* that started the child ends.

It imports nothing of ours, so that it starts in a few milliseconds and survives a broken installation.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
from pathlib import Path
from types import FrameType
from typing import Any

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_AFTERWARDS_TIMEOUT_S = 30.0
_POLL_S = 1.0
"""How often a runner that died without closing the pipe (a fork holds it open) is noticed."""
_POLL_WITHOUT_PIDFD_S = 0.1
"""How often the program's end is looked for before Linux 5.3, which cannot report it."""


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _die_with_guard() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(1, (text.replace("\n", " ") + "\n").encode())


def _read_line() -> bytes:
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            break
        line += byte
    return bytes(line)


def _spawn(spec: dict[str, Any]) -> subprocess.Popen[bytes]:
    with Path(spec["stdout"]).open("ab") as out, Path(spec["stderr"]).open("ab") as err:
        return subprocess.Popen(
            spec["argv"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=spec["cwd"],
            env=spec["env"],
            start_new_session=True,
            preexec_fn=_die_with_guard,  # one thread here, so this is safe
        )


def _children() -> list[int]:
    """Every direct child of this process, inherited ones and zombies included."""
    me = os.getpid()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == me:
            found.append(int(process.name))
    return found


def _end_group(group: int) -> None:
    """SIGKILL to the group and to whatever left it, then wait until no child remains."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
    while children := _children():
        for pid in children:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for pid in children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _clean(spec: dict[str, Any]) -> None:
    for pattern in spec["delete"]:
        for path in Path(pattern).parent.glob(Path(pattern).name):
            with contextlib.suppress(OSError):
                path.unlink()
    if spec["afterwards"]:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(
                spec["afterwards"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=spec["env"],
                timeout=_AFTERWARDS_TIMEOUT_S,
                check=False,
            )


def _obey(child: subprocess.Popen[bytes], runner: int) -> None:
    """Until the program ends, the runner says ``kill``, or the runner is gone."""
    watched, poll_s = [0], _POLL_WITHOUT_PIDFD_S
    with contextlib.suppress(OSError):
        watched, poll_s = [0, os.pidfd_open(child.pid)], _POLL_S
    while child.poll() is None and os.getppid() == runner:
        ready, _, _ = select.select(watched, [], [], poll_s)
        if 0 in ready:
            command = _read_line()
            if command == b"term\n":
                child.send_signal(signal.SIGTERM)
            else:  # "kill", or the pipe is closed
                return


def _interrupted(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(1)


def main() -> None:
    runner = os.getppid()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _interrupted)
    spec = json.loads(_read_line())
    try:
        child = _spawn(spec)
    except OSError as error:
        _say(f"error {error.strerror}: {error.filename or spec['argv'][0]}")
        return
    _say(f"pid {child.pid}")
    try:
        _obey(child, runner)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        code = child.poll()
        if code is None:
            child.kill()
            code = child.wait()
        _end_group(child.pid)
        _clean(spec)
        _say(f"exit {code}")


if __name__ == "__main__":
    main()
