"""Structured logs: one JSON object a line on standard error, a request id in each. No prompt text unless asked for."""

from __future__ import annotations

import json
import logging
import re
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TextIO

_EXPECTED = ("returned without completing response", "socket.send() raised exception")
"""Of clients that are cut off or gone: the line of the request says why."""
_OWN_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


def request_id(given: str | None) -> str:
    """The client's own ``X-Request-Id`` where it is a sane one, else a new one."""
    return given if given and _OWN_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"


class Log:
    """Where lines go."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def write(self, event: str, **facts: Any) -> None:
        """One line; facts of None are left out."""
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event}
        line |= {name: value for name, value in facts.items() if value is not None}
        stream = self._stream or sys.stderr
        stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        stream.flush()


@contextmanager
def libraries_into(log: Log) -> Iterator[None]:
    """What libraries log (uvicorn, asyncio) becomes lines of the same kind, for the length of a ``with`` block."""
    handler = _Handler(log)
    loggers = [logging.getLogger(name) for name in ("uvicorn.error", "asyncio")]
    before = [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, propagate in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.propagate = propagate


class _Handler(logging.Handler):
    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if any(expected in message for expected in _EXPECTED):
            return
        error = logging.Formatter().formatException(record.exc_info) if record.exc_info else None
        level, source = record.levelname.lower(), record.name
        self._log.write("log", level=level, source=source, message=message, traceback=error)
