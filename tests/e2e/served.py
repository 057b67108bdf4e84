"""A repository served by the real Triton, and the two clients' ways to ask it. For the tests of the Triton models."""

from __future__ import annotations

import http.client
import json
import queue
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as grpcclient

KINDS = {
    "text_input": "BYTES",
    "stop_words": "BYTES",
    "bad_words": "BYTES",
    "guided_decoding_guide": "BYTES",
    "guided_decoding_guide_type": "BYTES",
    "max_tokens": "INT32",
    "top_k": "INT32",
    "end_id": "INT32",
    "beam_width": "INT32",
    "num_return_sequences": "INT32",
    "min_tokens": "INT32",
    "top_p": "FP32",
    "temperature": "FP32",
    "length_penalty": "FP32",
    "repetition_penalty": "FP32",
    "presence_penalty": "FP32",
    "stream": "BOOL",
    "return_log_probs": "BOOL",
    "exclude_input_in_output": "BOOL",
    "return_num_input_tokens": "BOOL",
    "return_num_output_tokens": "BOOL",
    "seed": "UINT64",
    "lora_task_id": "UINT64",
    "input_ids": "INT32",
    "input_lengths": "INT32",
    "request_output_len": "INT32",
    "streaming": "BOOL",
    "stop": "BOOL",
}
_NUMPY = {"INT32": np.int32, "FP32": np.float32, "BOOL": np.bool_, "UINT64": np.uint64}


class ServerError(Exception):
    """What Triton answered instead of tensors: its message, and the HTTP status or the gRPC code."""


@dataclass(frozen=True)
class Served:
    """Addresses of a running server, and what its engine says of itself."""

    http_port: int
    grpc_port: int
    status_file: Path
    metrics_port: int = 0

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.status_file.read_text()))

    def wait_for(self, condition: Callable[[dict[str, Any]], bool], timeout_s: float = 20.0) -> dict[str, Any]:
        """The first status that fulfils the condition; AssertionError with the last one after the time is up."""
        deadline = time.monotonic() + timeout_s
        while not condition(status := self.status()):
            assert time.monotonic() < deadline, status
            time.sleep(0.05)
        return status

    def idle(self) -> dict[str, Any]:
        """The status when nothing is left of earlier tests. Written every 0.2 s: an old one is not believed."""
        time.sleep(0.5)
        return self.wait_for(lambda status: status["active"] == status["running"] == status["waiting"] == 0)

    def generate(self, model: str, **request: Any) -> dict[str, Any]:
        """POST generate: one answer."""
        connection, response = self._post(model, "generate", request)
        body = json.loads(response.read())
        connection.close()
        if response.status != 200:
            raise ServerError(f"{response.status} {body['error']}")
        return dict(body)

    def text(self, model: str, **request: Any) -> str:
        return str(self.generate(model, **request)["text_output"])

    def pieces(self, model: str, **request: Any) -> list[str]:
        """POST generate_stream: the texts, one for each event."""
        with self.streaming(model, **request) as events:
            return [str(event["text_output"]) for event in events]

    @contextmanager
    def streaming(self, model: str, **request: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """The events of generate_stream; leaving the block closes the connection, whatever is still to come."""
        connection, response = self._post(model, "generate_stream", {"stream": True, **request})
        try:
            yield _events(response)
        finally:
            response.close()
            connection.close()

    def grpc(self, model: str, request_id: str = "", **request: Any) -> list[Any]:
        """ModelStreamInfer: all results of one request."""
        with self.grpc_stream() as (client, answers):
            client.async_stream_infer(model, inputs(request), request_id=request_id, enable_empty_final_response=True)
            return list(until_final(answers))

    @contextmanager
    def grpc_stream(self) -> Iterator[tuple[grpcclient.InferenceServerClient, queue.SimpleQueue[Any]]]:
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        client = grpcclient.InferenceServerClient(f"127.0.0.1:{self.grpc_port}")
        client.start_stream(callback=lambda result, error: answers.put(error or result))
        try:
            yield client, answers
        finally:
            client.stop_stream(cancel_requests=True)
            client.close()

    def _post(
        self, model: str, verb: str, request: dict[str, Any]
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=60)
        connection.request("POST", f"/v2/models/{model}/{verb}", json.dumps(request))
        return connection, connection.getresponse()


def inputs(request: dict[str, Any]) -> list[grpcclient.InferInput]:
    """Plain values -> tensors [1, n]."""
    tensors = []
    for name, value in request.items():
        values = value if isinstance(value, list) else [value]
        kind = KINDS[name]
        if kind == "BYTES":
            array = np.array([[text.encode() for text in values]], dtype=object)
        else:
            array = np.array([values], dtype=_NUMPY[kind])
        tensor = grpcclient.InferInput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    return tensors


def until_final(answers: queue.SimpleQueue[Any]) -> Iterator[Any]:
    """Results up to the final response (an empty one is not yielded); ServerError for an error."""
    while True:
        result = answers.get(timeout=60)
        if isinstance(result, Exception):
            raise ServerError(str(result)) from result
        response = result.get_response()
        if response.outputs:
            yield result
        if response.parameters["triton_final_response"].bool_param:
            return


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in response:
        if line.startswith(b"data:"):
            event = json.loads(line[5:])
            if "error" in event:
                raise ServerError(event["error"])
            yield event
