"""The gateway's way to an endpoint's workers: Dynamo's router inside the gateway's own process.

Dynamo chooses the least loaded worker and continues a request on another one when its worker is lost or silent. What it
cannot place at all is asked again here, before the first token and, with the tokens so far, after it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from toolchain.fleet import wire
from toolchain.fleet.meter import Meter
from toolchain.fleet.plane import MIGRATIONS, Plane
from toolchain.fleet.texts import OUTPUTS, TextAnswer, Texts
from toolchain.fleet.view import View
from toolchain.gateway.engines import Relayed
from toolchain.gateway.failures import ApiError, UpstreamError, too_many, unavailable
from toolchain.gateway.fleet_status import FleetStatus
from toolchain.gateway.service import MakeEngines
from toolchain.gateway.settings import Settings
from toolchain.gateway.triton import Triton

_ATTEMPTS = 3
"""A request that was lost so often, by Dynamo's count each, may be what kills the engines."""
_LONG_TEXT = 8192
"""Characters from which a prompt is tokenized beside the event loop."""
_POLL_S = 0.1
_END_S = 1.0
"""For Dynamo to end, after nothing runs any more."""
_ASK_AGAIN_S = 0.1


class Fleet:
    """Satisfies ``gateway.engines.Engines``."""

    def __init__(
        self,
        plane: Plane,
        texts: Texts,
        settings: Settings,
        *,
        room: int,
        on_retry: Callable[[str, str], None],
        meter: Meter | None = None,
        view: View | None = None,
    ) -> None:
        self._plane, self._texts, self._room = plane, texts, room
        self._meter, self._view = meter or Meter(None), view
        self._timeouts, self._queue_s = settings.timeouts, settings.limits.queue_s
        self._on_retry = on_retry
        self._routed: Any = None
        """Dynamo's engine: router and migration; None until the first worker has registered."""
        self._client: Any = None
        self._task: asyncio.Future[Any] | None = None
        self._runtime: Any = None

    tritons: tuple[Triton, ...] = ()
    """The workers ask them."""

    async def __aenter__(self) -> Self:
        self._runtime = self._plane.runtime()
        from dynamo.llm import EngineType, EntrypointArgs, RouterConfig, RouterMode, make_engine, run_input

        self._client = await self._runtime.endpoint(self._plane.path).client()
        arguments = EntrypointArgs(
            EngineType.Dynamic,
            http_host="127.0.0.1",
            http_port=0,
            router_config=RouterConfig(RouterMode.LeastLoaded),
            migration_limit=MIGRATIONS,
            chat_engine_factory=self._found,
        )
        engine = await make_engine(self._runtime, arguments)
        self._task = asyncio.ensure_future(run_input(self._runtime, "http", engine, []))
        return self

    async def _found(self, _instance: Any, card: Any, routed: Any) -> Any:
        """Called by Dynamo when the first worker has come."""
        from dynamo.llm import PythonAsyncEngine

        if card.name() == self._plane.endpoint:
            self._routed = routed

        async def unused(_request: Any, context: Any = None) -> AsyncIterator[Any]:
            raise UpstreamError("ask the gateway")
            yield context

        return PythonAsyncEngine(unused, asyncio.get_running_loop())

    async def __aexit__(self, *_: object) -> None:
        self._runtime.shutdown()
        if self._task is not None:
            with contextlib.suppress(Exception, asyncio.CancelledError):
                async with asyncio.timeout(_END_S):
                    await self._task

    @property
    def ready(self) -> bool:
        """Whether a worker is there: each has generated a token before it came."""
        return self._routed is not None and bool(self._workers)

    @property
    def _workers(self) -> list[int]:
        """The instances that take requests just now."""
        return sorted(self._client.instance_ids()) if self._client is not None else []

    @property
    def room(self) -> int:
        return self._room

    @property
    def states(self) -> dict[str, str]:
        if self.ready:
            return {f"{self._plane.endpoint}/{worker:x}": "" for worker in self._workers}
        return {self._plane.endpoint: "no replica generates"}

    async def metrics(self) -> Sequence[Relayed]:
        """Each replica's, as its node tells them."""
        return await self._view.metrics() if self._view else ()

    async def fleet(self) -> FleetStatus | None:
        """As its nodes tell of themselves; None where there is no board."""
        return await self._view.status() if self._view else None

    async def start(self, inputs: Mapping[str, Any]) -> FleetFlow:
        """The answers have begun when the first token of one of them is there. Raises ApiError."""
        long = len(str(inputs.get("text_input", ""))) > _LONG_TEXT
        asks = await asyncio.to_thread(self._texts.asks, inputs) if long else self._texts.asks(inputs)
        answers = (self._texts.answer(ask, index, inputs) for index, ask in enumerate(asks))
        flow = FleetFlow([Answering(self, ask, answer) for ask, answer in zip(asks, answers, strict=True)])
        try:
            async with asyncio.timeout(self._timeouts.first_token_s):
                await flow.begin()
        except TimeoutError:
            flow.close()
            message = f"the engines are overloaded: no token within {self._timeouts.first_token_s:g} s"
            raise unavailable(message) from None
        except BaseException:
            flow.close()
            raise
        return flow

    async def items(self, ask: wire.Ask) -> AsyncGenerator[wire.Item, None]:
        """The items of one answer, as Dynamo gives them. Raises UpstreamError where it gives up, ApiError where the
        engine refuses.
        """
        await self._someone()
        try:
            stream = await self._routed.generate(wire.request(ask, self._plane.endpoint))
            async for found in stream:
                if found.is_error():
                    raise UpstreamError("; ".join(found.comments() or ["Dynamo gives no reason"]))
                item = found.data() or {}
                if told := wire.refused(item):
                    raise _refusal(told)
                yield item
        except (ApiError, UpstreamError, asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:  # of Dynamo's own kinds
            raise UpstreamError(str(error) or type(error).__name__) from None

    async def _someone(self) -> None:
        """Waits until a worker is there. Raises ApiError where none comes."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._timeouts.patience_s
        while not self.ready:
            if loop.time() > until:
                raise unavailable("no replica of this endpoint generates")
            await asyncio.sleep(_POLL_S)

    async def follow(self, ask: wire.Ask, answer: TextAnswer) -> AsyncIterator[dict[str, Any]]:
        """The events of one answer; asked again where Dynamo has given it up, with the tokens so far."""
        loop = asyncio.get_running_loop()
        full_until, lost = loop.time() + self._queue_s, 0
        nobody_until = loop.time() + self._timeouts.patience_s
        told = False
        booking = self._meter.booking(ask.prompt_tokens, counted=answer.index == 0)
        while True:
            taken = False
            rest = replace(ask, ids=(*ask.ids, *answer.ids), max_tokens=ask.max_tokens - len(answer.ids))
            try:
                async with contextlib.aclosing(self.items(rest)) as items:
                    async for item in items:
                        taken = True
                        booking.see(item)
                        if item.get("token_ids"):
                            yield answer.push(item["token_ids"], item.get("log_probs"), wire.metrics_of(item))
                        if item.get("finish_reason") or answer.stopped:
                            yield answer.finish()
                            return
                raise UpstreamError("the answer ended early")
            except UpstreamError as error:
                lost += taken  # a worker that has just died may be known for some seconds, and nobody takes the request
                nobody_until = loop.time() + self._timeouts.patience_s if taken else nobody_until
                if taken or not told:
                    self._on_retry(self._plane.endpoint, str(error))
                told = not taken
                given_up = lost >= _ATTEMPTS or loop.time() > nobody_until
                if given_up or (answer.ids and not ask.can_continue):
                    raise _lost(error, answer, lost) from None
            except ApiError as error:
                if error.status != 429 or loop.time() > full_until:
                    raise
            await asyncio.sleep(_ASK_AGAIN_S)


class Answering:
    """One answer: its events, begun once."""

    def __init__(self, fleet: Fleet, ask: wire.Ask, answer: TextAnswer) -> None:
        self._events = fleet.follow(ask, answer)
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
            await self._events.aclose()  # type: ignore[attr-defined]

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


def engines(plane: Plane, texts: Texts, room: int, meter: Meter | None = None, view: View | None = None) -> MakeEngines:
    """What a ``gateway.service.Service`` is given to stand in front of an endpoint. ``meter`` is told whose tokens it
    got; ``view`` shows the nodes.
    """

    def make(settings: Settings, on_retry: Callable[[str, str], None]) -> Fleet:
        return Fleet(plane, texts, settings, room=room, on_retry=on_retry, meter=meter, view=view)

    return make


def _refusal(told: Mapping[str, Any]) -> ApiError:
    if told["status"] == 429:
        return too_many("the engines have no room for another request just now", retry_after_s=1, code="overloaded")
    kind = "invalid_request_error" if told["status"] < 500 else "server_error"
    return ApiError(int(told["status"]), str(told["message"]), kind=kind, param=told["param"], code=told["code"])


def _lost(error: UpstreamError, answer: TextAnswer, times: int) -> Exception:
    """In the middle of an answer the gateway tells the client itself; before, it is a 503."""
    if answer.ids:
        return error
    return unavailable(f"the engines failed {times} times: {error}")
