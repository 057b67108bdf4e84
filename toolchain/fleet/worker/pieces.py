"""What a worker says at once: the tokens of one answer that have come since it last said something.

Each item on its way to a client costs every process that it passes about as much as the token itself, so an answer
that is quicker than a hundred tokens a second goes in a hundred items a second. A token that comes later than
``APART_S`` after the item before it goes at once; the first and the last never wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from toolchain.fleet import wire

APART_S = 0.01
"""Between two items of one answer that has not ended: below what a person sees, a screen's 60 pictures a second."""


class Waiting:
    """Events of one answer, from who reads them to who passes them on, on one event loop."""

    def __init__(self, apart_s: float = APART_S) -> None:
        self._loop, self._apart_s = asyncio.get_running_loop(), apart_s
        self._events: list[Any] = []
        self._over = False
        self._due_s = float("-inf")
        self._wake: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def put(self, event: Any) -> None:
        """An event; or None or what went wrong, which is the end."""
        self._events.append(event)
        self._over = self._over or event is None or isinstance(event, Exception)
        if self._wake is not None:
            self._plan()

    async def take(self, timeout_s: float) -> list[Any]:
        """What has come, in its order; nothing when nothing came for so long."""
        if not self._events or not self._is_due():
            self._wake = self._loop.create_future()
            silence = self._loop.call_later(timeout_s, self._ring)
            try:
                if self._events:
                    self._plan()
                await self._wake
            finally:
                silence.cancel()
                if self._timer is not None:
                    self._timer.cancel()
                self._wake = self._timer = None
        found, self._events = self._events, []
        if found:
            self._due_s = self._loop.time() + self._apart_s
        return found

    def _is_due(self) -> bool:
        return self._over or self._loop.time() >= self._due_s

    def _plan(self) -> None:
        if self._is_due():
            self._ring()
        elif self._timer is None:
            self._timer = self._loop.call_at(self._due_s, self._ring)

    def _ring(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


class Piece:
    """Events of ``tensorrt_llm`` that go as one item."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._logs: list[float] | None = None
        self._told: dict[str, Any] = {}

    def add(self, ask: wire.Ask, event: Mapping[str, Any]) -> int:
        """-> how many tokens it had."""
        ids, logs = wire.tokens(event)
        self.ids += ids
        if logs is not None:
            self._logs = [*(self._logs or ()), *logs]
        self._told |= wire.metrics(ask, event)
        return len(ids)

    def item(self, finish: str | None = None) -> wire.Item:
        return wire.item(self.ids, self._logs, finish, self._told)
