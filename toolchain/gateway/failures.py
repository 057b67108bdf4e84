"""What goes wrong on the way to an answer, and OpenAI's error objects for it.

    {"error": {"message": "...", "type": "invalid_request_error", "param": "max_tokens", "code": null}}

Types and codes are those of OpenAI's API (https://platform.openai.com/docs/guides/error-codes, 2026).
"""

from __future__ import annotations

import re
from typing import Any

from toolchain.endpoint import plain_message

_REFUSAL = re.compile(r"(?P<tensor>[a-z][a-z0-9_]*)(?: \(client input (?P<input>\w+)\))?: (?P<why>.+)", re.DOTALL)
"""How our Triton models word what a client did wrong: the tensor's name, then the reason."""
_MALFORMED = re.compile(r"Unable to parse|attempt to access JSON|expected|unexpected shape|not an input", re.IGNORECASE)
_TOO_LONG = re.compile(r"this engine takes at most \d+(?: together)?$")
_BUSY = "try again later"
_BROKEN = re.compile(
    r"is not healthy|must be restarted|unknown model|is not ready|is not found|unavailable|shutting down|cancelled",
    re.IGNORECASE,
)
_FIELDS = {
    "request_output_len": "max_tokens",
    "num_return_sequences": "n",
    "stop_words": "stop",
    "stop_words_list": "stop",
    "runtime_top_k": "top_k",
    "runtime_top_p": "top_p",
    "embedding_bias": "logit_bias",
    "embedding_bias_words": "logit_bias",
    "embedding_bias_weights": "logit_bias",
    "guided_decoding_guide_type": "response_format",
    "guided_decoding_guide": "response_format",
    "return_log_probs": "logprobs",
    "input_ids": "prompt",
    "text_input": "prompt",
}
"""Triton's tensors -> OpenAI's fields, where they differ."""


class ApiError(Exception):
    """An answer that is an error: the HTTP status and OpenAI's object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        found = {"Retry-After": str(max(1, round(self.retry_after_s)))} if self.retry_after_s is not None else {}
        return {**found, "WWW-Authenticate": "Bearer"} if self.status == 401 else found


class UpstreamError(Exception):
    """This Triton could not take the request or lost it; another one, or the same one later, may well answer it."""


class SilentError(UpstreamError):
    """Nothing came from it in time: it hangs, or it has much to do."""


class UnreachedError(UpstreamError):
    """No connection to it in time: nothing was asked of it yet."""


class BusyError(Exception):
    """This Triton has no room for another request just now."""


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the client's own mistake."""
    return ApiError(400, message, param=param, code=code)


def refused(message: str) -> ApiError:
    """What our Triton models' own code says of a request, where it runs in this process: as if Triton had said it."""
    found = of_triton(400, message)
    return found if isinstance(found, ApiError) else invalid(message)


def too_many(message: str, *, retry_after_s: float, code: str = "rate_limit_exceeded") -> ApiError:
    """429, with the time after which it may be tried again."""
    return ApiError(429, message, kind="rate_limit_error", code=code, retry_after_s=retry_after_s)


def unavailable(message: str, retry_after_s: float = 2.0) -> ApiError:
    """503: nobody there who could answer."""
    return ApiError(503, message, kind="server_error", code="service_unavailable", retry_after_s=retry_after_s)


def broken(message: str) -> ApiError:
    """502: the server behind us failed at this request."""
    return ApiError(502, message, kind="server_error", code="upstream_error")


def of_triton(status: int, text: str) -> Exception:
    """Triton's answer to a request that it did not take -> ApiError, BusyError or UpstreamError.

    Triton 2.51 says HTTP 400 for nearly everything a decoupled model answers, dead workers included, so the words
    decide. They are passed on without the traceback and the paths that its Python backend appends.
    """
    message = plain_message(text)
    if _BUSY in message or status == 429:
        return BusyError(message)
    refusal = _REFUSAL.fullmatch(message)
    if refusal:
        name = refusal["input"] or refusal["tensor"]
        code = "context_length_exceeded" if _TOO_LONG.search(message) else None
        return invalid(message, _FIELDS.get(name, name), code)
    if _BROKEN.search(message) or status == 503:
        return UpstreamError(message)
    if _MALFORMED.search(message):
        return invalid(f"the engine's server refuses the request: {message}")
    return broken(f"the engine's server failed at this request: {message}")
