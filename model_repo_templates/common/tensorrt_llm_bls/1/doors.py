"""Two ways from ``tensorrt_llm_bls`` to preprocessing and the engine; a parameter of the model chooses.

``bls``: Triton's own calls between models, for every backend; see ``http_door.py`` for what they do to a process that
makes many. ``line``: the prompt is prepared in this process, and the engine's model is called
over a private line; only engines of this repository's own ``tensorrt_llm`` have one. A third is in ``http_door.py``.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, Protocol

import channel
import numpy as np
import triton_python_backend_utils as pb_utils
from failed import FailedError
from prompts import Prompts
from wiring import PREPROCESSED, stop_request

_GONE = "the model tensorrt_llm is not there; the server must be restarted"


class Door(Protocol):
    """What a relay needs. All methods may be called from any thread, and raise FailedError."""

    def prepare(self, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """preprocessing's inputs -> its outputs."""

    def generate(
        self, request_id: str, tensors: dict[str, np.ndarray], wanted: list[str]
    ) -> Iterator[dict[str, np.ndarray]]:
        """tensorrt_llm's inputs -> its responses, one after the other."""

    def stop(self, request_id: str) -> None:
        """End the request of that id early; ``generate`` then ends by itself."""


class LineDoor:
    """Over the private line. One connection, made with the first request and made again when it was lost."""

    def __init__(self, engine: str, prompts: Prompts) -> None:
        self._name = channel.name_of(engine)
        self._prompts = prompts
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._answers: dict[str, queue.SimpleQueue[tuple[Any, ...]]] = {}

    def prepare(self, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._prompts.prepare(tensors)

    def generate(
        self, request_id: str, tensors: dict[str, np.ndarray], wanted: list[str]
    ) -> Iterator[dict[str, np.ndarray]]:
        answers: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._send(("ask", request_id, tensors), answers)
        try:
            while True:
                message = answers.get()
                if message[0] == "failed":
                    raise FailedError(*message[2:])
                yield {name: array for name, array in message[2].items() if name in wanted}
                if message[3]:
                    return
        finally:
            with self._lock:
                self._answers.pop(request_id, None)

    def stop(self, request_id: str) -> None:
        self._send(("stop", request_id))

    def _send(self, message: tuple[Any, ...], answers: queue.SimpleQueue[tuple[Any, ...]] | None = None) -> None:
        with self._lock:
            try:
                if self._connection is None:
                    self._connection = channel.connect(self._name)
                    threading.Thread(target=self._read, args=(self._connection,), name="line", daemon=True).start()
                if answers is not None:
                    self._answers[message[1]] = answers
                self._connection.send(message)
            except OSError as error:
                self._answers.pop(message[1], None)
                raise FailedError(_GONE, "INTERNAL") from error

    def _read(self, connection: Connection) -> None:
        try:
            while True:
                message = connection.recv()
                with self._lock:
                    answers = self._answers.get(message[1])
                if answers is not None:
                    answers.put(message)
        except (EOFError, OSError):
            with self._lock:
                self._connection = None
                lost = list(self._answers.values())
            for answers in lost:
                answers.put(("failed", "", _GONE, "INTERNAL"))


class BlsDoor:
    """Through Triton."""

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._stopped: set[str] = set()

    def prepare(self, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        request = pb_utils.InferenceRequest(
            model_name="preprocessing", requested_output_names=list(PREPROCESSED), inputs=as_tensors(tensors)
        )
        return _outputs_of(request.exec())

    def generate(
        self, request_id: str, tensors: dict[str, np.ndarray], wanted: list[str]
    ) -> Iterator[dict[str, np.ndarray]]:
        try:
            for response in self._request(request_id, tensors, wanted).exec(decoupled=True):
                outputs = _outputs_of(response)
                if not outputs:
                    self._explain_silence(request_id)
                    break
                yield outputs
        finally:
            self._stopped.discard(request_id)

    def stop(self, request_id: str) -> None:
        self._stopped.add(request_id)
        for response in self._request(request_id, stop_request(), ["output_ids"]).exec(decoupled=True):
            _outputs_of(response)

    def _request(self, request_id: str, tensors: dict[str, np.ndarray], wanted: list[str]) -> Any:
        return pb_utils.InferenceRequest(
            model_name=self._engine,
            request_id=request_id,
            requested_output_names=wanted,
            inputs=as_tensors(tensors),
        )

    def _explain_silence(self, request_id: str) -> None:
        """A response without tensors. After a ``stop`` that is the end; else Triton has dropped an error (it does so in
        the middle of a stream), which the engine is asked for again."""
        if request_id not in self._stopped:
            self.stop(request_id)
            raise FailedError("the engine gave up in the middle of this answer", "INTERNAL")


def as_tensors(tensors: dict[str, np.ndarray]) -> list[Any]:
    """Plain arrays as Triton's tensors."""
    return [pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in tensors.items()]


def _outputs_of(response: Any) -> dict[str, np.ndarray]:
    if response.has_error():
        error = response.error()
        raise FailedError(error.message(), error.code())
    return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
