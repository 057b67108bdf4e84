"""Every error that a user can meet, in one tree; each knows its exit code and the next thing to type.

    ScalellmError            1
    ├── RecipeError          2   the recipe, or a flag, is wrong: carries every problem found
    ├── PlanError            3   the recipe is sound, but this device or model cannot run it
    ├── ToolError            4   a foreign program is missing or failed
    ├── ArtifactError        5   a file or folder is missing, truncated, corrupted or from another build
    ├── EndpointError        6   a server does not start, does not answer, or its port is taken
    └── RejectedError        7   the server, or a gate, refused this request

Errors are raised at the lowest place that knows the hint. Foreign exceptions become ours in the one file that calls
the foreign code. Only ``cli`` prints them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class ScalellmError(Exception):
    """Something that the user can act on.

    ``message`` says what is wrong and names the file, field or port; ``hint`` is the next thing to type or to look at,
    possibly several lines, possibly empty.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True)
class Problem:
    """One mistake in a file that the user wrote: where it stands, what is wrong, and what was probably meant."""

    path: str
    """The dotted path of the key, such as ``quantization.weights``; empty for the file as a whole."""
    message: str
    file: str = ""
    line: int = 0
    """1-based; 0 where no line is known."""
    suggestion: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}: " if self.file and self.line else f"{self.file}: " if self.file else ""
        name = f"{self.path}: " if self.path else ""
        tail = f" (did you mean {self.suggestion!r}?)" if self.suggestion else ""
        return f"{place}{name}{self.message}{tail}"


class RecipeError(ScalellmError):
    """The recipe, or a flag, is wrong. ``problems`` holds all of them, in the order of the file."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str = "", problems: Sequence[Problem] = ()) -> None:
        super().__init__(message, hint=hint)
        self.problems = tuple(problems)


class PlanError(ScalellmError):
    """The recipe is sound, but this device, release or model cannot run it. ``reasons`` holds each one."""

    exit_code = 3

    def __init__(self, message: str, *, hint: str = "", reasons: Sequence[str] = ()) -> None:
        super().__init__(message, hint=hint)
        self.reasons = tuple(reasons) or (message,)


class ToolError(ScalellmError):
    """A foreign program is missing or failed."""

    exit_code = 4


class ArtifactError(ScalellmError):
    """A file or folder is missing, truncated, corrupted or from another build."""

    exit_code = 5


class EndpointError(ScalellmError):
    """A server does not start, does not answer, or its port is taken."""

    exit_code = 6


class RejectedError(ScalellmError):
    """The server, or a gate, refused this request."""

    exit_code = 7
