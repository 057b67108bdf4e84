"""This machine: ``trtllm-build`` on PATH, as inside NVIDIA's container or an environment that has TensorRT-LLM."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from toolchain import runner
from toolchain.errors import ToolError
from toolchain.gpu import missing_gpu
from toolchain.host import EngineJob, HostCommand
from toolchain.progress import Progress

PROGRAM = "trtllm-build"


class Local:
    """The machine that scalellm runs on."""

    name = "local"

    def lacks(self, job: EngineJob) -> tuple[str, ...]:
        missing = missing_gpu(job.device.sm, job.device.title)
        if shutil.which(PROGRAM) is None:
            missing.append(f"{PROGRAM} of TensorRT-LLM {job.release.version}: it is not on PATH")
        return tuple(missing)

    def commands(self, job: EngineJob) -> tuple[HostCommand, ...]:
        argv = job.argv(str(job.checkpoint), str(job.out))
        where = f"this machine, with TensorRT-LLM {job.release.version} and a GPU of SM {job.device.sm}"
        return (HostCommand("the engine", where, argv),)

    def build(self, job: EngineJob, log: Path, progress: Progress) -> None:
        (command,) = self.commands(job)
        with runner.start(command.argv, log=log, env=os.environ) as process:
            code = process.wait()
        if code:
            raise ToolError(f"{PROGRAM} ended with exit code {code}\n{runner.tail(log)}", hint=f"The whole log: {log}")


def connect(target: str) -> Local:
    """``target`` is what follows the colon of ``--on``; this machine has none."""
    if target:
        raise ToolError(f"--on local:{target}: this machine has no other name", hint="--on local")
    return Local()
