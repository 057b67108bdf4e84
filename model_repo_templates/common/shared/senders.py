"""Two ways back to whoever asked: Triton's response sender, and the private line of ``tensorrt_llm_bls``.

Both take tensors as a dictionary of numpy arrays, and errors as text and the name of a Triton error code.
"""

from __future__ import annotations

import threading
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np
import triton_python_backend_utils as pb_utils


class Sender(Protocol):
    """One request's way back. After a final message nothing may follow."""

    def send(self, tensors: dict[str, np.ndarray], *, final: bool) -> None: ...

    def fail(self, text: str, code: str) -> None: ...

    def is_cancelled(self) -> bool: ...


class TritonSender:
    """Only tensors that the client asked for are sent: Triton 2.51 frees the others without holding Python's lock
    (python_backend pull request 390), which corrupts the heap."""

    def __init__(self, request: Any) -> None:
        self._sender = request.get_response_sender()
        self._wanted = set(request.requested_output_names())

    def send(self, tensors: dict[str, np.ndarray], *, final: bool) -> None:
        outputs = [pb_utils.Tensor(name, array) for name, array in tensors.items() if name in self._wanted]
        self._sender.send(pb_utils.InferenceResponse(outputs), flags=_FINAL if final else 0)

    def fail(self, text: str, code: str) -> None:
        """In two: Triton 2.51 never delivers an error that is also final to a BLS caller that waits for more."""
        error = pb_utils.TritonError(text, getattr(pb_utils.TritonError, code))
        self._sender.send(pb_utils.InferenceResponse(error=error))
        self.end()

    def end(self) -> None:
        """Final, and nothing else."""
        self._sender.send(flags=_FINAL)

    def is_cancelled(self) -> bool:
        return bool(self._sender.is_cancelled())


_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class Line:
    """One caller on the private line. ``closed`` is set when it has gone."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.closed = False
        self._lock = threading.Lock()

    def send(self, message: tuple[Any, ...]) -> None:
        """Lost when the caller has gone: then nobody waits for it."""
        try:
            with self._lock:
                self.connection.send(message)
        except OSError:
            self.closed = True


class LineSender:
    """Messages out: ("tensors", id, tensors, final), ("failed", id, text, code)."""

    def __init__(self, line: Line, request_id: str) -> None:
        self._line, self._id = line, request_id

    def send(self, tensors: dict[str, np.ndarray], *, final: bool) -> None:
        self._line.send(("tensors", self._id, tensors, final))

    def fail(self, text: str, code: str) -> None:
        self._line.send(("failed", self._id, text, code))

    def is_cancelled(self) -> bool:
        """Callers say ``stop``; a caller that died cannot."""
        return self._line.closed
