"""One Triton over HTTP: ask it, follow its answer, see whether it still generates.

aiohttp is the client because the base installation has it already (tritonclient brings it), it parses chunked answers
in C, and closing its response closes the connection at once, which is what cancels a request in Triton.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from toolchain.gateway.failures import ApiError, BusyError, SilentError, UnreachedError, UpstreamError, of_triton
from toolchain.gateway.settings import Timeouts, Upstream

_PROBE = {"text_input": "Hi", "max_tokens": 1, "stream": False}
_PROBE_S = 20.0
_LIVELY_S = 20.0
"""A Triton that gave a token to anyone within this time lives."""
_LONGEST_EVENT = 2**22
"""Bytes of one server-sent event; log probabilities of a long piece are the largest."""

Event = dict[str, Any]


@dataclass(frozen=True)
class Abilities:
    """What the model behind a Triton has."""

    inputs: frozenset[str]
    outputs: frozenset[str]
    requests: int
    """How many it takes at once, running and waiting."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Abilities:
        """From Triton's model configuration as JSON."""
        told = config.get("parameters", {}).get("max_concurrent_requests", {}).get("string_value", "")
        names = {kind: frozenset(str(one["name"]) for one in config.get(kind, ())) for kind in ("input", "output")}
        return cls(names["input"], names["output"], int(told) if told.isdigit() else 64)


class Flow:
    """One answer that has begun: the first event, then the others. ``close`` cancels what is still to come."""

    def __init__(self, triton: Triton, response: aiohttp.ClientResponse, first: Event | None, events: Events) -> None:
        self.triton = triton
        self.outputs = triton.abilities.outputs if triton.abilities else frozenset[str]()
        self._response, self._first, self._events = response, first, events
        self._open = True

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Raises UpstreamError when the answer is cut, ApiError when the model fails at it."""
        if self._first is None:
            return
        yield self._first
        while (event := await self._events.next(self.triton.timeouts.between_tokens_s)) is not None:
            yield event

    def failed(self, error: Exception) -> None:
        """The answer was cut: its Triton may be down."""
        self.triton.note(error)

    def close(self) -> None:
        if self._open:
            self._open = False
            self.triton.in_flight -= 1
            self._response.close()


class Events:
    """The server-sent events of one response of Triton."""

    def __init__(self, triton: Triton, response: aiohttp.ClientResponse) -> None:
        self._triton, self._response = triton, response

    async def next(self, timeout_s: float) -> Event | None:
        """The next event; None at the end. Raises what an error event means."""
        try:
            async with asyncio.timeout(timeout_s):
                while line := await self._response.content.readline():
                    if line.startswith(b"data:"):
                        event: Event = json.loads(line[5:])
                        if "error" in event:
                            raise of_triton(self._response.status, str(event["error"]))
                        self._triton.last_good_s = time.monotonic()
                        return event
        except TimeoutError:
            raise SilentError(f"nothing came from it for {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise UpstreamError(f"the answer was cut: {_words(error)}") from None
        return None


@dataclass(eq=False)
class Triton:
    """A Triton, and what is known of it. ``up``: it generated lately, and nothing has failed since."""

    upstream: Upstream
    model: str
    session: aiohttp.ClientSession
    timeouts: Timeouts
    abilities: Abilities | None = None
    up: bool = False
    why_down: str = "not asked yet"
    in_flight: int = 0
    restarts: int = 0
    """How often it came back after it had failed."""
    last_good_s: float = field(default=float("-inf"))
    probe_inputs: Mapping[str, Any] = field(default_factory=lambda: _PROBE)

    async def open(self, inputs: Mapping[str, Any]) -> Flow:
        """Send a request and wait for its first event. Raises ApiError, BusyError or UpstreamError."""
        self.in_flight += 1
        response = None
        try:
            response = await self._post("generate_stream", inputs, self.timeouts.first_token_s)
            events = Events(self, response)
            first = await events.next(self.timeouts.first_token_s)
            if response.status != 200:
                raise of_triton(response.status, f"HTTP {response.status} without a reason")
            return Flow(self, response, first, events)
        except BaseException:
            self.in_flight -= 1
            if response is not None:
                response.close()
            raise

    async def probe(self) -> bool:
        """Whether it generates a token; fills in ``abilities``, ``up`` and ``why_down``. To be full is no fault."""
        try:
            if self.abilities is None:
                self.abilities = Abilities.of(await self._get_json(f"/v2/models/{self.model}/config"))
            response = await self._post("generate", self.probe_inputs, _PROBE_S)
            response.close()
        except BusyError:
            pass
        except (UpstreamError, ApiError) as error:
            self.note(error)
            return self.up
        if not self.up and self.last_good_s > 0:
            self.restarts += 1
        self.up, self.last_good_s = True, time.monotonic()
        return True

    def note(self, error: Exception) -> None:
        """Something failed: nothing is sent to it until a probe succeeds. A new server may be another one. That one
        request waits too long, or for its connection, is no failure while others get their tokens.
        """
        if isinstance(error, SilentError | UnreachedError) and time.monotonic() - self.last_good_s < _LIVELY_S:
            return
        self.up, self.why_down, self.abilities = False, str(error), None

    async def metrics(self) -> str:
        """Its Prometheus text; empty where it cannot be had."""
        if self.upstream.metrics_url is None:
            return ""
        try:
            async with asyncio.timeout(self.timeouts.connect_s):
                async with self.session.get(self.upstream.metrics_url) as response:
                    return await response.text() if response.status == 200 else ""
        except (aiohttp.ClientError, OSError):  # TimeoutError is an OSError
            return ""

    async def _post(self, verb: str, inputs: Mapping[str, Any], timeout_s: float) -> aiohttp.ClientResponse:
        url = f"{self.upstream.http_url}/v2/models/{self.model}/{verb}"
        try:
            async with asyncio.timeout(timeout_s):
                response = await self.session.post(url, json=inputs)
                if response.status == 200:
                    return response
                text = (await response.content.read(2**16)).decode(errors="replace")
        except aiohttp.ConnectionTimeoutError:  # a TimeoutError too
            raise UnreachedError(f"no connection within {self.timeouts.connect_s:g} s") from None
        except TimeoutError:
            raise SilentError(f"no token within {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise UpstreamError(_words(error)) from None
        response.close()
        raise of_triton(response.status, _reason(text))

    async def _get_json(self, path: str) -> dict[str, Any]:
        try:
            async with (
                asyncio.timeout(self.timeouts.connect_s),
                self.session.get(self.upstream.http_url + path) as response,
            ):
                if response.status != 200:
                    raise UpstreamError(_reason(await response.text()))
                return dict(await response.json(content_type=None))
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise UpstreamError(_words(error)) from None


def make_session(timeouts: Timeouts) -> aiohttp.ClientSession:
    """Without a limit of connections and without the environment's proxies; deadlines are set by request."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=timeouts.connect_s),
        read_bufsize=_LONGEST_EVENT,
        trust_env=False,
    )


def _reason(text: str) -> str:
    """Triton's message in a JSON body or in an error event."""
    try:
        return str(json.loads(text.strip().removeprefix("data:"))["error"])
    except (ValueError, KeyError, TypeError):
        return text[:500]


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__
