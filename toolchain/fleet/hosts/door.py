"""The head's door: HTTPS on a port of its own, at which a machine with a token becomes a node.

It gives the authority's certificate to anybody, and a node's certificate for a good token, or for the node's present
one. It keeps requests small and few, says nothing of why a token is not good, and knows nothing of replicas.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from toolchain.errors import EndpointError, RejectedError, ScalellmError
from toolchain.fleet.hosts.network import Guests
from toolchain.gateway.protocol import PLAIN
from toolchain.progress import Progress

MOST_BYTES = 16 * 1024
"""Of a request's body, and of its head."""
_BODY_S = 10
_START_S = 10.0
_TRIES, _TRIES_S = 10, 60.0
"""So many requests of one address in so many seconds; more get 429."""
_ADDRESSES = 4096
_AT_ONCE = 32
Work = Callable[[Mapping[str, str]], dict[str, object]]
"""What is asked -> what is given. Raises ScalellmError."""


class Tries:
    """Counts what each address asks. The oldest of too many addresses are forgotten."""

    def __init__(self, most: int = _TRIES, in_s: float = _TRIES_S) -> None:
        self._most, self._in_s = most, in_s
        self._times: OrderedDict[str, list[float]] = OrderedDict()

    def take(self, address: str, now_s: float) -> bool:
        """Whether it may ask once more."""
        recent = [one for one in self._times.pop(address, []) if now_s - one < self._in_s]
        allowed = len(recent) < self._most
        self._times[address] = [*recent, now_s] if allowed else recent
        while len(self._times) > _ADDRESSES:
            self._times.popitem(last=False)
        return allowed


class Door:
    """Its three requests."""

    def __init__(self, guests: Guests, progress: Progress) -> None:
        self._guests, self._progress, self._tries = guests, progress, Tries()

    @property
    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/authority", self._authority),
                Route("/join", self._join, methods=["POST"]),
                Route("/renew", self._renew, methods=["POST"]),
            ],
        )

    async def _authority(self, _request: Request) -> Response:
        return PlainTextResponse(self._guests.authority.pem)

    async def _join(self, request: Request) -> Response:
        return await self._answer(request, ("node", "token", "secret", "request"), self._let_in, "has joined")

    async def _renew(self, request: Request) -> Response:
        names = ("node", "password", "certificate", "request")
        return await self._answer(request, names, self._again, "has a new certificate")

    async def _answer(self, request: Request, names: Sequence[str], work: Work, done: str) -> Response:
        address = request.client.host if request.client else ""
        if not self._tries.take(address, time.monotonic()):
            return _refusal(429, "too many requests; wait a minute")
        try:
            asked = await _body(request, names)
            found = await asyncio.to_thread(work, asked)
        except RejectedError as error:
            self._progress.note(f"the door refused {address}: {error.message}")
            return _refusal(403, error.message)
        except ScalellmError as error:
            self._progress.note(f"the door could not let {address} in: {error.message}")
            return _refusal(503, "the head cannot let anyone in just now")
        self._progress.note(f"{found['node']} {done}, from {address}")
        return JSONResponse(found)

    def _let_in(self, asked: Mapping[str, str]) -> dict[str, object]:
        with self._guests.tokens.spending(asked["token"], asked["secret"]):
            return self._guests.let_in(asked["node"], asked["request"].encode())

    def _again(self, asked: Mapping[str, str]) -> dict[str, object]:
        papers = (asked[name].encode() for name in ("certificate", "request"))
        return self._guests.renew(asked["node"], asked["password"], *papers)


async def _body(request: Request, names: Sequence[str]) -> dict[str, str]:
    """A small JSON object of texts. Raises RejectedError."""
    raw = b""
    try:
        async with asyncio.timeout(_BODY_S):
            async for piece in request.stream():
                raw += piece
                if len(raw) > MOST_BYTES:
                    raise RejectedError("the request is too long")
        found = json.loads(raw)
    except (TimeoutError, ValueError, RecursionError):
        raise RejectedError("the request cannot be understood") from None
    if not isinstance(found, dict) or not all(isinstance(found.get(name), str) for name in names):
        raise RejectedError(f"the request needs {', '.join(names)}")
    return {name: found[name] for name in names}


def _refusal(status: int, message: str) -> Response:
    return JSONResponse({"message": message}, status)


@contextmanager
def opened(guests: Guests, progress: Progress) -> Iterator[None]:
    """The door, in a thread, for the length of a ``with`` block. Raises EndpointError."""
    at = guests.addresses
    config = uvicorn.Config(
        Door(guests, progress).app,
        host=at.host,
        port=at.door,
        ssl_certfile=guests.server.certificate,
        ssl_keyfile=guests.server.key,
        **PLAIN,
        limit_concurrency=_AT_ONCE,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=MOST_BYTES,
    )
    server = uvicorn.Server(config)

    def work() -> None:
        try:
            server.run()
        except SystemExit:  # uvicorn's way of saying that the port cannot be had; it has logged why
            return

    thread = threading.Thread(target=work, name="door", daemon=True)
    thread.start()
    until = time.monotonic() + _START_S
    while not server.started:
        if not thread.is_alive() or time.monotonic() > until:
            raise EndpointError(f"the door cannot be opened at {at.host}:{at.door}", hint="network.door: another port")
        time.sleep(0.01)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()
