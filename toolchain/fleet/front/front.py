"""The gateway's way to an endpoint's replicas: text to ids and back, and what becomes of a request that is lost.

Dynamo routes (see ``routes``). What it cannot place at all is asked again here, before the first token and, with the
tokens so far, after it. Where the endpoint has been scaled to zero, a request waits for the replica that it wakes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from toolchain.fleet import wire
from toolchain.fleet.front.flow import Answering, FleetFlow
from toolchain.fleet.front.meter import Booking, Meter
from toolchain.fleet.front.routes import Routes
from toolchain.fleet.front.texts import TextAnswer, Texts
from toolchain.fleet.front.traffic import Course, Lane, Traffic, Use
from toolchain.fleet.front.view import View
from toolchain.fleet.plane import Plane
from toolchain.gateway.engines import Relayed
from toolchain.gateway.failures import ApiError, UpstreamError, too_many, unavailable
from toolchain.gateway.fleet_status import FleetStatus
from toolchain.gateway.service import MakeEngines
from toolchain.gateway.settings import Model, Settings
from toolchain.gateway.triton import Triton

_ATTEMPTS = 3
"""A request that was lost so often, by Dynamo's count each, may be what kills the engines."""
_LONG_TEXT = 8192
"""Characters from which a prompt is tokenized beside the event loop."""
_POLL_S = 0.1
_ASK_AGAIN_S = 0.1
_LOAD = """\
# HELP scalellm_fleet_tokens_in_flight Tokens of prompts and answers at work or waiting.
# TYPE scalellm_fleet_tokens_in_flight gauge
scalellm_fleet_tokens_in_flight {tokens}
# HELP scalellm_fleet_waiting_requests Requests for which no replica is there.
# TYPE scalellm_fleet_waiting_requests gauge
scalellm_fleet_waiting_requests {waiting}
"""


class _StuckError(UpstreamError):
    """The answer was lost, and nobody can go on with it in the middle."""


class _MovedError(UpstreamError):
    """New requests go to another lane by now, and this one has nobody left."""


