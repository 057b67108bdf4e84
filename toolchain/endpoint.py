"""A running server as a client sees it: a prompt goes in, chunks of text come out, over HTTP or gRPC.

The tensors are those of ``tensorrt_llm_bls`` in TensorRT-LLM's model repository (1.x), so that the same calls reach a
CPU and a GPU. It does not know how the server was started, nor what runs behind the model.
"""

from __future__ import annotations

import difflib
import http.client
import json
import queue
import re
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from urllib.parse import urlsplit

from toolchain.errors import EndpointError, RejectedError, ScalellmError

_START_HINT = "make serve"
_TYPES = {
    "INT32": "end_id pad_id top_k beam_width num_return_sequences min_tokens num_draft_tokens",
    "UINT64": "seed lora_task_id prompt_table_extra_id",
    "FP32": "temperature top_p length_penalty repetition_penalty presence_penalty frequency_penalty "
    "embedding_bias_weights",
    "BOOL": "return_log_probs return_context_logits return_generation_logits exclude_input_in_output "
    "return_perf_metrics return_num_input_tokens return_num_output_tokens use_draft_logits",
    "STRING": "stop_words bad_words embedding_bias_words guided_decoding_guide_type guided_decoding_guide",
}
SAMPLING = {name: dtype for dtype, names in _TYPES.items() for name in names.split()}
"""Optional inputs -> Triton dtype. Source: ``tensorrt_llm_bls/config.pbtxt`` of TensorRT-LLM 1.2, 2026."""
_LISTS = frozenset({"stop_words", "bad_words", "embedding_bias_words", "embedding_bias_weights"})
"""Inputs of shape [-1]; all others are [1]."""
_CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),  # else http_proxy catches even 127.0.0.1
]
_PLUMBING = frozenset({"model_name", "model_version", "text_output", "id"})

Chunks = Generator["Chunk", None, None]


@dataclass(frozen=True, slots=True)
class Chunk:
    """One response. Every generation ends with exactly one ``final`` chunk; a streamed one's has no text."""

    text: str
    received_at_s: float
    """``time.perf_counter()`` at arrival."""
    sent_at_s: float
    """The same clock when the request was handed to an open connection; time to first token is the difference."""
    final: bool = False
    outputs: Mapping[str, Any] = field(default_factory=dict)
    """The other outputs that the model gave, such as ``num_output_tokens``."""


