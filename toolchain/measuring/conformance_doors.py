"""The doors of a running service, each asked the same way: KServe over HTTP and gRPC, and OpenAI's completions. What is
asked of them, ``conformance`` knows.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from toolchain.endpoint import Endpoint
from toolchain.errors import EndpointError, RejectedError

_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Reply:
    """A whole answer, or the pieces of a streamed one."""

    pieces: tuple[str, ...]
    finish: str | None = None
    prompt_tokens: int | None = None
    answer_tokens: int | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Door(Protocol):
    """One way to ask. Raises RejectedError for what is refused, EndpointError for what is broken."""

    name: str

    def ask(self, prompt: str, max_tokens: int, *, stream: bool, **sampling: Any) -> Reply:
        """``sampling`` as KServe names it: ``temperature``, ``top_p``, ``seed``, ``stop_words``, a guide."""

    def begin(self, prompt: str, max_tokens: int, **sampling: Any) -> None:
        """Take the first piece of a streamed answer and go away."""


class Poster(Protocol):
    """Takes a JSON body and answers it whole. Raises as a ``Door`` does."""

    model: str

    def post(self, body: dict[str, Any]) -> dict[str, Any]:
        """A JSON object for a JSON object."""


class Kserve:
    """Triton's ``tensorrt_llm_bls``."""

    def __init__(self, endpoint: Endpoint, protocol: Literal["http", "grpc"]) -> None:
        self.name = f"KServe {'HTTP' if protocol == 'http' else 'gRPC'}"
        self._endpoint, self._protocol = endpoint, protocol

    def ask(self, prompt: str, max_tokens: int, *, stream: bool, **sampling: Any) -> Reply:
        counts = {"return_num_input_tokens": True, "return_num_output_tokens": True}
        pieces: list[str] = []
        told: dict[str, Any] = {}
        for chunk in self._endpoint.generate(
            prompt, max_tokens=max_tokens, protocol=self._protocol, stream=stream, **counts, **sampling
        ):
            pieces.append(chunk.text)
            told |= {name: _plain(value) for name, value in chunk.outputs.items()}
        counts_told = told.get("num_input_tokens"), told.get("num_output_tokens")
        return Reply(tuple(pieces), told.get("finish_reason"), *counts_told)

    def begin(self, prompt: str, max_tokens: int, **sampling: Any) -> None:
        asked = self._endpoint.generate(prompt, max_tokens=max_tokens, protocol=self._protocol, **sampling)
        with closing(asked) as chunks:
            next(iter(chunks))


class Json:
    """OpenAI's completions, at ``/v1/completions`` or as a body of ``/predict``."""

    def __init__(self, name: str, url: str, model: str, key: str | None) -> None:
        self.name, self.model, self._url, self._key = name, model, url, key

    def ask(self, prompt: str, max_tokens: int, *, stream: bool, **sampling: Any) -> Reply:
        body = self._body(prompt, max_tokens, **sampling)
        if not stream:
            found = self.post(body)
            choice, used = found["choices"][0], found["usage"]
            return Reply((choice["text"],), choice["finish_reason"], used["prompt_tokens"], used["completion_tokens"])
        pieces, finish, used = [], None, None
        for event in self.events({**body, "stream": True, "stream_options": {"include_usage": True}}):
            used = event.get("usage") or used
            for choice in event["choices"]:
                pieces.append(choice["text"])
                finish = choice["finish_reason"] or finish
        counts = (used["prompt_tokens"], used["completion_tokens"]) if used else (None, None)
        return Reply(tuple(pieces), finish, *counts)

    def begin(self, prompt: str, max_tokens: int, **sampling: Any) -> None:
        with closing(self.events({**self._body(prompt, max_tokens, **sampling), "stream": True})) as events:
            next(iter(events))

    def post(self, body: dict[str, Any]) -> dict[str, Any]:
        with self._open(body) as answer:
            return dict(json.loads(answer.read()))

    def events(self, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        with self._open(body) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise EndpointError(str(event["error"]["message"]))
                    yield event

    def _body(self, prompt: str, max_tokens: int, **sampling: Any) -> dict[str, Any]:
        stop = sampling.pop("stop_words", None)
        if sampling.pop("guided_decoding_guide_type", None):
            sampling["structured_outputs"] = {"regex": sampling.pop("guided_decoding_guide")}
        greedy = {} if "temperature" in sampling else {"temperature": 0}  # without a word of it OpenAI samples
        return {
            "model": self.model, "prompt": prompt, "max_tokens": max_tokens, **greedy, **sampling,
            **({"stop": stop} if stop else {}),
        }  # fmt: skip

    def _open(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        try:
            return urllib.request.urlopen(request, timeout=_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            try:
                message = str(json.loads(error.read())["error"]["message"])
            except (ValueError, KeyError, TypeError):
                message = f"HTTP {error.code}"
            raise (EndpointError if error.code >= 500 else RejectedError)(message) from None
        except OSError as error:
            raise EndpointError(f"nobody answers at {self._url}: {error}") from None


def model_at(url: str, key: str | None) -> str:
    """The name of the model that ``/v1/models`` lists first. Raises EndpointError."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            return str(json.loads(answer.read())["data"][0]["id"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise EndpointError(f"{url} lists no model: {error}", hint="scalellm gateway --recipe RECIPE") from None


def kv_blocks_at(url: str, key: str | None) -> list[int] | None:
    """Blocks in use in each replica's KV cache, as a gateway's ``/status`` tells them; None where it does not."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            return [int(replica["kv_blocks"]["used"]) for replica in json.loads(answer.read())["replicas"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _plain(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value
