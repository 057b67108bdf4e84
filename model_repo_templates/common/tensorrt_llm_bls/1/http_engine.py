"""One engine model of a Triton over its HTTP port, as any client would use it. It does not run inside Triton alone.

What JSON cannot carry is not for here: tensors of two free dimensions, and logits.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from failed import CutError, FailedError
from wiring import stop_request

Tensors = dict[str, np.ndarray]

_CODES = {400: "INVALID_ARG", 404: "NOT_FOUND", 499: "CANCELLED", 503: "UNAVAILABLE"}
_REALS = frozenset({"cum_log_probs", "output_log_probs", "acceptance_rate"})
_GROWING = frozenset({"output_ids", "output_log_probs"})
_GAVE_UP = "the engine gave up in the middle of this answer"


class HttpEngine:
    """One connection a request. May be used from any thread."""

    def __init__(self, engine: str, address: tuple[str, int]) -> None:
        self._path, self._address = f"/v2/models/{engine}/generate_stream", address
        self._stopped: set[str] = set()

    def generate(self, request_id: str, tensors: Tensors, wanted: list[str]) -> Iterator[Tensors]:
        """The engine's inputs -> the wanted outputs of its responses. Raises FailedError."""
        try:
            for event in self._ask(request_id, tensors):
                outputs = _outputs(event, wanted)
                if outputs:
                    yield outputs
                elif request_id in self._stopped:
                    return
                else:
                    raise FailedError(_GAVE_UP, "INTERNAL")
        finally:
            self._stopped.discard(request_id)

    def stop(self, request_id: str) -> None:
        """End the request of that id early; ``generate`` then ends by itself."""
        self._stopped.add(request_id)
        for _event in self._ask(request_id, stop_request()):
            pass

    def _ask(self, request_id: str, tensors: Tensors) -> Iterator[dict[str, Any]]:
        """The events of one request. Leaving early closes the connection, which cancels it."""
        connection = http.client.HTTPConnection(*self._address)
        try:
            body = json.dumps({"id": request_id, **{name: _plain(array) for name, array in tensors.items()}})
            connection.request("POST", self._path, body)
            response = connection.getresponse()
            if response.status != 200:
                text = _said(response.read())
                raise FailedError(text, _CODES.get(response.status, "INTERNAL"))
            for line in response:
                if line.startswith(b"data:"):
                    event = json.loads(line[5:])
                    if "error" in event:
                        raise FailedError(event["error"], "INTERNAL")
                    yield event
        except (OSError, http.client.HTTPException, ValueError) as error:
            text = f"the model tensorrt_llm cannot be asked: {type(error).__name__} {error}"
            raise CutError(text, "INTERNAL") from error
        finally:
            connection.close()


def _plain(array: np.ndarray) -> list[Any]:
    """A flat list: the server takes the shape from the model's configuration."""
    return [item.decode("utf-8") if isinstance(item, bytes) else item for item in array.reshape(-1).tolist()]


def _said(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")


def _outputs(event: dict[str, Any], wanted: list[str]) -> Tensors:
    """One event -> the wanted tensors in their shapes, [1, beams, n] or [1, beams]; empty where there are none."""
    if "sequence_length" not in event:
        return {}
    beams = len(_list(event["sequence_length"]))
    return {name: _array(name, _list(event[name]), beams) for name in wanted if name in event}


def _array(name: str, values: list[Any], beams: int) -> np.ndarray:
    kind = np.float32 if name in _REALS else np.int64 if name.endswith("_ns") else np.int32
    array = np.array(values, dtype=kind)
    return array.reshape(1, beams, -1) if name in _GROWING else array.reshape(1, -1)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
