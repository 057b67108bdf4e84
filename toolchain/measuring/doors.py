"""Ways into a server: Triton over gRPC and HTTP, OpenAI's API, ``/predict``; each a stream of pieces with times.

A session is one kept connection that carries one request at a time, so that no connecting is in a latency. What a
server refuses or breaks is raised; nothing is sent twice. It knows nothing of load, prompts or statistics.
"""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from urllib.parse import urlsplit

from toolchain.errors import EndpointError, RejectedError, ScalellmError

KINDS = ("triton-grpc", "triton-http", "openai-chat", "openai-completions", "predict")
CONNECT_S = 5.0
_PROBE_TOKENS = 8
DRAFTED, ACCEPTED = "total_draft_tokens", "total_accepted_draft_tokens"
"""Outputs of ``return_perf_metrics`` in TensorRT-LLM's model repository (tensorrt_llm_bls/config.pbtxt, 1.2, 2026)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that came at ``at_s`` (``time.perf_counter()``)."""

    text: str
    at_s: float
    tokens: int | None = None
    """How many the server says that it has generated so far."""
    whole: bool = False
    """The complete answer in one piece: it was not streamed."""
    drafts: tuple[int, int] | None = None
    """(drafted, accepted) tokens so far, where the server says it."""


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
    drafts: bool = False
    """Ask how many tokens were drafted and accepted; only of Triton."""

    def open(self) -> Session:
        """EndpointError when nobody is there."""
        if self.kind == "triton-grpc":
            from toolchain.measuring.grpc_door import GrpcSession

            return GrpcSession(self)
        from toolchain.measuring.http_doors import http_session

        return http_session(self)

    def about(self) -> dict[str, str]:
        """What the server says of itself: names and versions; empty where it says nothing."""
        if self.kind == "triton-grpc":
            with suppress(Exception):
                import tritonclient.grpc as triton

                from toolchain.measuring.grpc_door import CHANNEL

                with triton.InferenceServerClient(self.url, channel_args=CHANNEL) as client:
                    found = client.get_server_metadata(client_timeout=CONNECT_S)
                    return {"name": found.name, "version": found.version}
            return {}
        base = self.url.rstrip("/")
        root = "{0.scheme}://{0.netloc}".format(urlsplit(base))
        pages = {"triton-http": f"{base}/v2", "predict": f"{root}/version"}
        found = page(pages.get(self.kind, f"{root}/version"), self.key)
        return {name: str(found[name]) for name in ("name", "version") if name in found}


def counting_drafts(door: Door) -> Door:
    """The door, asking for drafts where the engine behind it drafts: other engines refuse to tell, or say none.

    It takes one short request. What else is wrong with the server, the next request says.
    """
    if door.kind not in ("triton-grpc", "triton-http"):
        return door
    asking = replace(door, drafts=True)
    with suppress(ScalellmError):
        session = asking.open()
        try:
            pieces = list(session.ask("one two three, one two three, one two", _PROBE_TOKENS, lambda: None))
        finally:
            session.close()
        if any(piece.drafts and piece.drafts[0] for piece in pieces):
            return asking
    return door


def first_model(url: str, key: str = "") -> str:
    """The first model that an OpenAI server lists. EndpointError when it lists none."""
    base = url.rstrip("/").removesuffix("/v1")
    with suppress(KeyError, IndexError, TypeError):
        return str(page(f"{base}/v1/models", key)["data"][0]["id"])
    raise EndpointError(f"{url}: no list of models at /v1/models", hint="is it served? else --name MODEL")


def triton_inputs(door: Door, known: set[str], prompt: str, max_tokens: int) -> dict[str, Any]:
    """The tensors of ``tensorrt_llm_bls`` and the ensemble, as far as the model has them."""
    inputs: dict[str, Any] = {"text_input": prompt, "max_tokens": max_tokens, "stream": True}
    wished: dict[str, Any] = {"return_num_output_tokens": True, "exclude_input_in_output": True}
    if door.drafts:
        wished["return_perf_metrics"] = True
    if door.ignore_eos:
        if "min_tokens" not in known:
            raise RejectedError(f"the model {door.model} has no input min_tokens", hint="leave --ignore-eos out")
        wished["min_tokens"] = max_tokens
    return inputs | {name: value for name, value in wished.items() if name in known}


def page(url: str, key: str = "") -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=CONNECT_S)
    with suppress(OSError, http.client.HTTPException, ValueError):
        connection.request("GET", parts.path, headers={"Authorization": f"Bearer {key}"} if key else {})
        response = connection.getresponse()
        found = json.loads(response.read())
        if response.status == 200 and isinstance(found, dict):
            return found
    connection.close()
    return {}


def short(text: str) -> str:
    """Without the traceback that Triton's Python backend appends."""
    return re.split(r"\n+At:\n|\n?Traceback \(most recent", text)[0].strip()[:300]
