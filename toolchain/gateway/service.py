"""From a request to its answer: key, body, place, Triton, pieces; and what is counted and logged on the way."""

from __future__ import annotations

import asyncio
import functools
import json
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from toolchain.gateway.admission import Admission
from toolchain.gateway.answers import Piece, Shape, read_event
from toolchain.gateway.asking import Request
from toolchain.gateway.bodies import parse_json
from toolchain.gateway.connection import EventStream, GoneError, read_bytes, unless_gone
from toolchain.gateway.engines import AnswerFlow, Engines
from toolchain.gateway.failures import ApiError, BusyError, UpstreamError, broken, unavailable
from toolchain.gateway.keys import Doorkeeper
from toolchain.gateway.logs import Log
from toolchain.gateway.metrics import Metrics
from toolchain.gateway.pool import Pool
from toolchain.gateway.recent import Recent
from toolchain.gateway.settings import Model, Settings
from toolchain.gateway.stops import Cut
from toolchain.gateway.triton import Triton, make_session
from toolchain.gateway.visit import Visit

_WHOLE_ATTEMPTS = 3
"""For an answer that is given as a whole: the client has seen nothing of one that was lost."""

MakeEngines = Callable[[Settings, Callable[[str, str], None]], Engines]
"""Settings and what is called with (name, why) when a request is asked again -> what is behind a gateway."""

Work = Callable[[dict[str, Any], Visit], Awaitable[Response]]
Refuse = Callable[[ApiError], Response]


class Service:
    """Everything behind the doors. ``async with``: from its start to its end."""

    def __init__(self, settings: Settings, log: Log | None = None, engines: MakeEngines | None = None) -> None:
        """``engines``: what is behind it, where that is not the Tritons of the settings."""
        self.settings = settings
        self._make_engines = engines or self._tritons
        self.log = log or Log()
        self.metrics, self.recent = Metrics(), Recent()
        self.doorkeeper = Doorkeeper(settings.keys)
        limits = settings.limits
        self.admission = Admission(lambda: limits.max_running or self.pool.room, lambda: self.max_queue, limits.queue_s)
        self.metrics.running.set_function(lambda: self.admission.running)
        self.metrics.waiting.set_function(lambda: self.admission.waiting)
        self.pool: Engines

    @property
    def model(self) -> Model:
        """That is served just now."""
        return self.pool.model or self.settings.model

    @property
    def max_queue(self) -> int:
        """How many requests may wait for a place just now."""
        told = self.pool.queue
        return self.settings.limits.max_queue if told is None else told

    async def __aenter__(self) -> Service:
        self.pool = self._make_engines(self.settings, self._note_retry)
        await self.pool.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.pool.__aexit__()

    def _tritons(self, settings: Settings, on_retry: Callable[[str, str], None]) -> Engines:
        session = make_session(settings.timeouts)
        tritons = [
            Triton(upstream, settings.model.triton_model, session, settings.timeouts) for upstream in settings.upstreams
        ]
        for triton in tritons:
            self.metrics.up.labels(triton.upstream.http_url).set_function(functools.partial(_is_up, triton))
        return Pool(tritons, settings.timeouts, session, queue_s=settings.limits.queue_s, on_retry=on_retry)

    async def visit(self, http: HttpRequest, route: str, work: Work, refuse: Refuse | None = None) -> Response:
        """A request with a body -> its answer; a failure -> OpenAI's error object, or what ``refuse`` makes of it."""
        visit = Visit(self, http, route)
        failure: ApiError | None = None
        try:
            response = await self._work(visit, work)
        except GoneError:
            response = Response(status_code=499)
        except Exception as error:
            failure = self.failure(visit, error)
            response = (refuse or error_response)(failure)
        response.headers["X-Request-Id"] = visit.id
        if not isinstance(response, EventStream):
            gone = "client gone" if response.status_code == 499 else None
            visit.end(response.status_code, for_the_log(failure) if failure else gone)
        return response

    def failure(self, visit: Visit, error: Exception) -> ApiError:
        """What a client is told of an exception; of one that nobody foresaw, only that it is in the log."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, (UpstreamError, BusyError)):
            return unavailable(f"the engine's server failed: {error}")
        if isinstance(error, TimeoutError):
            return too_late()
        self.log.write("bug", id=visit.id, route=visit.route, traceback="".join(traceback.format_exception(error)))
        return ApiError(500, "an error of this gateway; its log has the details", kind="server_error")

    async def _work(self, visit: Visit, work: Work) -> Response:
        settings = self.settings
        visit.key = self.doorkeeper.admit(visit.http.headers.get("authorization"))
        if visit.key is None:
            refuse_other_sites(visit.http)
        raw = await read_bytes(visit.http, most=settings.limits.max_body_bytes, timeout_s=settings.timeouts.body_s)
        if settings.log_prompts:
            visit.facts["body"] = raw.decode(errors="replace")

        async def begin() -> Response:
            return await work(parse_json(raw), visit)

        async with asyncio.timeout_at(visit.deadline):
            return await unless_gone(visit.http.receive, begin())

    async def whole(
        self, visit: Visit, requests: Sequence[Request], shape: Shape, media_type: str = "application/json"
    ) -> Response:
        """All of the answer in one piece. An answer that was lost on the way is made again."""
        visit.prompts = len(requests)
        await visit.enter(*(request.inputs for request in requests))
        for attempt in range(1, _WHOLE_ATTEMPTS + 1):
            try:
                visit.answers.clear()
                async for piece in self._pieces(visit, requests):
                    visit.see(piece)
                break
            except UpstreamError as error:
                visit.drop_flows()
                if attempt == _WHOLE_ATTEMPTS:
                    raise unavailable(f"the engine's server failed {attempt} times: {error}") from None
        answers = [visit.answers[index] for index in sorted(visit.answers)]
        return Response(shape.whole(answers, visit.used), media_type=media_type)

    async def stream(
        self, visit: Visit, requests: Sequence[Request], shape: Shape, *, include_usage: bool = False
    ) -> Response:
        """The answer as it is made. Its first piece is here before this returns, so that failure until then has an
        HTTP status of its own.
        """
        visit.prompts = len(requests)
        await visit.enter(*(request.inputs for request in requests))
        pieces = self._pieces(visit, requests)
        first = await anext(pieces)
        visit.see(first)
        visit.facts["stream"] = True
        events = self._events(visit, requests, shape, first, pieces, include_usage)
        timeouts = self.settings.timeouts
        return EventStream(
            events,
            deadline=visit.deadline,
            write_s=timeouts.write_s,
            late=_error_event(too_late()),
            on_end=lambda why: visit.end(200, why),
        )

    async def _events(
        self,
        visit: Visit,
        requests: Sequence[Request],
        shape: Shape,
        first: Piece,
        pieces: AsyncIterator[Piece],
        include_usage: bool,
    ) -> AsyncGenerator[bytes, None]:
        try:
            yield shape.opening(range(sum(request.answers for request in requests)))
            yield shape.piece(first)
            async for piece in pieces:
                visit.see(piece)
                if text := shape.piece(piece):
                    yield text
            yield shape.closing(visit.used if include_usage else None)
        except (UpstreamError, BusyError, ApiError) as error:
            visit.facts["error"] = str(error)
            told = error if isinstance(error, ApiError) else broken(f"the answer ends here: {error}")
            yield _error_event(told)

    async def _pieces(self, visit: Visit, requests: Sequence[Request]) -> AsyncIterator[Piece]:
        """The pieces of all requests' answers as they come; request k's answers are numbered behind those of k - 1."""
        starts = [self.pool.start(request.inputs) for request in requests]
        begun = await asyncio.gather(*(self._begin(visit, start) for start in starts), return_exceptions=True)
        for failure in begun:
            if isinstance(failure, BaseException):
                raise failure
        flows = [flow for flow in begun if not isinstance(flow, BaseException)]
        first = 0
        sources = []
        for flow, request in zip(flows, requests, strict=True):
            sources.append(self._follow(flow, request, first))
            first += request.answers
        async for piece in merged(sources):
            yield piece

    @staticmethod
    async def _begin(visit: Visit, start: Awaitable[AnswerFlow]) -> AnswerFlow:
        flow = await start
        visit.flows.append(flow)
        return flow

    async def _follow(self, flow: AnswerFlow, request: Request, first_index: int) -> AsyncGenerator[Piece, None]:
        """One flow's pieces; closed when all its answers have ended. Raises UpstreamError where one has no end."""
        tells = "finish_reason" in flow.outputs
        open_answers = {first_index + index: Cut(request.stops) for index in range(request.answers)}
        tokens = dict.fromkeys(open_answers, 0)
        try:
            async for event in flow:
                piece = read_event(event, self.model, first_index)
                if piece.index not in open_answers:
                    continue
                piece = open_answers[piece.index].push(piece)
                tokens[piece.index] = piece.answer_tokens
                if piece.finish:
                    del open_answers[piece.index]
                yield piece
                if not open_answers:
                    break
            if open_answers and tells:
                raise UpstreamError("the answer ended early")
        except UpstreamError as error:
            flow.failed(error)
            raise
        for index, cut in open_answers.items():  # a repository from before there was a finish_reason
            full = tokens[index] >= request.inputs["max_tokens"]
            yield cut.push(Piece(index, "", finish="length" if full else "stop"))
        flow.close()

    def _note_retry(self, name: str, why: str) -> None:
        self.metrics.retries.inc()
        self.log.write("triton lost", triton=name, why=why)


