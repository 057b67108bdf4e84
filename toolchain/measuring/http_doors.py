"""Sessions over HTTP: Triton's generate_stream, OpenAI's API, ``/predict``. One connection each, kept open."""

from __future__ import annotations

import http.client
import json
import select
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from toolchain.errors import EndpointError, RejectedError, ScalellmError
from toolchain.measuring.doors import ACCEPTED, CONNECT_S, DRAFTED, Door, Piece, Session, page, short, triton_inputs

_HANGS_UP_S = 0.02
"""A server that hangs up after an answer without having said so does it within this; waited for once in a session."""


def http_session(door: Door) -> Session:
    """EndpointError when nobody is there."""
    return {"triton-http": _TritonHttp, "predict": _Predict}.get(door.kind, _OpenAI)(door)


class _Http:
    """One kept HTTP connection; subclasses say what is posted and what an event holds."""

    def __init__(self, door: Door) -> None:
        self.door = door
        parts = urlsplit(door.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EndpointError(f"{door.url!r} is no address", hint="write it as http://127.0.0.1:8000")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.hostname, parts.port, timeout=CONNECT_S)
        self._base = parts.path.rstrip("/")
        self._keeps: bool | None = None
        """Whether the server keeps a connection after an answer; None: not yet seen."""
        self._used = False
        self._connect()

    def path(self) -> str:
        raise NotImplementedError

    def body(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        raise NotImplementedError

    def text_of(self, event: Mapping[str, Any]) -> tuple[str, int | None]:
        """(text, tokens so far) of one event or of a whole answer."""
        raise NotImplementedError

    def ask(self, prompt: str, max_tokens: int, sent: Callable[[], None]) -> Iterator[Piece]:
        payload = json.dumps({**self.body(prompt, max_tokens), **self.door.extra}).encode()
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream, application/json"}
        if self.door.key:
            headers["Authorization"] = f"Bearer {self.door.key}"
        self._connect()
        finished = False
        try:
            sent()
            self._used = True
            self._connection.request("POST", self.path(), payload, headers)
            response = self._connection.getresponse()
            if response.status != 200:
                raise _refusal(response.status, response.read())
            yield from self._pieces(response)
            finished = True
        except TimeoutError:
            raise EndpointError(f"nothing came for {self.door.timeout_s:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            raise EndpointError(f"the connection was cut: {type(error).__name__}") from None
        except ValueError:
            raise EndpointError("the server sent what is not JSON") from None
        finally:
            if not finished:
                self._connection.close()

    def close(self) -> None:
        self._connection.close()

    def _connect(self) -> None:
        """Also again, when the server hung up on an idle connection.

        llama.cpp's server promises to keep a connection and closes it after each streamed answer, at times only when
        the next request is on its way. Where that was seen, each request has a connection of its own.
        """
        connection = self._connection
        if connection.sock is not None:
            first = self._used and self._keeps is None
            hung_up = bool(select.select([connection.sock], [], [], _HANGS_UP_S if first else 0)[0])
            if first:
                self._keeps = not hung_up
            if hung_up or self._keeps is False:
                connection.close()
        if connection.sock is None:
            try:
                connection.timeout = CONNECT_S
                connection.connect()
            except OSError as error:
                raise EndpointError(f"{self.door.url}: {error.strerror or error}", hint="is it served?") from None
            if connection.sock is not None:
                connection.sock.settimeout(self.door.timeout_s)

    def _pieces(self, response: http.client.HTTPResponse) -> Iterator[Piece]:
        if "event-stream" not in response.getheader("Content-Type", ""):
            text, tokens = self.text_of(json.loads(response.read()))
            yield Piece(text, time.perf_counter(), tokens, whole=True)
            return
        ended = False
        for at_s, data in _events(response):
            if data == b"[DONE]":
                ended = True
                continue
            event = json.loads(data)
            if "error" in event:
                raise _refusal(200, data)
            text, tokens = self.text_of(event)
            yield Piece(text, at_s, tokens, drafts=self.drafts_of(event))
        if self.must_say_done() and not ended:
            raise EndpointError("the stream ended without [DONE]")

    def drafts_of(self, event: Mapping[str, Any]) -> tuple[int, int] | None:
        """(drafted, accepted) tokens so far."""
        return None

    def must_say_done(self) -> bool:
        return False


class _TritonHttp(_Http):
    def __init__(self, door: Door) -> None:
        super().__init__(door)
        found = page(f"{door.url.rstrip('/')}/v2/models/{door.model}")
        self._known = {tensor["name"] for tensor in found.get("inputs", ())}

    def path(self) -> str:
        return f"{self._base}/v2/models/{self.door.model}/generate_stream"

    def body(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        return triton_inputs(self.door, self._known, prompt, max_tokens)

    def text_of(self, event: Mapping[str, Any]) -> tuple[str, int | None]:
        text = event.get("text_output", "")
        tokens = event.get("num_output_tokens")
        return (text[0] if isinstance(text, list) else text), int(tokens) if isinstance(tokens, int) else None

    def drafts_of(self, event: Mapping[str, Any]) -> tuple[int, int] | None:
        drafted, accepted = event.get(DRAFTED), event.get(ACCEPTED)
        return (drafted, accepted) if isinstance(drafted, int) and isinstance(accepted, int) else None


class _OpenAI(_Http):
    def __init__(self, door: Door) -> None:
        self._chat = door.kind == "openai-chat"
        super().__init__(door)

    def path(self) -> str:
        base = self._base if self._base.endswith("/v1") else f"{self._base}/v1"
        return f"{base}/chat/completions" if self._chat else f"{base}/completions"

    def body(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        asked: dict[str, Any] = (
            {"messages": [{"role": "user", "content": prompt}]} if self._chat else {"prompt": prompt}
        )
        asked |= {"model": self.door.model, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        asked["stream_options"] = {"include_usage": True}
        return asked | ({"ignore_eos": True, "min_tokens": max_tokens} if self.door.ignore_eos else {})

    def text_of(self, event: Mapping[str, Any]) -> tuple[str, int | None]:
        tokens = (event.get("usage") or {}).get("completion_tokens")
        for choice in event.get("choices", ()):
            if not self._chat:
                return choice.get("text") or "", tokens
            said = choice.get("delta") or choice.get("message") or {}
            return (said.get("reasoning_content") or "") + (said.get("content") or ""), tokens
        return "", tokens

    def must_say_done(self) -> bool:
        return True


class _Predict(_Http):
    """FEDML's door: ``{"text": ...}`` -> ``{"generated_text": ...}``, in one piece or as events."""

    def path(self) -> str:
        return self._base if self._base.endswith("/predict") else f"{self._base}/predict"

    def body(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        return {"text": prompt, "max_tokens": max_tokens, "stream": True, "temperature": 0}

    def text_of(self, event: Mapping[str, Any]) -> tuple[str, int | None]:
        return str(event["generated_text"] if isinstance(event, dict) else event), None


def _events(response: http.client.HTTPResponse) -> Iterator[tuple[float, bytes]]:
    """(arrival, data) of server-sent events; what comes in one read came at one time."""
    held = b""
    while data := response.read1():
        at_s = time.perf_counter()
        *lines, held = (held + data).split(b"\n")
        yield from ((at_s, line[5:].strip()) for line in lines if line.startswith(b"data:"))
    if held.startswith(b"data:"):
        yield time.perf_counter(), held[5:].strip()


def _refusal(status: int, body: bytes) -> ScalellmError:
    text = body.decode(errors="replace").strip().removeprefix("data:")[:500]
    with suppress(ValueError, KeyError, TypeError):
        said = json.loads(text)["error"]
        text = str(said["message"]) if isinstance(said, dict) else str(said)
    text = f"{status}: {short(text)}" if status != 200 else short(text)
    return EndpointError(text) if status >= 500 and status != 503 else RejectedError(text)
