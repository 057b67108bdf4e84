"""Ways to make and run an engine. One file or folder each; its name is the recipe's ``backend``.

Adding one: a module here that satisfies ``Backend``, and a folder of the same name in ``model_repo_templates``.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Protocol, cast

from toolchain.checkpoint import Checkpoint
from toolchain.plan import Plan
from toolchain.progress import Progress

NAMES = ("tensorrt_engine", "tensorrt_llmapi", "openvino")


class Backend(Protocol):
    """What a backend module offers. Nothing is imported before a stage asks for it."""

    name: str
    VERSION: str
    """Raised when the same inputs would give another engine."""

    def lacks(self, plan: Plan) -> tuple[str, ...]:
        """What this machine lacks to build this plan's engine, each in one line; empty when nothing is missing."""

    def build(self, checkpoint: Checkpoint, out: Path, progress: Progress) -> None:
        """Write the engine of a quantized checkpoint into the draft folder ``out``, without re-quantizing."""

    def runtime(self, plan: Plan) -> dict[str, Any]:
        """Plain-JSON settings for the runtime that will load the engine; kept in its passport."""

    def versions(self) -> dict[str, str]:
        """The versions of the foreign libraries that made the engine, by distribution name."""


def load(name: str) -> Backend:
    """The backend of that name (one of ``NAMES``); imports its libraries."""
    return cast(Backend, importlib.import_module(f"toolchain.backends.{name}"))
