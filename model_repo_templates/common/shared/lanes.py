"""Sender lanes: the only threads that call ``send``. Each request is pinned to one lane, so its order is kept.

The first tokens of a request go out at once, and later ones where its last send was ``COALESCE_S`` ago; what comes
sooner is gathered until then: a send costs about 0.3 ms of one Python lock, whatever it carries. So an engine whose
steps take longer than that has no token held back. A lane knows nothing of tensors.
"""

from __future__ import annotations

import queue
import threading
import time
from typing import Any, Protocol

COALESCE_S = 0.030
"""The least time between two sends of a request: 64 streams of 10 ms steps then keep 92 % of the engine's pace
(measured)."""


class Sendable(Protocol):
    """What a lane needs of a request."""

    done: bool

    def absorb(self, event: Any) -> bool:
        """Take an event in. True: send at once."""

    def flush(self) -> None:
        """Send what there is."""


class Lane(threading.Thread):
    """One sender thread with its queue."""

    def __init__(self, index: int) -> None:
        super().__init__(name=f"lane-{index}", daemon=True)
        self._inbox: queue.SimpleQueue[tuple[Sendable, Any] | None] = queue.SimpleQueue()
        self._due: dict[Sendable, float] = {}
        self._sent: dict[Sendable, float] = {}
        """When something was last sent, of requests that are not done."""

    def put(self, request: Sendable, event: Any) -> None:
        """Hand over an event; never waits."""
        self._inbox.put((request, event))

    def close(self) -> None:
        """Send what waits, then end."""
        self._inbox.put(None)

    def run(self) -> None:
        while True:
            try:
                item = self._inbox.get(timeout=self._patience())
            except queue.Empty:
                self._flush_due(time.monotonic())
                continue
            if item is None:
                self._flush_due(float("inf"))
                return
            self._take(*item)
            self._flush_due(time.monotonic())

    def _take(self, request: Sendable, event: Any) -> None:
        if request.done:
            return
        if request.absorb(event):
            self._flush(request)
        else:
            self._due.setdefault(request, self._sent.get(request, time.monotonic()) + COALESCE_S)

    def _flush_due(self, now: float) -> None:
        for request in [request for request, due in self._due.items() if due <= now]:
            self._flush(request)

    def _flush(self, request: Sendable) -> None:
        self._due.pop(request, None)
        request.flush()
        self._sent[request] = time.monotonic()
        if request.done:
            del self._sent[request]

    def _patience(self) -> float | None:
        return max(0.0, min(self._due.values()) - time.monotonic()) if self._due else None
