"""What runs on this machine: a folder in which one process at a time is at work, known by a lock.

The kernel drops the lock when the process dies. So what was killed does not run, whatever its file says, and no other
process that has got its id by now is taken for it. The process writes into the folder's state file how it is. This
module knows nothing of what that is, and starts nothing.
"""

from __future__ import annotations

import copy
import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from toolchain import workspace
from toolchain.errors import EndpointError, ScalellmError

STATE, LOCK = "deployment.json", ".deployment.lock"
_POLL_S = 0.1
_PATIENCE_S = 1.0

Record = Callable[[Mapping[str, Any]], None]
"""Writes the state file, whole or not at all."""


@dataclass(frozen=True)
class Place:
    """Such a folder."""

    folder: Path

    def state(self) -> dict[str, Any] | None:
        """What the process that is at work has written, at least its ``pid``, which is 0 before it has; None where none
        is.
        """
        try:
            with (self.folder / LOCK).open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
        except FileNotFoundError:
            return None
        except BlockingIOError:
            pass
        with suppress(OSError, ValueError):
            found = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
            if isinstance(found, dict) and isinstance(found.get("pid"), int):
                return found
        return {"pid": 0}

    @contextmanager
    def hold(self, taken: Callable[[], ScalellmError]) -> Iterator[Record]:
        """Be that process, for the length of a block. Raises what ``taken`` gives while another one is."""
        file = self.folder / STATE
        last: Mapping[str, Any] | None = None

        def record(state: Mapping[str, Any]) -> None:
            nonlocal last
            if state != last:
                text = json.dumps({"pid": os.getpid(), **state}, indent=2) + "\n"
                workspace.write_durably(file, text.encode())
                last = copy.deepcopy(state)

        with (self.folder / LOCK).open("ab") as lock:
            if not _taken(lock):
                raise taken()
            try:
                record({})
                yield record
            finally:
                file.unlink(missing_ok=True)

    def end(self, timeout_s: float) -> bool:
        """Ask the process to finish, and wait for it. -> whether there was one. Raises EndpointError when it does not
        within ``timeout_s`` seconds.
        """
        found = self.state()
        if found is None:
            return False
        if found["pid"]:
            with suppress(ProcessLookupError):
                os.kill(found["pid"], signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        while self.state() is not None:
            if time.monotonic() > deadline:
                raise EndpointError(
                    f"{self.folder.name}: pid {found['pid']} has not stopped within {timeout_s:g} s",
                    hint=f"kill -9 {found['pid']}",
                )
            time.sleep(_POLL_S)
        return True


def _taken(lock: BinaryIO) -> bool:
    """Take the lock; it is tried for a moment, because whoever looks (``state``) holds it, too, while looking."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S / 10)
