"""Ways into a server: Triton over gRPC and HTTP, OpenAI's API, ``/predict``; each a stream of pieces with times.

A session is one kept connection that carries one request at a time, so that no connecting is in a latency. What a
server refuses or breaks is raised; nothing is sent twice. It knows nothing of load, prompts or statistics.
"""

from __future__ import annotations

import http.client
import json
import queue
import re
import select
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

from toolchain.errors import EndpointError, RejectedError, ScalellmError

KINDS = ("triton-grpc", "triton-http", "openai-chat", "openai-completions", "predict")
_CONNECT_S = 5.0
_UNTIL_S = 3600.0


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that came at ``at_s`` (``time.perf_counter()``)."""

    text: str
    at_s: float
    tokens: int | None = None
    """How many the server says that it has generated so far."""
    whole: bool = False
    """The complete answer in one piece: it was not streamed."""


class Session(Protocol):
    """One connection."""

    def ask(self, prompt: str, max_tokens: int, sent: Callable[[], None]) -> Iterator[Piece]:
        """``sent`` is called when the request goes out. Raises a ScalellmError."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Door:
    """Where a service is, and how it is spoken to. ``url``: ``http://host:port[/path]``, for gRPC ``host:port``."""

    kind: str
    url: str
    model: str
    ignore_eos: bool = False
    """Ask for exactly ``max_tokens``: ``min_tokens`` for Triton, ``ignore_eos`` and ``min_tokens`` for OpenAI's API."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More fields of the request's body; not for gRPC."""
    key: str = field(default="", repr=False)
    timeout_s: float = 600.0
    """Without a byte from the server."""

    def open(self) -> Session:
        """EndpointError when nobody is there."""
        if self.kind == "triton-grpc":
            return _Grpc(self)
        return {"triton-http": _TritonHttp, "predict": _Predict}.get(self.kind, _OpenAI)(self)

    def about(self) -> dict[str, str]:
        """What the server says of itself: names and versions; empty where it says nothing."""
        if self.kind == "triton-grpc":
            with suppress(Exception):
                import tritonclient.grpc as triton

                with triton.InferenceServerClient(self.url, channel_args=_CHANNEL) as client:
                    found = client.get_server_metadata(client_timeout=_CONNECT_S)
                    return {"name": found.name, "version": found.version}
            return {}
        base = self.url.rstrip("/")
        root = "{0.scheme}://{0.netloc}".format(urlsplit(base))
        pages = {"triton-http": f"{base}/v2", "predict": f"{root}/version"}
        found = _page(pages.get(self.kind, f"{root}/version"), self.key)
        return {name: str(found[name]) for name in ("name", "version") if name in found}


def first_model(url: str, key: str = "") -> str:
    """The first model that an OpenAI server lists. EndpointError when it lists none."""
    base = url.rstrip("/").removesuffix("/v1")
    with suppress(KeyError, IndexError, TypeError):
        return str(_page(f"{base}/v1/models", key)["data"][0]["id"])
    raise EndpointError(f"{url}: no list of models at /v1/models", hint="is it served? else --name MODEL")


class _Http:
    """One kept HTTP connection; subclasses say what is posted and what an event holds."""

    def __init__(self, door: Door) -> None:
        self.door = door
        parts = urlsplit(door.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EndpointError(f"{door.url!r} is no address", hint="write it as http://127.0.0.1:8000")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.hostname, parts.port, timeout=_CONNECT_S)
        self._base = parts.path.rstrip("/")
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
        """Also again, when the server hung up on an idle connection."""
        connection = self._connection
        if connection.sock is not None and select.select([connection.sock], [], [], 0)[0]:
            connection.close()
        if connection.sock is None:
            try:
                connection.timeout = _CONNECT_S
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
            yield Piece(text, at_s, tokens)
        if self.must_say_done() and not ended:
            raise EndpointError("the stream ended without [DONE]")

    def must_say_done(self) -> bool:
        return False


class _TritonHttp(_Http):
    def __init__(self, door: Door) -> None:
        super().__init__(door)
        found = _page(f"{door.url.rstrip('/')}/v2/models/{door.model}")
        self._known = {tensor["name"] for tensor in found.get("inputs", ())}

    def path(self) -> str:
        return f"{self._base}/v2/models/{self.door.model}/generate_stream"

    def body(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        return _triton_inputs(self.door, self._known, prompt, max_tokens)

    def text_of(self, event: Mapping[str, Any]) -> tuple[str, int | None]:
        text = event.get("text_output", "")
        tokens = event.get("num_output_tokens")
        return (text[0] if isinstance(text, list) else text), int(tokens) if isinstance(tokens, int) else None


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


def _triton_inputs(door: Door, known: set[str], prompt: str, max_tokens: int) -> dict[str, Any]:
    """The tensors of ``tensorrt_llm_bls`` and the ensemble, as far as the model has them."""
    inputs: dict[str, Any] = {"text_input": prompt, "max_tokens": max_tokens, "stream": True}
    wished: dict[str, Any] = {"return_num_output_tokens": True, "exclude_input_in_output": True}
    if door.ignore_eos:
        if "min_tokens" not in known:
            raise RejectedError(f"the model {door.model} has no input min_tokens", hint="leave --ignore-eos out")
        wished["min_tokens"] = max_tokens
    return inputs | {name: value for name, value in wished.items() if name in known}


_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),  # else http_proxy catches even 127.0.0.1
]


