"""A worker: the process in front of one Triton of this machine. Token ids in, token ids out.

It registers after the Triton has generated a token, takes itself back while it does not, and comes back after. On
SIGTERM it takes no new requests, lets those at work finish within the drain time, and hands over the others.
It knows nothing of text.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from toolchain.fleet import wire
from toolchain.fleet.plane import HEARTBEAT_S
from toolchain.fleet.worker.dialect import Spoken
from toolchain.fleet.worker.drafted import Drafted, DraftedFlow
from toolchain.fleet.worker.pieces import Piece, Waiting
from toolchain.gateway.failures import ApiError, BusyError, UpstreamError
from toolchain.gateway.settings import Timeouts, Upstream
from toolchain.gateway.triton import Flow, Triton

ENGINE_MODEL = "tensorrt_llm"
_PROBE = {"input_ids": [1, 1], "input_lengths": 2, "request_output_len": 1, "streaming": False}
_LOOK_DOWN_S = 0.3
"""Between two looks at a Triton that is down."""
_LOOK_UP_S = 5.0
"""The same for one that is up, while no token shows that it lives."""
_LOOK_AGAIN_S = 1.0
"""After a look, before a silent request leads to another one."""
_SILENCE_S = 20.0
"""A Triton that gave no token to anyone for so long hangs; a long prefill may take some of it."""
_BUSY_S = 1.0
"""How long a new request waits for room here before it is asked elsewhere; a continued one waits ``_SILENCE_S``."""
_ASK_AGAIN_S = 0.1
_WITHDRAW_S = 1.0
_SPREAD_S = 0.1
"""Until routers know that a worker has taken itself back."""


@dataclass(frozen=True)
class Spec:
    """What a worker is told."""

    endpoint: str
    discovery: str
    triton_url: str
    repository: str
    drain_s: float
    fingerprint: str = ""
    """Of the model that all replicas of the endpoint must have; see ``identity``."""
    state: str = ""
    """The file in which it says how it is."""
    replica: str = ""
    """Its name in the endpoint: what it generates is booked to it."""
    metrics_url: str = ""
    """Of its Triton."""
    status_file: str = ""
    """In which its engine writes what it is doing."""

    @classmethod
    def read(cls, file: Path) -> Spec:
        return cls(**json.loads(file.read_text(encoding="utf-8")))

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")


class Context(Protocol):
    """What is used of Dynamo's."""

    def is_stopped(self) -> bool:
        """Whether the client has gone."""


class LostError(Exception):
    """This worker cannot finish the request; another one may go on with it."""


