"""The Tritons behind a gateway: which one gets a request, and what happens when one of them fails.

A request goes to the one with the fewest in flight. Until its first token has come it may be sent to another, or again
to the same one once that has been restarted; afterwards it may not, since the client has seen a part of the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import aiohttp

from toolchain.gateway.engines import Relayed
from toolchain.gateway.failures import BusyError, SilentError, UpstreamError, invalid, too_many, unavailable
from toolchain.gateway.settings import Model, Timeouts
from toolchain.gateway.triton import Flow, Triton

_ATTEMPTS = 3
"""A request that was lost so often may be what kills the servers."""
_LOOK_DOWN_S = 0.5
"""Between two looks at a Triton that is down."""
_LOOK_UP_S = 5.0
"""The same for one that is up, while no answer of it shows that it lives."""
_ASK_AGAIN_S = 0.1
"""Before a full Triton is asked again; a cancelled request keeps its place there for up to 0.4 s."""


class Pool:
    """Use as ``async with``: a task looks after each Triton for as long. ``session`` is theirs, closed at the end."""

    def __init__(
        self,
        tritons: list[Triton],
        timeouts: Timeouts,
        session: aiohttp.ClientSession,
        *,
        queue_s: float = 0.0,
        on_retry: Callable[[str, str], None] = lambda *_: None,
    ) -> None:
        self.tritons = tritons
        self._timeouts = timeouts
        self._session = session
        self._queue_s = queue_s
        self._on_retry = on_retry
        self._changed = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []

    model: Model | None = None
    queue: int | None = None
    """Both as the settings say, from beginning to end."""

    async def __aenter__(self) -> Pool:
        self._tasks = [asyncio.create_task(self._look_after(triton)) for triton in self.tritons]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._session.close()

    def queued(self, _asked: Sequence[Mapping[str, Any]]) -> AbstractAsyncContextManager[None]:
        """The same whether they wait or not: nothing here scales."""
        return contextlib.nullcontext()

    @property
    def ready(self) -> bool:
        """Whether one of them generates."""
        return any(triton.up for triton in self.tritons)

    @property
    def room(self) -> int:
        """How many requests they take at once, as far as they have said so."""
        known = [triton.abilities.requests for triton in self.tritons if triton.abilities is not None]
        return sum(known) or 64

    @property
    def states(self) -> dict[str, str]:
        """Each Triton's URL -> why it is down, or nothing."""
        return {triton.upstream.http_url: "" if triton.up else triton.why_down for triton in self.tritons}

    async def metrics(self) -> list[Relayed]:
        """Each Triton's own."""
        texts = await asyncio.gather(*(triton.metrics() for triton in self.tritons))
        pairs = zip(self.tritons, texts, strict=True)
        return [Relayed({"triton": triton.upstream.http_url}, text) for triton, text in pairs]

    async def fleet(self) -> None:
        """It asks its Tritons itself."""

    async def start(self, inputs: Mapping[str, Any]) -> Flow:
        """The answer of the first Triton that begins one; while all are full it waits, ``queue_s`` at most. Raises
        ApiError.
        """
        now = time.monotonic()
        until, full_until = now + self._timeouts.patience_s, now + self._queue_s
        busy: set[Triton] = set()
        lost: list[str] = []
        while True:
            triton = await self._free_one(busy, until)
            if triton is None and busy and time.monotonic() < full_until:
                await asyncio.sleep(_ASK_AGAIN_S)
                busy.clear()
                continue
            if triton is None:
                raise self._nobody(busy, lost)
            self._check(triton, inputs)
            try:
                return await triton.open(inputs)
            except BusyError:
                busy.add(triton)
            except UpstreamError as error:
                triton.note(error)
                if isinstance(error, SilentError):  # whoever waited so long shall not wait again
                    raise unavailable(f"the engine's server is overloaded or hangs: {error}") from None
                self._on_retry(triton.upstream.http_url, str(error))
                lost.append(str(error))
                if len(lost) >= _ATTEMPTS:
                    raise unavailable(f"the engine's server failed {len(lost)} times: {lost[-1]}") from None

    async def _free_one(self, busy: set[Triton], until: float) -> Triton | None:
        """The least loaded one that is up and not ``busy``. Waits while none is up; None when that took too long."""
        while True:
            up = [triton for triton in self.tritons if triton.up]
            free = [triton for triton in up if triton not in busy]
            if free:
                return min(free, key=lambda triton: triton.in_flight)
            left_s = until - time.monotonic()
            if up or left_s <= 0:
                return None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s), self._changed:
                    await self._changed.wait()

    def _nobody(self, busy: set[Triton], lost: list[str]) -> Exception:
        if busy:
            return too_many("the engines have no room for another request just now", retry_after_s=1, code="overloaded")
        why = lost[-1] if lost else "; ".join(sorted({triton.why_down for triton in self.tritons}))
        return unavailable(f"no engine is there to answer: {why}")

    @staticmethod
    def _check(triton: Triton, inputs: Mapping[str, Any]) -> None:
        """Over HTTP, Triton silently ignores what is no input of the model."""
        known = triton.abilities.inputs if triton.abilities else frozenset(inputs)
        for name in inputs.keys() - known:
            raise invalid(f"{name}: the model on this server has no such input", name)

    async def _look_after(self, triton: Triton) -> None:
        while True:
            quiet_s = time.monotonic() - triton.last_good_s
            if not triton.up or quiet_s >= _LOOK_UP_S:
                await triton.probe()
                async with self._changed:
                    self._changed.notify_all()
            await asyncio.sleep(_LOOK_UP_S if triton.up else _LOOK_DOWN_S)
