"""The third way from ``tensorrt_llm_bls`` to an engine: this server's own HTTP port, as any client would use it.

Under Triton's own calls between models (BLS), with a fast stand-in for an engine and four streams, the stub of Triton
2.51 died within a second, and with one stream within a hundred answers; over HTTP nothing of it runs. We did not find
the cause, so no later Triton is taken to be free of it. What JSON cannot carry (tensors of two free dimensions, logits)
goes the old way.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from doors import BlsDoor
from http_engine import HttpEngine, Tensors
from prompts import Prompts

_TWO_FREE = frozenset({"prompt_embedding_table", "lora_weights"})
_LOGITS = frozenset({"context_logits", "generation_logits"})


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
        self._http, self._triton = HttpEngine(engine, address), BlsDoor(engine)
        self._prompts = prompts

    def prepare(self, tensors: Tensors) -> Tensors:
        return self._prompts.prepare(tensors)

    def generate(self, request_id: str, tensors: Tensors, wanted: list[str]) -> Iterator[Tensors]:
        two_free = _TWO_FREE & set(tensors) or _LOGITS & set(wanted)
        return (self._triton if two_free else self._http).generate(request_id, tensors, wanted)

    def stop(self, request_id: str) -> None:
        self._http.stop(request_id)
