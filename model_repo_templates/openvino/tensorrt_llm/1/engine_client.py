"""The stub's end of the engine process: starts it, talks to it, notices its death.

``execute`` must never wait for a step, so messages out go through a queue and a writer thread; messages in are handed
to ``on_events`` by a reader thread. It knows nothing of Triton.
"""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
"""Of the engine process, where the user's does not say otherwise. oneDNN would keep 1024 kernels that OpenVINO's own
cache keeps too, or has dropped (``pipeline.KERNELS``). Source:
https://oneapi-src.github.io/oneDNN/dev_guide_primitive_cache.html (read 2026-11-22)."""
_STOP_S = 5.0
"""How long the engine process may take to leave by itself."""


class EngineClient:
    """A running engine process. ``dead`` is None, or in words why it is no more."""

    def __init__(
        self,
        engine_folder: Path,
        *,
        on_events: Callable[[list[tuple[Any, ...]], dict[str, Any]], None],
        on_death: Callable[[str], None],
        services: int = 1,
    ) -> None:
        """Start it and wait until it has generated its first tokens. RuntimeError when it fails to. ``services`` share
        the cores.
        """
        ours, theirs = socket.socketpair()
        script = Path(__file__).with_name("engine_process.py")
        self._process = subprocess.Popen(
            [interpreter(), str(script), str(theirs.fileno()), str(engine_folder), str(services)],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            env={**_ENVIRONMENT, **os.environ},
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self._on_events, self._on_death = on_events, on_death
        self._outbox: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._closing = False
        self.dead: str | None = None
        self._wait_until_ready()
        self._threads = [
            threading.Thread(target=target, name=f"engine-{target.__name__.strip('_')}", daemon=True)
            for target in (self._read, self._write)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, *message: Any) -> None:
        """Queue a message; never waits. Lost if the engine is dead, whose death is told to everyone anyway."""
        self._outbox.put(message)

    def close(self) -> None:
        """Ask the process to leave, then make it."""
        self._closing = True
        self.send("stop")
        self._outbox.put(None)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for thread in self._threads:
            thread.join(_STOP_S)

    def _wait_until_ready(self) -> None:
        try:
            self._connection.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(f"the engine did not start: {self._obituary()} (its own words are above)") from error

    def _read(self) -> None:
        try:
            while True:
                _kind, events, status = self._connection.recv()
                self._on_events(events, status)
        except (EOFError, OSError):
            if not self._closing:
                self.dead = f"{self._obituary()}; the server must be restarted"
                self._on_death(self.dead)

    def _write(self) -> None:
        while (message := self._outbox.get()) is not None:
            try:
                self._connection.send(message)
            except OSError:
                return

    def _obituary(self) -> str:
        code = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"the engine process {how}"


def interpreter() -> str:
    """The Python that Triton's stub embeds. An embedded interpreter may not know its own program."""
    candidates = [sys.executable, str(Path(sys.prefix) / "bin" / "python3")]
    for path in candidates:
        if path and Path(path).name.startswith("python") and os.access(path, os.X_OK):
            return path
    raise RuntimeError(f"no Python program was found for the engine process (looked at {candidates})")