class _Grpc:
    """One ModelStreamInfer that stays open; Triton answers on it request after request."""

    def __init__(self, door: Door) -> None:
        self.door = door
        self._client: Any = None
        self._arrived: queue.SimpleQueue[tuple[float, Any, Any]] = queue.SimpleQueue()
        self._known: set[str] = set()
        self._batched = False
        self._connect()

    def ask(self, prompt: str, max_tokens: int, sent: Callable[[], None]) -> Iterator[Piece]:
        self._connect()
        inputs = _triton_inputs(self.door, self._known, prompt, max_tokens)
        tensors = [_tensor(name, value, self._batched) for name, value in inputs.items()]
        finished = False
        try:
            sent()
            self._client.async_stream_infer(self.door.model, tensors, enable_empty_final_response=True)
            yield from self._pieces()
            finished = True
        finally:
            if not finished:
                self._disconnect()

    def close(self) -> None:
        self._disconnect()

    def _pieces(self) -> Iterator[Piece]:
        final = False
        while not final:
            try:
                at_s, result, error = self._arrived.get(timeout=self.door.timeout_s)
            except queue.Empty:
                raise EndpointError(f"nothing came for {self.door.timeout_s:g} s") from None
            if error is not None:
                raise _grpc_refusal(error)
            final = result.get_response().parameters["triton_final_response"].bool_param
            text = result.as_numpy("text_output")
            tokens = result.as_numpy("num_output_tokens")
            said = text.ravel()[0].decode(errors="replace") if text is not None and text.size else ""
            yield Piece(said, at_s, int(tokens.ravel()[0]) if tokens is not None and tokens.size else None)

    def _connect(self) -> None:
        if self._client is not None:
            return
        import tritonclient.grpc as triton
        from tritonclient.utils import InferenceServerException

        arrived: queue.SimpleQueue[tuple[float, Any, Any]] = queue.SimpleQueue()
        try:
            client = triton.InferenceServerClient(self.door.url, channel_args=_CHANNEL)
            config = client.get_model_config(self.door.model, client_timeout=_CONNECT_S).config
            client.start_stream(callback=lambda result, error: arrived.put((time.perf_counter(), result, error)))
        except InferenceServerException as error:
            raise EndpointError(f"{self.door.url}: {error.message()}", hint="is it served?") from None
        self._arrived, self._client = arrived, client
        self._known, self._batched = {tensor.name for tensor in config.input}, config.max_batch_size > 0

    def _disconnect(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            client.stop_stream(cancel_requests=True)
            client.close()


def _tensor(name: str, value: Any, batched: bool) -> Any:
    import numpy as np
    import tritonclient.grpc as triton

    kind, dtype = {str: ("BYTES", np.object_), bool: ("BOOL", np.bool_), int: ("INT32", np.int32)}[type(value)]
    array = np.array([value.encode() if isinstance(value, str) else value], dtype=dtype)
    array = array.reshape(1, 1) if batched else array
    return triton.InferInput(name, list(array.shape), kind).set_data_from_numpy(array)


def _events(response: http.client.HTTPResponse) -> Iterator[tuple[float, bytes]]:
    """(arrival, data) of server-sent events; what comes in one read came at one time."""
    held = b""
    while data := response.read1():
        at_s = time.perf_counter()
        *lines, held = (held + data).split(b"\n")
        yield from ((at_s, line[5:].strip()) for line in lines if line.startswith(b"data:"))
    if held.startswith(b"data:"):
        yield time.perf_counter(), held[5:].strip()


def _page(url: str, key: str = "") -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=_CONNECT_S)
    with suppress(OSError, http.client.HTTPException, ValueError):
        connection.request("GET", parts.path, headers={"Authorization": f"Bearer {key}"} if key else {})
        response = connection.getresponse()
        found = json.loads(response.read())
        if response.status == 200 and isinstance(found, dict):
            return found
    connection.close()
    return {}


def _refusal(status: int, body: bytes) -> ScalellmError:
    text = body.decode(errors="replace").strip().removeprefix("data:")[:500]
    with suppress(ValueError, KeyError, TypeError):
        said = json.loads(text)["error"]
        text = str(said["message"]) if isinstance(said, dict) else str(said)
    text = f"{status}: {_short(text)}" if status != 200 else _short(text)
    return EndpointError(text) if status >= 500 and status != 503 else RejectedError(text)


def _grpc_refusal(error: Any) -> ScalellmError:
    status, text = str(error.status() or ""), _short(str(error.message() or ""))
    return RejectedError(f"{status}: {text}") if status else EndpointError(text)


def _short(text: str) -> str:
    """Without the traceback that Triton's Python backend appends."""
    return re.split(r"\n+At:\n|\n?Traceback \(most recent", text)[0].strip()[:300]