@dataclass(frozen=True)
class Timeouts:
    """How long to wait before giving up: a server whose model process died leaves streams open for ever."""

    connect_s: float = 5.0
    first_chunk_s: float = 300.0
    """Queueing and prefill; without streaming, the whole answer."""
    between_chunks_s: float = 60.0
    total_s: float = 3600.0


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens. ``grpc_url`` is ``host:port``."""

    http_url: str
    grpc_url: str
    model: str = "tensorrt_llm_bls"
    timeouts: Timeouts = Timeouts()
    key: str = ""
    """An API key, where a gateway stands in front."""

    @property
    def _headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    def ready(self) -> bool:
        """Whether the server calls itself and the model ready; Triton says so of a dead model too."""
        for path in ("/v2/health/ready", f"/v2/models/{self.model}/ready"):
            with closing(_connection(self.http_url, self.timeouts.connect_s)) as connection:
                try:
                    connection.request("GET", path)
                    if connection.getresponse().status != 200:
                        return False
                except (OSError, http.client.HTTPException):
                    return False
        return True

    def generate(
        self,
        prompt: str,
        *,
        max_tokens: int,
        protocol: Literal["http", "grpc"] = "http",
        stream: bool = True,
        timeout_s: float | None = None,
        **sampling: Any,
    ) -> Chunks:
        """Generates; ``sampling`` are the inputs named in ``SAMPLING``. Closing the iterator early cancels the request.

        ``timeout_s`` is for the whole of it, in place of ``timeouts.total_s``. No server or a broken one is an
        ``EndpointError``; what the server refuses, a ``RejectedError``.
        """
        inputs = {"text_input": prompt, "max_tokens": max_tokens, "stream": stream, **_checked(sampling)}
        clock = _Clock(replace(self.timeouts, total_s=timeout_s) if timeout_s else self.timeouts)
        return self._over_http(inputs, stream, clock) if protocol == "http" else self._over_grpc(inputs, clock)

    def _over_http(self, inputs: Mapping[str, Any], stream: bool, clock: _Clock) -> Chunks:
        path = f"/v2/models/{self.model}/generate{'_stream' if stream else ''}"
        response = None
        connection = _connection(self.http_url, self.timeouts.connect_s)
        try:
            _connect(connection, self.http_url)
            self._refuse_unknown(connection, inputs)
            clock.start()
            connection.request("POST", path, json.dumps(inputs), {"Content-Type": "application/json", **self._headers})
            connection.sock.settimeout(clock.left_s())
            sock, response = connection.sock, connection.getresponse()
            if response.status != 200:
                raise _error(_json_error(response.read()), response.status == 503, response.status >= 500)
            if not stream:
                yield _http_chunk(json.loads(response.read()), clock.sent_at_s, final=True)
                return
            for event in _events(response):
                yield _http_chunk(event, clock.sent_at_s)
                clock.tick()
                sock.settimeout(clock.left_s())
            yield Chunk("", time.perf_counter(), clock.sent_at_s, final=True)
        except TimeoutError:
            raise clock.expired() from None
        except (OSError, http.client.HTTPException) as error:
            raise _cut(error) from None
        finally:
            if response:
                response.close()
            connection.close()

    def _refuse_unknown(self, connection: http.client.HTTPConnection, inputs: Mapping[str, Any]) -> None:
        """Over HTTP, Triton silently ignores what is not an input of the model; over gRPC it refuses, as we do here."""
        if not inputs.keys() & SAMPLING.keys():
            return
        connection.request("GET", f"/v2/models/{self.model}", headers=self._headers)
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise _error(_json_error(body), broken=response.status >= 500)
        known = {tensor["name"] for tensor in json.loads(body)["inputs"]}
        for name in inputs.keys() - known - {"stream"}:
            raise RejectedError(f"the model {self.model} has no input {name!r}", hint="leave it out")

    def _over_grpc(self, inputs: Mapping[str, Any], clock: _Clock) -> Chunks:
        import tritonclient.grpc as triton
        from tritonclient.utils import InferenceServerException

        arrived: queue.SimpleQueue[tuple[float, Any, Any]] = queue.SimpleQueue()
        client = triton.InferenceServerClient(self.grpc_url, channel_args=_CHANNEL)
        finished = False
        try:
            config = client.get_model_config(
                self.model, headers=self._headers, client_timeout=self.timeouts.connect_s
            ).config
            client.start_stream(
                callback=lambda result, error: arrived.put((time.perf_counter(), result, error)),
                headers=self._headers,
            )
            tensors = _tensors(inputs, batched=config.max_batch_size > 0)
            clock.start()
            client.async_stream_infer(self.model, tensors, enable_empty_final_response=True)
            for chunk in _grpc_chunks(arrived, clock):
                finished = chunk.final
                yield chunk
        except InferenceServerException as error:
            finished = True  # there is nothing left to cancel
            raise _grpc_error(error, self.grpc_url) from None
        finally:
            client.stop_stream(cancel_requests=not finished)
            client.close()


class _Clock:
    """Counts down the timeouts of one generation, and knows when it began."""

    def __init__(self, timeouts: Timeouts) -> None:
        self.sent_at_s = 0.0
        self._end = time.monotonic() + timeouts.total_s
        self._timeouts = timeouts
        self._step_s = timeouts.first_chunk_s

    def start(self) -> None:
        """The request goes out."""
        self.sent_at_s = time.perf_counter()

    def tick(self) -> None:
        """A chunk arrived."""
        self._step_s = self._timeouts.between_chunks_s

    def left_s(self) -> float:
        return max(0.001, min(self._step_s, self._end - time.monotonic()))

    def expired(self) -> EndpointError:
        if time.monotonic() >= self._end:
            return EndpointError(f"the generation took longer than {self._timeouts.total_s:g} s")
        return EndpointError(
            f"nothing came from the server for {self._step_s:g} s", hint="see the server's log; restart it: make serve"
        )


def _checked(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Without the inputs that are None; an unknown name is refused here, with the one that was probably meant."""
    for name in sampling.keys() - SAMPLING.keys():
        near = difflib.get_close_matches(name, SAMPLING, 1)
        hint = f"did you mean {near[0]}?" if near else "known: " + ", ".join(sorted(SAMPLING))
        raise RejectedError(f"unknown sampling parameter {name!r}", hint=hint)
    given = {name: value for name, value in sampling.items() if value is not None}
    return {name: _as_list(value) if name in _LISTS else value for name, value in given.items()}


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _connection(url: str, timeout_s: float) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.hostname or "", parts.port, timeout=timeout_s)


