"""How many requests are at the engines, and who waits: first come, first served, and not for ever."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from toolchain.gateway.failures import too_many

_LOOK_S = 0.2
"""Until those who wait see that there are more places."""


class Admission:
    """``places()`` requests at work at once, ``queue()`` more wait, at most ``wait_s``; all others are told to go."""

    def __init__(self, places: Callable[[], int], queue: Callable[[], int], wait_s: float) -> None:
        self._places, self._queue, self._wait_s = places, queue, wait_s
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.running = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """Whether the next request waits, or is told to go."""
        return self.running >= self._places() or bool(self._waiting)

    async def enter(self) -> None:
        """Returns with a place. Raises ApiError (429)."""
        if not self.full:
            self.running += 1
            return
        if len(self._waiting) >= self._queue():
            text = f"{self.running} requests are at work and {len(self._waiting)} wait; there is no room for more"
            raise too_many(text, retry_after_s=1, code="overloaded")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(self._wait_s):
                while not turn.done():
                    await asyncio.wait([turn], timeout=_LOOK_S)
                    self._call()
        except TimeoutError:
            self._give_back(turn)
            raise too_many(
                f"no engine had room for this request within {self._wait_s:g} s", retry_after_s=1, code="overloaded"
            ) from None
        except asyncio.CancelledError:
            self._give_back(turn)
            raise

    def leave(self) -> None:
        """The place is free again."""
        self.running -= 1
        self._call()

    def _call(self) -> None:
        """Those whose turn it is."""
        while self._waiting and self.running < self._places():
            turn = self._waiting.popleft()
            if not turn.done():
                self.running += 1
                turn.set_result(None)

    def _give_back(self, turn: asyncio.Future[None]) -> None:
        """Nobody waits for this turn any more; it may have come in the very moment."""
        if turn in self._waiting:
            self._waiting.remove(turn)
        elif turn.done() and not turn.cancelled():
            self.leave()
