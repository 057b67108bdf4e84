"""One request of a client, from its arrival to its last byte: what it holds, what is counted and logged of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any, Protocol

from openai.types import CompletionUsage
from starlette.requests import Request as HttpRequest

from toolchain.gateway.admission import Admission
from toolchain.gateway.answers import Answer, Piece, usage
from toolchain.gateway.engines import AnswerFlow, Engines
from toolchain.gateway.keys import Doorkeeper, Key
from toolchain.gateway.logs import Log, request_id
from toolchain.gateway.metrics import Metrics
from toolchain.gateway.recent import Recent
from toolchain.gateway.settings import Settings


class Behind(Protocol):
    """What a visit needs of the service."""

    settings: Settings
    log: Log
    metrics: Metrics
    recent: Recent
    doorkeeper: Doorkeeper
    admission: Admission
    pool: Engines


class Visit:
    """One request of a client, from its arrival to its last byte."""

    def __init__(self, service: Behind, http: HttpRequest, route: str) -> None:
        self.service, self.http, self.route = service, http, route
        self.id = request_id(http.headers.get("x-request-id"))
        self.begun_s = time.perf_counter()
        self.deadline = asyncio.get_running_loop().time() + service.settings.timeouts.request_s
        self.key: Key | None = None
        self.flows: list[AnswerFlow] = []
        self.answers: dict[int, Answer] = {}
        self.prompts = 1
        self.facts: dict[str, Any] = {}
        self._first_s: float | None = None
        self._last_s = self.begun_s
        self._entered = self._counted = self._ended = False

    async def enter(self, *asked: Mapping[str, Any]) -> None:
        """Take a place for requests with these inputs. Raises ApiError (429)."""
        service = self.service
        service.doorkeeper.enter(self.key)
        self._counted = True
        if service.admission.full:
            async with service.pool.queued(asked):
                await service.admission.enter()
        else:
            await service.admission.enter()
        self._entered = True

    def see(self, piece: Piece, *, whole: bool = False) -> None:
        """A piece of an answer has come from the engine. ``whole``: all of it, so that it says nothing of when its
        tokens came.
        """
        answer, metrics = self.answers.setdefault(piece.index, Answer()), self.service.metrics
        new = max(0, piece.answer_tokens - answer.answer_tokens)
        answer.add(piece)
        now, apart_s = time.perf_counter(), None
        if self._first_s is None and not whole:
            self._first_s = now - self.begun_s
            metrics.ttft.observe(self._first_s)
            self.service.recent.first_token(self._first_s)
        elif new and not whole:
            apart_s = (now - self._last_s) / new
            metrics.itl.observe(apart_s)
        self.service.recent.tokens(new, apart_s)
        self._last_s = now

    def drop_flows(self) -> None:
        """Close what comes from the Tritons; what is not finished is cancelled there."""
        for flow in self.flows:
            flow.close()
        self.flows.clear()

    @property
    def used(self) -> CompletionUsage:
        """Tokens of prompts and answers so far."""
        return usage([self.answers[index] for index in sorted(self.answers)], self.prompts)

    def end(self, status: int, why: str | None = None) -> None:
        """The last byte has gone, or will never go; ``why`` it ended other than well, without a client's words."""
        if self._ended:
            return
        self._ended = True
        self.drop_flows()
        service, seconds, used = self.service, time.perf_counter() - self.begun_s, self.used
        if self._entered:
            service.admission.leave()
        if self._counted:
            service.doorkeeper.leave(self.key)
        service.recent.ended(failed=status >= 500 or why == "deadline" or "error" in self.facts)
        metrics = service.metrics
        metrics.requests.labels(self.route, status).inc()
        metrics.seconds.labels(self.route).observe(seconds)
        metrics.prompt_tokens.inc(used.prompt_tokens)
        metrics.answer_tokens.inc(used.completion_tokens)
        if why == "client gone":
            metrics.cancelled.inc()
        client = self.http.client.host if self.http.client else None
        service.log.write(
            "request",
            id=self.id,
            route=self.route,
            status=status,
            ended=why,
            client=client,
            key=self.key.name if self.key else None,
            prompt_tokens=used.prompt_tokens or None,
            completion_tokens=used.completion_tokens or None,
            finish=[answer.finish for answer in self.answers.values()] or None,
            ttft_ms=round(self._first_s * 1000, 1) if self._first_s is not None else None,
            ms=round(seconds * 1000, 1),
            **self.facts,
        )
