"""Asks a running Triton whether it is alive, whether it is ready, and whether it really generates.

Only the last question counts: when a model's Python process dies or hangs, Triton 2.51 goes on saying "ready" (HTTP
200), and requests in flight hang for ever. So readiness is one generated token by a deadline. Standard library only.
"""

from __future__ import annotations

import http.client
import json
import time
from dataclasses import dataclass
from typing import Literal

_BUSY_STATUS = frozenset({429, 503})
_BUSY_TEXT = "try again later"
"""Refused for want of room: the model answered, so it lives. Our models say it in these words, because Triton 2.51
answers HTTP 400 for every error of a decoupled model."""


@dataclass(frozen=True)
class Verdict:
    """What one probe found, and how long it took."""

    state: Literal["ok", "busy", "timeout", "refused", "failed"]
    detail: str = ""
    seconds: float = 0.0

    @property
    def alive(self) -> bool:
        return self.state in {"ok", "busy"}


def is_live(address: tuple[str, int], timeout_s: float = 2.0) -> bool:
    """GET /v2/health/live: the server's process answers."""
    return _get(address, "/v2/health/live", timeout_s) == 200


def is_ready(address: tuple[str, int], model: str | None = None, timeout_s: float = 2.0) -> bool:
    """GET /v2/health/ready, or the model's: what Triton believes (see above for what that is worth)."""
    return _get(address, f"/v2/models/{model}/ready" if model else "/v2/health/ready", timeout_s) == 200


def one_token(address: tuple[str, int], model: str, deadline_s: float, prompt: str = "Hi") -> Verdict:
    """Generates one token: POST /v2/models/MODEL/generate, answered within ``deadline_s``.

    ``busy``: refused for want of room; ``refused``: no connection, or cut before the answer; ``failed``: the answer is
    an error. ``detail`` is Triton's or the system's message.
    """
    begun = time.monotonic()
    connection = http.client.HTTPConnection(*address, timeout=deadline_s)
    try:
        body = json.dumps({"text_input": prompt, "max_tokens": 1, "stream": False})
        connection.request("POST", f"/v2/models/{model}/generate", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        status, text = response.status, response.read().decode(errors="replace")
    except TimeoutError:
        return Verdict("timeout", f"no token within {deadline_s:g} s", time.monotonic() - begun)
    except (OSError, http.client.HTTPException) as error:
        return Verdict("refused", str(error) or type(error).__name__, time.monotonic() - begun)
    finally:
        connection.close()
    seconds = time.monotonic() - begun
    if status == 200:
        return Verdict("ok", seconds=seconds)
    message = _message(text)
    busy = status in _BUSY_STATUS or _BUSY_TEXT in message
    return Verdict("busy" if busy else "failed", message, seconds)


def _message(body: str) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body[:500]


def _get(address: tuple[str, int], path: str, timeout_s: float) -> int:
    connection = http.client.HTTPConnection(*address, timeout=timeout_s)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()
