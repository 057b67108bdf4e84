"""A host: a machine, or a container on it, where ``trtllm-build`` runs; and what it is asked to build.

Only the contract stands here. The ways to reach a host are in ``hosts``; what an engine needs is decided in ``plan``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from toolchain.device import Device
from toolchain.progress import Progress
from toolchain.release import Release


@dataclass(frozen=True)
class EngineJob:
    """One run of ``trtllm-build``, wherever it runs."""

    recipe: str
    """The recipe's name, for messages."""
    release: Release
    device: Device
    gpus: int
    """Ranks that are built at the same time, tp x pp."""
    checkpoint: Path
    """The folder of the TensorRT-LLM checkpoint, on this machine."""
    out: Path
    """The folder, on this machine, that gets ``config.json`` and ``rank{N}.engine``; it is there and empty."""
    argv: Callable[[str, str], tuple[str, ...]]
    """(checkpoint, out), as the host sees the two folders -> the argv of ``trtllm-build``."""
    key: str
    """Of the engine: what is left of an interrupted build on another machine is found again by it."""


@dataclass(frozen=True)
class HostCommand:
    """One command line that a build runs, and what it is for."""

    says: str
    where: str
    """``"this machine"``, or on which."""
    argv: tuple[str, ...]


class Host(Protocol):
    """Where engines are built."""

    @property
    def name(self) -> str:
        """As ``--on`` names it: ``"local"``, ``"container"``, ``"ssh:gpu-box"``."""

    def lacks(self, job: EngineJob) -> tuple[str, ...]:
        """What this host lacks for the job, each in one line; empty when nothing is missing. Changes nothing."""

    def commands(self, job: EngineJob) -> tuple[HostCommand, ...]:
        """The command lines that ``build`` runs, in order, ready to paste. Runs nothing."""

    def build(self, job: EngineJob, log: Path, progress: Progress) -> None:
        """Fill ``job.out`` and append all output to ``log``.

        Raises ToolError with the last lines and, where it is known, the likely cause and what to do.
        """
