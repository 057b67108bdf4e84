"""The third way from ``tensorrt_llm_bls`` to an engine: this server's own HTTP port, as any client would use it.

Under Triton's own calls between models (BLS), with a fast stand-in for an engine and four streams, the stub of Triton
2.51 died within a second, and with one stream within a hundred answers; over HTTP nothing of it runs. We did not find
the cause, so no later Triton is taken to be free of it. What JSON cannot carry (tensors of two free dimensions, logits)
goes the old way.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from doors import BlsDoor, FailedError
from prompts import Prompts
from wiring import stop_request

Tensors = dict[str, np.ndarray]

_CODES = {400: "INVALID_ARG", 404: "NOT_FOUND", 499: "CANCELLED", 503: "UNAVAILABLE"}
_TWO_FREE = frozenset({"prompt_embedding_table", "lora_weights"})
_LOGITS = frozenset({"context_logits", "generation_logits"})
_REALS = frozenset({"cum_log_probs", "output_log_probs", "acceptance_rate"})
_GROWING = frozenset({"output_ids", "output_log_probs"})
_GAVE_UP = "the engine gave up in the middle of this answer"


def own_address() -> tuple[str, int] | None:
    """Where this server listens for HTTP, by the command line of the process above; None where it does not.

    Triton's own defaults: all addresses, port 8000.
    """
    words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    flags = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
    flags |= {word[2:]: value for word, value in itertools.pairwise(words) if word[2:] in _FLAGS}
    if flags.get("allow-http", "true").lower() in {"false", "0"}:
        return None
    host = flags.get("http-address", "127.0.0.1")
    return "127.0.0.1" if host == "0.0.0.0" else host, int(flags.get("http-port", "8000"))


_FLAGS = frozenset({"http-address", "http-port", "allow-http"})


class HttpDoor:
    """One connection a request. Prompts are prepared in this process."""

    def __init__(self, engine: str, prompts: Prompts, address: tuple[str, int]) -> None:
        self._path = f"/v2/models/{engine}/generate_stream"
        self._prompts, self._address = prompts, address
        self._triton = BlsDoor(engine)
        self._stopped: set[str] = set()

    def prepare(self, tensors: Tensors) -> Tensors:
        return self._prompts.prepare(tensors)

    def generate(self, request_id: str, tensors: Tensors, wanted: list[str]) -> Iterator[Tensors]:
        if _TWO_FREE & set(tensors) or _LOGITS & set(wanted):
            yield from self._triton.generate(request_id, tensors, wanted)
            return
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
            raise FailedError(text, "INTERNAL") from error
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
