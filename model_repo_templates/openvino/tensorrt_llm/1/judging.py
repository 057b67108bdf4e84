"""An engine whose guided requests are judged before it hears of them: their grammars could end it.

Verdicts are made one after another in a thread, in a process that is killed when one takes too long. It knows nothing
of Triton.
"""

from __future__ import annotations

import queue
import socket
import subprocess
import threading
from collections import OrderedDict
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from engine_client import EngineClient, interpreter

JUDGE = "guides"
"""The folder in the engine's that holds the judge's model."""
_MOST_S = 10.0
"""The engine compiles what was accepted again, between two tokens of everybody."""
_START_S = 120.0
_REMEMBERED = 256
_TOO_LONG = f"its grammar takes more than {_MOST_S:g} s to compile: make it smaller"


class Judge:
    """The judging process; started when it is asked, and again after it died."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._accepted: OrderedDict[Any, None] = OrderedDict()

    def verdict(self, kind: str, text: str, end_ids: list[int]) -> str:
        """Empty, or why the guide cannot be kept."""
        case = (kind, text, tuple(end_ids))
        if case in self._accepted:
            return ""
        try:
            if self._process is None:
                self._start()
            self._wait(_START_S)
            self._connection.send((kind, text, end_ids))
            if not self._connection.poll(_MOST_S):
                self.close()
                return _TOO_LONG
            reason = str(self._connection.recv())
        except (EOFError, OSError):
            self.close()
            return "the compiler of grammars died of it"
        if not reason:
            self._accepted[case] = None
            if len(self._accepted) > _REMEMBERED:
                self._accepted.popitem(last=False)
        return reason

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._connection.close()
            self._process = None

    def _start(self) -> None:
        """Raises EOFError or OSError."""
        ours, theirs = socket.socketpair()
        script = Path(__file__).with_name("judge_process.py")
        self._process = subprocess.Popen(
            [interpreter(), str(script), str(theirs.fileno()), str(self._folder)],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._connection = Connection(ours.detach())

    def _wait(self, seconds: float) -> None:
        """Until it is ready. Raises EOFError where it never is."""
        if not self._connection.poll(seconds):
            raise EOFError
        self._connection.recv()


class GuidedEngine:
    """``EngineClient`` with the judge in front of requests that have a ``guide``."""

    def __init__(
        self, engine: EngineClient, folder: Path, on_events: Callable[[list[tuple[Any, ...]], dict[str, Any]], None]
    ) -> None:
        self._engine, self._on_events = engine, on_events
        self._judge = Judge(folder / JUDGE)
        self._lock = threading.Lock()
        self._held: dict[int, tuple[Any, ...]] = {}
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="judge", daemon=True)
        self._thread.start()

    @property
    def dead(self) -> str | None:
        return self._engine.dead

    @property
    def pid(self) -> int:
        return self._engine.pid

    def send(self, *message: Any) -> None:
        """As ``EngineClient.send``."""
        with self._lock:
            if message[0] == "add" and "guide" in message[3]:
                self._held[message[1]] = message
                self._queue.put(message[1])
            elif not (message[0] == "cancel" and self._held.pop(message[1], None)):
                self._engine.send(*message)

    def close(self) -> None:
        self._queue.put(None)
        self._engine.close()
        self._thread.join(_MOST_S)
        self._judge.close()

    def _work(self) -> None:
        while (key := self._queue.get()) is not None:
            held = self._held.get(key)
            if held is None:
                continue
            options = held[3]
            reason = self._judge.verdict(*options["guide"], options["stop_token_ids"])
            with self._lock:
                if self._held.pop(key, None) is None:
                    continue
                if not reason:
                    self._engine.send(*held)
            if reason:
                self._on_events([(key, 0, [], None, "refused", f"guided_decoding_guide: {reason}")], {})