async def merged(sources: Sequence[AsyncGenerator[Piece, None]]) -> AsyncIterator[Piece]:
    """What comes from several sources, as it comes; the first failure ends it."""
    if len(sources) == 1:
        async for piece in sources[0]:
            yield piece
        return
    queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue(len(sources))

    async def pour(source: AsyncGenerator[Piece, None]) -> None:
        try:
            async for piece in source:
                await queue.put(piece)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(pour(source)) for source in sources]
    try:
        left = len(sources)
        while left:
            one = await queue.get()
            if isinstance(one, BaseException):
                raise one
            if one is None:
                left -= 1
            else:
                yield one
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _is_up(triton: Triton) -> float:
    return float(triton.up)


def too_late() -> ApiError:
    """504: the deadline has passed."""
    return ApiError(504, "the request took too long", kind="server_error", code="timeout")


def _error_event(error: ApiError) -> bytes:
    return b"data: " + json.dumps(error.body()).encode() + b"\n\n"


def for_the_log(failure: ApiError) -> str:
    """A client's mistakes by their code: the message may quote what the client wrote."""
    return failure.message if failure.status >= 500 else failure.code or failure.kind


def refuse_other_sites(http: HttpRequest) -> None:
    """Where no key is asked for, no page of another site may ask through the browser of who sits here: browsers say
    with ``Origin`` where a page came from. Raises ApiError (403).
    """
    origin = http.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != http.headers.get("host"):
        raise ApiError(403, "pages of other sites may not ask here without an API key", code="cross_site")


def error_response(error: ApiError) -> Response:
    """OpenAI's error object with its HTTP status."""
    text = json.dumps(error.body(), ensure_ascii=False).encode(errors="replace")
    return Response(text, status_code=error.status, headers=error.headers(), media_type="application/json")
