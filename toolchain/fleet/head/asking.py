"""What an operator's command asks of an endpoint's head, by way of its board; and what has happened since."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from toolchain import errors
from toolchain.errors import EndpointError, RejectedError, ScalellmError
from toolchain.fleet.board import Board

_ASKED_S = 30.0
"""Until a head has answered."""
_POLL_S = 0.2


def ask(board: Board, what: Mapping[str, Any], timeout_s: float = _ASKED_S) -> dict[str, Any]:
    """Ask the head of an endpoint, and wait for its answer. Raises ScalellmError for what it refuses."""
    name = uuid.uuid4().hex
    board.put(f"asks/{name}", what, ttl_s=timeout_s)
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if found := board.read(f"answers/{name}"):
            answer = found[f"answers/{name}"]
            if answer["error"]:
                raise _kind(int(answer["code"]))(answer["error"], hint=answer["hint"])
            return answer
        time.sleep(_POLL_S)
    board.remove(f"asks/{name}")
    raise EndpointError(f"the endpoint's head has not answered within {timeout_s:g} s")


def _kind(code: int) -> type[ScalellmError]:
    kinds = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, ScalellmError)]
    return next((one for one in kinds if one.exit_code == code), ScalellmError)


def outcome(events: Iterable[Mapping[str, Any]], on_event: Callable[[Mapping[str, Any]], None]) -> None:
    """Follow an update to its end. Raises RejectedError where it was given up and the old version stays, EndpointError
    where the events end before.
    """
    for event in events:
        on_event(event)
        if event["kind"] == "updated":
            return
        if event["kind"] == "rolled back":
            raise RejectedError(str(event["text"]))
    raise EndpointError("the endpoint has ended before the update was over")


def events(file: Path, begin: int, more: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """What happens, from a byte of the file on, for as long as ``more``."""
    with file.open("a+", encoding="utf-8") as stream:
        stream.seek(begin)
        rest = ""
        while True:
            goes_on = more()
            *lines, rest = (rest + stream.read()).split("\n")
            yield from (json.loads(line) for line in lines if line)
            if not goes_on:
                return
            time.sleep(_POLL_S)