def _connect(connection: http.client.HTTPConnection, url: str) -> None:
    try:
        connection.connect()
    except OSError as error:
        raise _unreachable(url, error.strerror or str(error)) from None


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON objects of a server-sent event stream; an error event is raised."""
    for line in _lines(response):
        if line.startswith(b"data:"):
            event = json.loads(line[5:])
            if "error" in event:
                raise _error(event["error"])
            yield event


def _lines(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Lines as they arrive. By ``read1``, because ``readline`` takes a connection that was cut for the end."""
    held = b""
    while data := response.read1():
        *lines, held = (held + data).split(b"\n")
        yield from lines
    yield held


def _http_chunk(event: Mapping[str, Any], sent_at_s: float, final: bool = False) -> Chunk:
    received_at_s = time.perf_counter()
    text = event.get("text_output", "")
    outputs = {name: value for name, value in event.items() if name not in _PLUMBING}
    if isinstance(text, list):
        outputs["texts"] = text
        text = text[0] if text else ""
    return Chunk(text, received_at_s, sent_at_s, final, outputs)


def _tensors(inputs: Mapping[str, Any], *, batched: bool) -> list[Any]:
    """Inputs -> tritonclient's tensors of shape [1] or [n], with a leading 1 where the model has a batch dimension."""
    import numpy as np
    import tritonclient.grpc as triton

    own = {"text_input": "STRING", "max_tokens": "INT32", "stream": "BOOL"}
    dtypes = {"INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": np.bool_, "STRING": np.object_}
    tensors = []
    for name, value in inputs.items():
        kind = own.get(name) or SAMPLING[name]
        values = [item.encode() if isinstance(item, str) else item for item in _as_list(value)]
        try:
            array = np.array(values, dtype=dtypes[kind])
        except (ValueError, TypeError, OverflowError):
            raise RejectedError(f"{name} must be {kind}, not {value!r}") from None
        array = array.reshape(1, -1) if batched else array
        tensor = triton.InferInput(name, list(array.shape), "BYTES" if kind == "STRING" else kind)
        tensors.append(tensor.set_data_from_numpy(array))
    return tensors


def _grpc_chunks(arrived: queue.SimpleQueue[tuple[float, Any, Any]], clock: _Clock) -> Iterator[Chunk]:
    final = False
    while not final:
        try:
            received_at_s, result, error = arrived.get(timeout=clock.left_s())
        except queue.Empty:
            raise clock.expired() from None
        if error is not None:
            raise error
        clock.tick()
        response = result.get_response()
        final = response.parameters["triton_final_response"].bool_param
        values = {output.name: result.as_numpy(output.name).ravel().tolist() for output in response.outputs}
        texts = [text.decode(errors="replace") for text in values.pop("text_output", [])]
        outputs = {name: value[0] if len(value) == 1 else value for name, value in values.items()}
        if len(texts) > 1:
            outputs["texts"] = texts
        yield Chunk(texts[0] if texts else "", received_at_s, clock.sent_at_s, final, outputs)


def _json_error(body: bytes) -> str:
    text = body.decode(errors="replace").strip().removeprefix("data:")
    with suppress(ValueError, KeyError, TypeError):
        return str(json.loads(text)["error"])
    return text[:500]


def _grpc_error(error: Any, url: str) -> ScalellmError:
    status, message = str(error.status() or ""), str(error.message() or "")
    if "UNAVAILABLE" in status and re.search(r"connect|[Ss]ocket closed|reset", message):
        return _unreachable(url, message)
    if "DEADLINE_EXCEEDED" in status:
        return EndpointError(f"the server at {url} did not answer in time", hint="see the server's log")
    return _error(message, "UNAVAILABLE" in status, "INTERNAL" in status)


def plain_message(message: str) -> str:
    """Triton's message without the traceback, and without the preamble, that its Python backend adds."""
    text = re.split(r"\n+At:\n|\n?Traceback \(most recent", message)[0].strip()
    return re.sub(r"^(?:in ensemble '[^']*', )?Failed to process the request\(s\)[^:]*?, message: ", "", text)


def _error(message: str, busy: bool = False, broken: bool = False) -> ScalellmError:
    """Triton's message as the error that it means."""
    text = plain_message(message)
    if "is not healthy" in text:
        return EndpointError(f"the model's process died: {text}", hint=_START_HINT)
    if "unknown model" in text or "is not found" in text:
        return EndpointError(text, hint="give the name of a model that the server has")
    if busy:
        return RejectedError(f"the server is busy: {text}", hint="try again in a moment")
    return EndpointError(text, hint="see the server's log") if broken else RejectedError(text)


def _cut(error: Exception) -> EndpointError:
    return EndpointError(f"the server closed the connection: {error!r}", hint="see the server's log; " + _START_HINT)


def _unreachable(url: str, why: str) -> EndpointError:
    return EndpointError(f"no server answers at {url} ({why})", hint=_START_HINT)
