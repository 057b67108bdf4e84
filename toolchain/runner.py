"""The only file that starts foreign programs.

``run`` waits for a short program and gives its output; ``start`` gives a ``Process`` that writes to a log file. Both
put the program into its own session under a guard (see ``guard.py``), so that an exception, Ctrl-C or kill -9 of this
process leaves nothing behind. What goes wrong with a program becomes a ``ToolError`` with its last words.

It does not know which programs there are, nor what their output means.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from toolchain.errors import ToolError

_GUARD = Path(__file__).with_name("guard.py")
_KILL_WAIT_S = 60.0
"""How long the guard may need to kill, wait and clean up before we go on without it."""
_TAIL_BYTES = 256 * 1024


@dataclass(frozen=True)
class Completed:
    """What a program left: its exit code (negative: the signal that ended it), output, and how long it took."""

    argv: tuple[str, ...]
    exit_code: int
    stdout: str
    stderr: str
    seconds: float


def tail(path: Path, n: int = 20) -> str:
    """The last ``n`` lines of a text file, without reading more than its last 256 KiB; empty where there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-n:])


class Process:
    """A foreign program that runs under a guard. ``pid`` is also the id of its process group and session."""

    def __init__(
        self, argv: Sequence[str], guard: subprocess.Popen[bytes], pid: int, log: Path, begin: int = 0
    ) -> None:
        self.argv = tuple(argv)
        self.pid = pid
        self.log = log
        self._begin = begin
        self._guard = guard
        self._exit_code: int | None = None
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """The exit code once the program and all that it started are gone, else None."""
        with self._lock:
            if self._exit_code is None and self._guard.poll() is not None:
                self._exit_code = self._last_word()
            return self._exit_code

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Waits for the program; None when ``timeout_s`` passed first."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._guard.wait(timeout_s)
        return self.poll()

    def follow(self, on_line: Callable[[str], None], every_s: float = 0.2) -> int:
        """Waits for the program, hands over every whole line that its log gets meanwhile, and gives the exit code.

        What it rewrites with a carriage return, as bars do, comes as lines of their own.
        """
        with self.log.open(encoding="utf-8", errors="replace", newline=None) as log:
            log.seek(self._begin)
            rest = ""
            while True:
                code = self.wait(every_s)
                *lines, rest = (rest + log.read()).split("\n")
                for line in lines:
                    on_line(line)
                if code is not None:
                    if rest:
                        on_line(rest)
                    return code

    def terminate(self, grace_s: float) -> int:
        """SIGTERM to the program, ``grace_s`` to finish, then SIGKILL to its whole group; gives the exit code."""
        self._tell(b"term\n")
        code = self.wait(grace_s)
        return self.kill() if code is None else code

    def hurry(self) -> None:
        """Asks for SIGKILL to the whole group and does not wait: may be called while another call waits."""
        self._tell(b"kill\n")

    def kill(self) -> int:
        """SIGKILL to the whole group, and waits until every process of it is gone."""
        self.hurry()
        code = self.wait(_KILL_WAIT_S)
        if code is None:  # the guard itself is stuck, so that its death must do
            self._guard.kill()
            code = self.wait()
        return -signal.SIGKILL if code is None else code

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def _tell(self, command: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ValueError):  # it has just ended
            _write(self._guard, command)

    def _last_word(self) -> int:
        """Reads ``exit CODE`` from a guard that ended; a guard that was killed leaves the group to us."""
        word = _read_word(self._guard.stdout)
        _close(self._guard)
        if word.startswith("exit "):
            return int(word[5:])
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        return -signal.SIGKILL


def start(
    argv: Sequence[str],
    *,
    log: Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdout: Path | None = None,
    delete: Sequence[str] = (),
    afterwards: Sequence[str] = (),
    hint: str = "",
) -> Process:
    """Starts a program; its stderr is appended to ``log``, its stdout too unless ``stdout`` names another file.

    ``env`` replaces the environment (default: ours). ``delete`` (paths whose last part is a glob pattern) and
    ``afterwards`` (a command, at most 30 s) are what the guard cleans up after the last process is gone, whichever way
    it went.
    A program that cannot be started is a ``ToolError`` with ``hint``.
    """
    spec = {
        "argv": list(argv),
        "cwd": str(cwd) if cwd else None,
        "env": dict(os.environ if env is None else env),
        "stdout": str(stdout or log),
        "stderr": str(log),
        "delete": list(delete),
        "afterwards": list(afterwards),
    }
    with log.open("ab") as errors:
        begin = errors.tell()
        guard = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_GUARD), Path(argv[0]).name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            bufsize=0,
            start_new_session=True,
        )
    try:
        pid = _introduce(guard, spec, hint)
    except BaseException:
        _close(guard)
        guard.wait()
        raise
    return Process(argv, guard, pid, log, begin)


def detach(argv: Sequence[str], *, log: Path) -> subprocess.Popen[bytes]:
    """Starts a program that outlives this one, in a session of its own: no guard watches it. Output goes to ``log``."""
    with log.open("ab") as out:
        return subprocess.Popen(
            list(argv), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )


def run(
    argv: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
    check: bool = True,
    hint: str = "",
) -> Completed:
    """Runs a program to its end. ``check``: an exit code other than 0 is a ``ToolError`` with its last lines.

    After ``timeout_s`` the program and everything that it started is killed, and that is a ``ToolError`` too.
    """
    with tempfile.TemporaryDirectory(prefix="scalellm-run-") as folder:
        out, err = Path(folder) / "stdout", Path(folder) / "stderr"
        begun = time.monotonic()
        with start(argv, log=err, stdout=out, cwd=cwd, env=env, hint=hint) as process:
            code = process.wait(timeout_s)
        seconds = time.monotonic() - begun
        last = tail(err) or tail(out)
        if code is None:
            raise ToolError(f"{shlex.join(argv)} did not finish within {timeout_s:g} s\n{last}".rstrip(), hint=hint)
        if check and code != 0:
            raise ToolError(f"{shlex.join(argv)} {_how_it_ended(code)}\n{last}".rstrip(), hint=hint)
        return Completed(tuple(argv), code, _text(out), _text(err), seconds)


def in_parallel(calls: Iterable[Callable[[], None]]) -> None:
    """Each in a thread of its own, so that the end of one program does not wait for another's. An interrupted wait
    does not keep this process: the guards then end what is left.
    """
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _introduce(guard: subprocess.Popen[bytes], spec: Mapping[str, object], hint: str) -> int:
    """Hands the program to its guard -> the program's pid."""
    with contextlib.suppress(BrokenPipeError):  # then its first word says why
        _write(guard, json.dumps(spec).encode() + b"\n")
    word = _read_word(guard.stdout)
    if word.startswith("pid "):
        return int(word[4:])
    reason = word.removeprefix("error ") or f"the guard {_how_it_ended(guard.wait())}"
    argv = spec["argv"]
    assert isinstance(argv, list)
    raise ToolError(f"cannot start {argv[0]}: {reason}", hint=hint)


def _write(guard: subprocess.Popen[bytes], data: bytes) -> None:
    assert guard.stdin is not None
    while data:
        data = data[guard.stdin.write(data) :]


def _read_word(stream: IO[bytes] | None) -> str:
    return stream.readline().decode(errors="replace").strip() if stream and not stream.closed else ""


def _close(guard: subprocess.Popen[bytes]) -> None:
    for stream in (guard.stdin, guard.stdout):
        if stream:
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def _how_it_ended(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
