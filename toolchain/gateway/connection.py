"""One client's connection: its body as it comes in, its going away, and an answer that goes out piece by piece."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from toolchain.gateway.failures import ApiError

Result = TypeVar("Result")


class GoneError(Exception):
    """The client has closed its connection."""


class SlowError(Exception):
    """The client does not take its answer."""


async def read_bytes(http: Request, *, most: int, timeout_s: float) -> bytes:
    """The whole body. Raises ApiError: 413 for more than ``most`` bytes, 408 for a client that is too slow."""
    too_large = ApiError(413, f"the body is larger than {most} bytes", code="request_too_large")
    declared = http.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > most:
        raise too_large
    held = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in http.stream():
                held += chunk
                if len(held) > most:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {timeout_s:g} s", code="request_timeout") from None
    except ClientDisconnect:
        raise GoneError from None
    return bytes(held)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """What ``work`` gives; when the client goes away first, ``work`` is cancelled and GoneError raised."""
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise GoneError
    finally:
        for one in (task, leaving):
            one.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await one


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events as they come. Ends when they end, when the client goes, when it does not take a piece within
    ``write_s``, or, with the event ``late``, at the deadline (time of the event loop). ``on_end`` is called with the
    reason, or None.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        *,
        deadline: float,
        write_s: float,
        late: bytes,
        on_end: Callable[[str | None], None],
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._pieces, self._deadline, self._write_s, self._late = pieces, deadline, write_s, late
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        why: str | None = "cut"
        try:
            why = await self._send_until(send, receive)
        except GoneError:
            why = "client gone"
        except SlowError:  # the server then closes a connection whose answer has no end
            why = "client too slow"
        finally:
            await self._pieces.aclose()
            self._on_end(why)

    async def _send_until(self, send: Send, receive: Receive) -> str | None:
        try:
            async with asyncio.timeout_at(self._deadline):
                await unless_gone(receive, self._send_all(send))
        except TimeoutError:
            await self._last_words(send)
            return "deadline"
        return None

    async def _last_words(self, send: Send) -> None:
        try:
            async with asyncio.timeout(self._write_s):
                await send({"type": "http.response.body", "body": self._late, "more_body": False})
        except TimeoutError:
            raise SlowError from None

    async def _send_all(self, send: Send) -> None:
        """Raises SlowError."""
        try:
            async with asyncio.timeout(None) as patience:
                watch = _Watch(patience, self._write_s)
                try:
                    await self._send_pieces(send, watch)
                finally:
                    watch.end()
        except TimeoutError:
            if not patience.expired():
                raise
            raise SlowError from None

    async def _send_pieces(self, send: Send, watch: _Watch) -> None:
        head = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await watch.over(send(head))
        async for piece in self._pieces:
            await watch.over(send({"type": "http.response.body", "body": piece, "more_body": True}))
        await watch.over(send({"type": "http.response.body", "body": b"", "more_body": False}))


class _Watch:
    """Ends a timeout's block when one of the many waits in it takes longer than ``most_s``, twice as long at most. One
    timer for all of them: to set and take away one for each costs more than to send a piece.
    """

    def __init__(self, patience: asyncio.Timeout, most_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._patience, self._most_s = patience, most_s
        self._since_s: float | None = None
        self._timer = self._loop.call_later(most_s, self._look)

    async def over(self, wait: Awaitable[None]) -> None:
        self._since_s = self._loop.time()
        await wait
        self._since_s = None

    def end(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        until = (now if self._since_s is None else self._since_s) + self._most_s
        if until <= now:
            self._patience.reschedule(now)
        else:
            self._timer = self._loop.call_at(until, self._look)
