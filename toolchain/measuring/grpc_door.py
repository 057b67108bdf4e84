"""A session over gRPC: one ModelStreamInfer of Triton that stays open, answer after answer."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from typing import Any

from toolchain.errors import EndpointError, RejectedError, ScalellmError
from toolchain.measuring.doors import ACCEPTED, CONNECT_S, DRAFTED, Door, Piece, short, triton_inputs

CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),  # else http_proxy catches even 127.0.0.1
]


class GrpcSession:
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
        inputs = triton_inputs(self.door, self._known, prompt, max_tokens)
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
            count = int(tokens.ravel()[0]) if tokens is not None and tokens.size else None
            yield Piece(said, at_s, count, drafts=_drafts(result) if self.door.drafts else None)

    def _connect(self) -> None:
        if self._client is not None:
            return
        import tritonclient.grpc as triton
        from tritonclient.utils import InferenceServerException

        arrived: queue.SimpleQueue[tuple[float, Any, Any]] = queue.SimpleQueue()
        try:
            client = triton.InferenceServerClient(self.door.url, channel_args=CHANNEL)
            config = client.get_model_config(self.door.model, client_timeout=CONNECT_S).config
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


def _drafts(result: Any) -> tuple[int, int] | None:
    found = [result.as_numpy(name) for name in (DRAFTED, ACCEPTED)]
    if any(one is None or not one.size for one in found):
        return None
    drafted, accepted = (int(one.ravel()[0]) for one in found)
    return drafted, accepted


def _tensor(name: str, value: Any, batched: bool) -> Any:
    import numpy as np
    import tritonclient.grpc as triton

    kind, dtype = {str: ("BYTES", np.object_), bool: ("BOOL", np.bool_), int: ("INT32", np.int32)}[type(value)]
    array = np.array([value.encode() if isinstance(value, str) else value], dtype=dtype)
    array = array.reshape(1, 1) if batched else array
    return triton.InferInput(name, list(array.shape), kind).set_data_from_numpy(array)


def _grpc_refusal(error: Any) -> ScalellmError:
    status, text = str(error.status() or ""), short(str(error.message() or ""))
    return RejectedError(f"{status}: {text}") if status else EndpointError(text)
