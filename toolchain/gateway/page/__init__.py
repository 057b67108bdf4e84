"""The page at ``/``: a chat with the model, how the endpoint is, its nodes. Plain files as they are; no build step.

The list of files is fixed and they are read once, so no request names a file. They come with a Content-Security-Policy
that allows scripts, styles and requests of this very server only. What they show they ask for as any client does, with
the reader's key where one is needed; the files themselves are no secret. How the page works it does not know.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.responses import Response

_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
INDEX = "index.html"
FILES = (
    INDEX,
    "page.css",
    "mark.svg",
    "api.js",
    "chat.js",
    "dom.js",
    "fleet.js",
    "main.js",
    "parameters.js",
    "snippets.js",
    "spark.js",
    "status.js",
    "stream.js",
    "text.js",
    "turn.js",
)
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
"""``no-cache``: kept, and asked for again by its ETag each time, so that a new release is seen at once."""


def add(app: FastAPI) -> None:
    """``/`` and ``/page/NAME`` for each file; none of them in the API's schema."""
    folder = Path(__file__).parent
    for name in FILES:
        path = "/" if name == INDEX else f"/page/{name}"
        answer = _answer((folder / name).read_bytes(), _TYPES[name.rpartition(".")[2]])
        app.add_api_route(path, answer, methods=["GET", "HEAD"], include_in_schema=False)


def _answer(content: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    tag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
    headers = {**HEADERS, "ETag": tag}

    async def answer(http: Request) -> Response:
        known = {one.strip().removeprefix("W/") for one in http.headers.get("if-none-match", "").split(",")}
        if tag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

    return answer
