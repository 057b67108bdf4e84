"""Ways to make and run an engine. One file or folder each; its name is the recipe's ``backend``.

Adding one: a module here that satisfies ``Backend``, and a folder of the same name in ``model_repo_templates``.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from toolchain.host import Host
from toolchain.planning.plan import Plan
from toolchain.progress import Progress

NAMES = ("tensorrt_engine", "tensorrt_llmapi", "openvino")


@dataclass(frozen=True)
class Order:
    """One engine to be built."""

    plan: Plan
    source: Path
    """What it is made from: the TensorRT-LLM checkpoint for tensorrt_engine, else the quantized checkpoint."""
    out: Path
    """The engine's draft folder."""
    progress: Progress
    key: str = ""
    """The engine's key."""
    host: Host | None = None
    """Where a foreign builder runs; None: here."""
    log: Path | None = None
    """The file that gets what a foreign builder says."""


class Backend(Protocol):
    """What a backend module offers. Nothing is imported before a stage asks for it."""

    name: str
    VERSION: str
    """Raised when the same inputs would give another engine."""

    def inputs(self, plan: Plan) -> dict[str, Any]:
        """What the engine depends on beyond the plan's slice and its source, as plain JSON."""

    def lacks(self, order: Order) -> tuple[str, ...]:
        """What is missing to build this engine, here or on the order's host, each in one line; empty for nothing."""

    def build(self, order: Order) -> None:
        """Fill the order's draft folder with the engine and the tokenizer's files, without re-quantizing."""

    def runtime(self, plan: Plan) -> dict[str, Any]:
        """Plain-JSON settings for the runtime that will load the engine; kept in its passport."""

    def versions(self) -> dict[str, str]:
        """The versions of the foreign libraries of this machine that made the engine, by distribution name."""


def load(name: str) -> Backend:
    """The backend of that name (one of ``NAMES``); imports its libraries."""
    return cast(Backend, importlib.import_module(f"toolchain.backends.{name}"))