class Adapter:
    """Requests of Dynamo -> requests of one Triton."""

    def __init__(
        self,
        triton: Triton,
        eos_ids: frozenset[int] = frozenset(),
        *,
        spoken: Spoken = dict,
        drafted: Drafted | None = None,
        replica: str = "",
    ) -> None:
        """``spoken``: newest names of inputs -> this engine's; ``drafted``: where there is a draft engine beside it."""
        self.triton, self.replica = triton, replica
        self.running = self.requests = self.tokens = 0
        """At work just now; taken, and generated, since its start."""
        self.leaving = asyncio.Event()
        """Set when the drain time is over: what still runs is handed over."""
        self.doubt = asyncio.Event()
        """Set when a look at the Triton is due."""
        self.withdrawn = asyncio.Event()
        """Set while no new requests come here, because the Triton is down."""
        self._eos_ids, self._spoken, self._drafted = eos_ids, spoken, drafted

    async def generate(self, found: Mapping[str, Any], context: Context) -> AsyncIterator[wire.Item]:
        """The items of one answer; the last one has a finish reason. Raises LostError."""
        ask = wire.ask_of(found)
        if ask.so_far and not ask.can_continue:
            yield wire.stuck("it follows a guide")
            return
        self.running += 1
        self.requests += 1
        events = Waiting()
        pump = asyncio.create_task(self._pump(ask, events))
        try:
            async for item in self._items(ask, events, context):
                yield item
        except ApiError as error:
            # it was taken once, so this is no mistake of the client's: with the tokens so far it is too long a prompt
            yield wire.stuck(error.message) if ask.so_far else _refusal(error)
        except BusyError as error:
            yield wire.refusal(429, str(error))
        except UpstreamError as error:
            self.triton.note(error)
            self.doubt.set()
            await self._withdraw()
            raise LostError(str(error)) from None
        finally:
            self.running -= 1
            pump.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await pump

    async def _items(self, ask: wire.Ask, waiting: Waiting, context: Context) -> AsyncIterator[wire.Item]:
        """Says at least every half second that it lives. Ends early when the client has gone."""
        left = ask.max_tokens
        ends = self._eos_ids if ask.end_id in self._eos_ids else frozenset({ask.end_id})
        yield wire.begun(self.replica)
        while not context.is_stopped():
            events = await waiting.take(HEARTBEAT_S)
            if not events:
                self._look_out()
            piece, finish = Piece(), None
            for event in events:
                if isinstance(event, Exception):
                    if piece.ids:
                        yield piece.item()
                    raise event
                count = piece.add(ask, event) if event is not None else 0
                left -= count
                self.tokens += count
                ended = "eos" if count and piece.ids[-1] in ends else "length" if left <= 0 else None
                finish = "stop" if event is None else ended
                if finish:
                    break
            yield piece.item(finish)
            if finish:
                return

    def _look_out(self) -> None:
        """While a request is silent. Raises LostError when this worker leaves, UpstreamError for a bad Triton."""
        if self.leaving.is_set():
            raise LostError("this worker ends")
        if not self.triton.up:
            raise UpstreamError(self.triton.why_down)
        if _quiet_s(self.triton) > _SILENCE_S:
            raise UpstreamError(f"no token came from it for {_SILENCE_S:g} s")
        self.doubt.set()

    async def _withdraw(self) -> None:
        """Before a request is handed over: else the router might send it here again."""
        if self.triton.up:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_WITHDRAW_S):
                await self.withdrawn.wait()
                await asyncio.sleep(_SPREAD_S)

    async def _pump(self, ask: wire.Ask, events: Waiting) -> None:
        """The Triton's events, as they come; then None, or what went wrong. Cancelled, it cancels in the Triton."""
        flow: Flow | DraftedFlow | None = None
        try:
            flow = await self._open(ask)
            async for event in flow:
                events.put(event)
                if self.leaving.is_set():
                    events.put(LostError("this worker ends"))
                    return
            events.put(None)
        except Exception as error:
            events.put(error)
        finally:
            if flow is not None:
                flow.close()

    async def _open(self, ask: wire.Ask) -> Flow | DraftedFlow:
        until = time.monotonic() + (_SILENCE_S if ask.so_far else _BUSY_S)
        inputs = self._spoken(wire.inputs(ask))
        while True:
            try:
                if self._drafted is not None and ask.draft_tokens:
                    return await self._drafted.open(ask)
                return await self.triton.open(inputs)
            except BusyError:
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(_ASK_AGAIN_S)

    async def look_after(self, on_change: Callable[[bool], Awaitable[None]]) -> None:
        """Looks at the Triton for ever, which was up at the beginning; ``on_change`` when it goes down or is back."""
        known = True
        while True:
            if not self.triton.up or self.doubt.is_set() or _quiet_s(self.triton) > _LOOK_UP_S:
                again = self.triton.up or not known  # one that was just found to be down is first taken back
                self.doubt.clear()
                if again:
                    await self.triton.probe()
            if self.triton.up != known:
                known = self.triton.up
                await on_change(known)
                self.withdrawn.clear() if known else self.withdrawn.set()
            if self.triton.up:
                await asyncio.sleep(_LOOK_AGAIN_S)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_UP_S):
                        await self.doubt.wait()
            else:
                await asyncio.sleep(_LOOK_DOWN_S)


def _refusal(error: ApiError) -> wire.Item:
    return wire.refusal(error.status, error.message, error.param, error.code)


def _quiet_s(triton: Triton) -> float:
    return time.monotonic() - triton.last_good_s


def make_triton(url: str, session: Any, timeouts: Timeouts, *, metrics_url: str = "", status_file: str = "") -> Triton:
    """The engine's own model behind one Triton; probed with one token of it."""
    upstream = Upstream(url, metrics_url or None, Path(status_file) if status_file else None)
    return Triton(upstream, ENGINE_MODEL, session, timeouts, probe_inputs=_PROBE)