class Fleet:
    """Satisfies ``gateway.engines.Engines``."""

    def __init__(
        self,
        plane: Plane,
        traffic: Traffic,
        settings: Settings,
        *,
        on_retry: Callable[[str, str], None],
        meter: Meter | None = None,
        view: View | None = None,
    ) -> None:
        self._endpoint, self._traffic = plane.endpoint, traffic
        self._routes = Routes(plane, traffic)
        self._meter, self._view = meter or Meter(None), view
        self._timeouts, self._queue_s = settings.timeouts, settings.limits.queue_s
        self._on_retry = on_retry

    tritons: tuple[Triton, ...] = ()
    """The workers ask them."""

    async def __aenter__(self) -> Self:
        await self._routes.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._routes.__aexit__()

    @property
    def ready(self) -> bool:
        """Whether a request is answered, be it after a replica has come for it."""
        course = self._traffic.course
        return course.asleep or self._routes.ready(course.target)

    @property
    def model(self) -> Model | None:
        """Of the version that new requests go to."""
        return self._traffic.course.lane.model

    @property
    def room(self) -> int:
        course = self._traffic.course
        return course.lane.room * max(1, course.replicas)

    @property
    def queue(self) -> int | None:
        return self._traffic.course.queue

    @property
    def states(self) -> dict[str, str]:
        course, routes = self._traffic.course, self._routes
        found = {
            f"{self._endpoint}/{worker:x}": ""
            for lane in course.lanes
            if routes.ready(lane)
            for worker in routes.workers(lane)
        }
        if not found and course.asleep:
            return {self._endpoint: ""}
        return found or {self._endpoint: "no replica generates"}

    async def metrics(self) -> Sequence[Relayed]:
        """The endpoint's own load, and each replica's figures, as its node tells them."""
        text = _LOAD.format(tokens=self._traffic.tokens, waiting=self._traffic.waiting)
        return [Relayed({"endpoint": self._endpoint}, text), *(await self._view.metrics() if self._view else ())]

    async def fleet(self) -> FleetStatus | None:
        """As its nodes tell of themselves; None where there is no board."""
        return await self._view.status() if self._view else None

    async def start(self, inputs: Mapping[str, Any]) -> FleetFlow:
        """The answers have begun when the first token of one of them is there. Raises ApiError."""
        while True:
            if not self._routes.ready(self._traffic.course.target):
                async with self.queued([inputs]):
                    await self._someone()
            lane = self._traffic.course.lane
            flow = await self._flow(lane, inputs)
            try:
                async with asyncio.timeout(self._timeouts.first_token_s):
                    await flow.begin()
                return flow
            except _MovedError:
                flow.close()
            except TimeoutError:
                flow.close()
                message = f"the engines are overloaded: no token within {self._timeouts.first_token_s:g} s"
                raise unavailable(message) from None
            except BaseException:
                flow.close()
                raise

    @contextlib.asynccontextmanager
    async def queued(self, asked: Sequence[Mapping[str, Any]]) -> AsyncGenerator[None, None]:
        """Counted as load from the first moment; their tokens as soon as a thread has counted them."""
        with contextlib.ExitStack() as uses:
            waiting = [(uses.enter_context(self._traffic.use(0)), inputs) for inputs in asked]
            counting = asyncio.create_task(self._count(waiting))
            try:
                yield
            finally:
                counting.cancel()

    async def _count(self, waiting: Sequence[tuple[Use, Mapping[str, Any]]]) -> None:
        texts = self._traffic.course.lane.texts
        for use, inputs in waiting:
            with contextlib.suppress(ApiError):  # it is refused when its turn comes
                asks = await asyncio.to_thread(texts.asks, inputs)
                use.add(sum(ask.prompt_tokens for ask in asks))

    async def _flow(self, lane: Lane, inputs: Mapping[str, Any]) -> FleetFlow:
        texts = lane.texts
        long = len(str(inputs.get("text_input", ""))) > _LONG_TEXT
        asks = await asyncio.to_thread(texts.asks, inputs) if long else texts.asks(inputs)
        answers = (texts.answer(ask, index, inputs) for index, ask in enumerate(asks))
        followed = (self.follow(lane.name, ask, answer) for ask, answer in zip(asks, answers, strict=True))
        return FleetFlow([Answering(events) for events in followed])

    async def _someone(self, lane: str | None = None) -> None:
        """Waits until a worker is there, of a lane or of that which new requests go to. Raises ApiError where none
        comes.
        """
        loop = asyncio.get_running_loop()
        if self._routes.ready(lane or self._traffic.course.target):
            return
        begun = loop.time()
        with self._traffic.wait():
            while not self._routes.ready(lane or self._traffic.course.target):
                if loop.time() - begun > self._traffic.course.patience_s(self._timeouts.patience_s):
                    raise unavailable("no replica of this endpoint generates")
                if lane not in (None, self._traffic.course.target):
                    raise _MovedError
                await asyncio.sleep(_POLL_S)

    async def follow(self, lane: str, ask: wire.Ask, answer: TextAnswer) -> AsyncGenerator[dict[str, Any], None]:
        """The events of one answer; asked again where Dynamo has given it up, with the tokens so far, or from its start
        where it cannot be continued and its client has seen nothing.
        """
        loop = asyncio.get_running_loop()
        full_until, lost = loop.time() + self._queue_s, 0
        nobody_since = loop.time()
        told = False
        booking = self._meter.booking(ask.prompt_tokens, counted=answer.index == 0)
        with self._traffic.use(ask.prompt_tokens) as use:
            while True:
                seen = _Seen(booking, use)
                try:
                    async with contextlib.aclosing(self._once(lane, ask, answer, seen)) as events:
                        async for event in events:
                            yield event
                    return
                except _MovedError:
                    raise
                except UpstreamError as error:
                    # a worker that has just died may be known for some seconds, and nobody takes the request
                    lost += seen.taken
                    nobody_since = loop.time() if seen.taken else nobody_since
                    if seen.taken or not told:
                        self._on_retry(self._endpoint, str(error))
                    told = not seen.taken
                    patience_s = self._traffic.course.patience_s(self._timeouts.patience_s)
                    given_up = lost >= _ATTEMPTS or loop.time() - nobody_since > patience_s
                    if given_up or not _goes_on(error, ask, answer):
                        raise _lost(error, answer, lost) from None
                except ApiError as error:
                    if error.status != 429 or loop.time() > full_until:
                        raise
                await asyncio.sleep(_ASK_AGAIN_S)

    async def _once(
        self, lane: str, ask: wire.Ask, answer: TextAnswer, seen: _Seen
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Asked once, for what is still to come. Raises UpstreamError, ApiError, _MovedError."""
        try:
            await self._someone(lane)
        except _MovedError:
            if answer.ids:
                raise UpstreamError("the version that gave it has ended") from None
            raise
        rest = replace(ask, ids=(*ask.ids, *answer.ids), max_tokens=ask.max_tokens - len(answer.ids))
        async with contextlib.aclosing(self._routes.items(lane, rest)) as items:
            async for item in items:
                if refused := wire.refused(item):
                    raise _StuckError(refused["message"]) if wire.is_stuck(refused) else _refusal(refused)
                seen.see(item)
                answer.metrics.update(wire.metrics_of(item))
                if item.get("token_ids"):
                    yield answer.push(item["token_ids"], item.get("log_probs"))
                if item.get("finish_reason") or answer.stopped:
                    yield answer.finish()
                    return
        raise UpstreamError("the answer ended early")


class _Seen:
    """What one asking has brought."""

    def __init__(self, booking: Booking, use: Use) -> None:
        self._booking, self._use = booking, use
        self.taken = False
        """Whether a worker took it."""

    def see(self, item: wire.Item) -> None:
        self.taken = True
        self._booking.see(item)
        self._use.add(len(item.get("token_ids") or ()))


def steered(plane: Plane, traffic: Traffic, meter: Meter | None = None, view: View | None = None) -> MakeEngines:
    """What a ``gateway.service.Service`` is given to stand in front of an endpoint. ``traffic`` is steered by its head;
    ``meter`` is told whose tokens it got; ``view`` shows the nodes.
    """

    def make(settings: Settings, on_retry: Callable[[str, str], None]) -> Fleet:
        return Fleet(plane, traffic, settings, on_retry=on_retry, meter=meter, view=view)

    return make


def engines(plane: Plane, texts: Texts, room: int, meter: Meter | None = None, view: View | None = None) -> MakeEngines:
    """The same for replicas that nobody steers: all requests go to the lane of the plane. ``room``: of all together."""
    lane = Lane(plane.endpoint, texts, room)
    return steered(plane, Traffic(Course({lane.name: lane}, lane.name)), meter, view)


def _goes_on(error: UpstreamError, ask: wire.Ask, answer: TextAnswer) -> bool:
    """Whether an answer that was lost can be asked for again; it is emptied where it must be from the beginning."""
    if not answer.ids or (ask.can_continue and not isinstance(error, _StuckError)):
        return True
    if not answer.told:
        answer.begin()
        return True
    return False


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
