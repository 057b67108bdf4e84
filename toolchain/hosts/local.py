"""This machine: ``trtllm-build`` on PATH, as inside NVIDIA's container or an environment that has TensorRT-LLM."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from toolchain.host import EngineJob, HostCommand
from toolchain.hosts import machine, probe, watching
from toolchain.hosts.command import read_gpus, with_gpus
from toolchain.progress import Progress


class Local:
    """The machine that scalellm runs on. ``gpus``: those to use, by the numbers of nvidia-smi; empty for all."""

    def __init__(self, gpus: tuple[str, ...] = ()) -> None:
        self.gpus = gpus
        self.name = f"local:{','.join(gpus)}" if gpus else "local"

    def lacks(self, job: EngineJob) -> tuple[str, ...]:
        found = look(job, ())
        return (
            *machine.without_gpus(found, job, self.gpus or _visible(), on="local:"),
            *machine.without_builder(found, job),
            *machine.without_room(found, job, copies=1),
        )

    def commands(self, job: EngineJob) -> tuple[HostCommand, ...]:
        argv = with_gpus(job.argv(str(job.checkpoint.absolute()), str(job.out.absolute())), self.gpus)
        has = f"TensorRT-LLM {job.release.version}, as in {job.release.image}, and a GPU of SM {job.device.sm}"
        return (HostCommand("the engine", f"this machine, with {has}", argv),)

    def build(self, job: EngineJob, log: Path, progress: Progress) -> None:
        (command,) = self.commands(job)
        watching.fresh(log)
        code = watching.build(command.argv, job, log, progress, on=self.name)
        if code:
            raise watching.failure(command.argv, code, job, log, what="trtllm-build")


def look(job: EngineJob, tools: Iterable[str], pinned: str = "") -> probe.Machine:
    """What this machine has; ``tools`` are the container tools to ask for the release's image, or for ``pinned``."""
    script = probe.command(str(job.out.absolute()), pinned or job.release.image, tools)
    return probe.parse(probe.ask(script, "this machine").stdout)


def _visible() -> tuple[str, ...] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, where it names them by numbers; None where all are left."""
    named = tuple(os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "").split(","))
    return named if all(name.isdigit() for name in named) else None


def connect(target: str) -> Local:
    """``target`` is what follows the colon of ``--on``: the GPUs to use, ``"1"`` or ``"0,1"``. Raises ToolError."""
    return Local(read_gpus(target, f"local:{target}") if target else ())
