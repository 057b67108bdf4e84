"""One thing that was looked at."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["ok", "warning", "fail", "absent"]
"""``absent``: not here, and nothing that is asked for needs it."""


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it stands, and what to do where it does not stand well."""

    name: str
    level: Level
    text: str
    hint: str = ""

    @property
    def ok(self) -> bool:
        return self.level == "ok"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}


def good(name: str, text: str) -> Finding:
    return Finding(name, "ok", text)


def warning(name: str, text: str, hint: str = "") -> Finding:
    return Finding(name, "warning", text, hint)


def fail(name: str, text: str, hint: str = "") -> Finding:
    return Finding(name, "fail", text, hint)


def absent(name: str, text: str, hint: str = "") -> Finding:
    return Finding(name, "absent", text, hint)
