"""How long work tells that it goes on, without knowing who watches.

A stage takes a ``Progress`` and opens one ``Task`` for each thing worth a bar. ``console`` draws them with rich;
``Silent`` is for callers that do not watch.
"""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self


class Task(Protocol):
    """One bar: entered before the work, left after it."""

    def advance(self, amount: int) -> None: ...

    def describe(self, text: str) -> None:
        """What the work is at just now, such as ``"layer 7 of 40"``."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Progress(Protocol):
    """Where bars come from."""

    def task(self, label: str, total: int, unit: str) -> Task:
        """``unit`` is ``"bytes"`` (shown as MiB/s) or the plural of what is counted, such as ``"layers"``."""

    def note(self, text: str) -> None:
        """One line worth keeping, such as ``"quantize: resumed at layer 12 of 40"``."""


class _SilentTask:
    def advance(self, amount: int) -> None:
        pass

    def describe(self, text: str) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class Silent:
    """A ``Progress`` that nobody watches."""

    def task(self, label: str, total: int, unit: str) -> Task:
        return _SilentTask()

    def note(self, text: str) -> None:
        pass
