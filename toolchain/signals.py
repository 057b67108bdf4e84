"""SIGINT and SIGTERM, for the length of a block. It knows nothing of what is to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_ENDING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def on_ending(call: Callable[[], None]) -> Iterator[None]:
    """``call`` for each of them that comes; the handlers before are back at the end. Main thread only."""

    def handle(*_: object) -> None:
        call()

    before = {number: signal.signal(number, handle) for number in _ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ending_sets(asked: threading.Event) -> Iterator[None]:
    """The first one sets ``asked``, a second one raises KeyboardInterrupt."""

    def ask() -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    with on_ending(ask):
        yield
