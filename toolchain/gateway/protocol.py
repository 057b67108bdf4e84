"""uvicorn's HTTP/1.1 with a deadline for a request's head: without one, clients that send nothing hold connections.

And with an answer of the same form as all others for what is not HTTP at all.
"""

from __future__ import annotations

import asyncio
import json
import sys
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from toolchain.gateway.failures import ApiError

HEAD_S = 15.0
"""From a connection's beginning, or a request's first byte, to the end of its head."""
PLAIN: dict[str, Any] = {
    "log_config": None,
    "access_log": False,
    "lifespan": "off",
    "ws": "none",
    "proxy_headers": False,
    "server_header": False,
}
"""What all our servers tell uvicorn: nothing of its own in log or headers, no word of a proxy believed."""
HEAD_BYTES = 64 * 1024
"""Of a request's head, at most."""


class Pieces(h11.Connection):
    """Writes a piece of an answer of unknown length itself, in less than half the time: h11 follows its states for each
    one, which does not change them.
    """

    _in_pieces = False

    def send(self, event: h11.Event) -> bytes | None:  # type: ignore[override]
        if self._in_pieces and type(event) is h11.Data and event.data and self.our_state is h11.SEND_BODY:
            return b"%x\r\n%b\r\n" % (len(event.data), event.data)
        found = super().send(event)
        if type(event) is h11.Response:
            self._in_pieces = b"\r\ntransfer-encoding: chunked\r\n" in (found or b"").lower()
        return found


class Patient(H11Protocol):
    """Closes a connection whose request's head does not come within ``head_s``."""

    head_s = HEAD_S

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = Pieces(h11.SERVER, self.config.h11_max_incomplete_event_size or HEAD_BYTES)
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Called while h11's error is being handled, which says what is wrong: 431 for a head that is too large, else
        400. In the middle of an answer nothing can be said any more.
        """
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(sys.exc_info()[1], msg)
        self.transport.close()

    def _refuse(self, error: BaseException | None, otherwise: str) -> None:
        status = getattr(error, "error_status_hint", 400)
        failure = ApiError(status if 400 <= status < 500 else 400, f"this is no valid HTTP: {error or otherwise}")
        body = json.dumps(failure.body()).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        reason = HTTPStatus(failure.status).phrase.encode()
        head = h11.Response(status_code=failure.status, headers=list(headers.items()), reason=reason)
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")

    def _watch(self) -> None:
        """Sets the timer when a head begins, and takes it away when it has come; more bytes do not set it again."""
        if self.conn.their_state is not h11.IDLE:
            self._forget()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_s, self._give_up)

    def _forget(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()
