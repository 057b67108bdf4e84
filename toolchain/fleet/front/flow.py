"""The answers of one request, each followed by a task of its own, as one stream of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from toolchain.fleet.front.texts import OUTPUTS


class Answering:
    """One answer: its events, begun once."""

    def __init__(self, events: AsyncGenerator[dict[str, Any], None]) -> None:
        self._events = events
        self._task: asyncio.Task[None] | None = None

    def begin(self, queue: asyncio.Queue[tuple[Answering, Any]]) -> None:
        """Its events go into the queue, then None or what went wrong."""
        self._task = asyncio.create_task(self._pour(queue))

    async def _pour(self, queue: asyncio.Queue[tuple[Answering, Any]]) -> None:
        try:
            async for event in self._events:
                queue.put_nowait((self, event))
            queue.put_nowait((self, None))
        except Exception as error:
            queue.put_nowait((self, error))
        finally:
            await self._events.aclose()

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()


class FleetFlow:
    """The answers of one request, as they come. Satisfies ``gateway.engines.AnswerFlow``."""

    outputs = OUTPUTS

    def __init__(self, answers: list[Answering]) -> None:
        self._answers = answers
        self._queue: asyncio.Queue[tuple[Answering, Any]] = asyncio.Queue()
        self._open = set(answers)
        self._first: Any = None

    async def begin(self) -> None:
        """Until the first event is there."""
        for answer in self._answers:
            answer.begin(self._queue)
        self._first = await self._next()

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        event = self._first
        while event is not None:
            if event:  # an answer that is wanted as a whole says until then only that it grows
                yield event
            event = await self._next()

    async def _next(self) -> Any:
        """The next event; None when all answers have ended."""
        while self._open:
            answer, event = await self._queue.get()
            if isinstance(event, BaseException):
                raise event
            if event is not None:
                return event
            self._open.discard(answer)
        return None

    def failed(self, error: Exception) -> None:
        """Dynamo and the workers look after themselves."""

    def close(self) -> None:
        for answer in self._answers:
            answer.cancel()
