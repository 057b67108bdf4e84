"""A container of NVIDIA's image on this machine, with docker or podman: the image of the plan's release, pinned."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from toolchain import runner
from toolchain.errors import ToolError
from toolchain.host import EngineJob, HostCommand
from toolchain.hosts import machine, watching
from toolchain.hosts.command import IMAGE_NAME, container_argv, gpus_of, read_gpus, run_name
from toolchain.hosts.local import look
from toolchain.hosts.probe import TOOLS
from toolchain.progress import Progress

_RM_TIMEOUT_S = 60.0
_IMAGE = "image="


class Container:
    """``trtllm-build`` inside the image of the release.

    ``tool``: docker or podman, empty for whichever is on PATH; ``gpus``: those to use, empty for the first ones;
    ``network``: leave the container its network, which the build does not need; ``pinned``: another image, such as one
    that was compiled for an SM that the released one has no code for.
    """

    def __init__(self, tool: str = "", gpus: tuple[str, ...] = (), network: bool = False, pinned: str = "") -> None:
        self.tool, self.gpus, self.network, self.pinned = tool, gpus, network, pinned
        words = [
            *([tool] if tool else []),
            *(["network"] if network else []),
            *([f"{_IMAGE}{pinned}"] if pinned else []),
            *gpus,
        ]
        self.name = ":".join(["container", *([",".join(words)] if words else [])])

    def lacks(self, job: EngineJob) -> tuple[str, ...]:
        tool = self._tool()
        found = look(job, (tool,), self.pinned)
        return (
            *machine.without_gpus(found, job, gpus_of(job, self.gpus), on="container:"),
            *machine.without_container(found, job, tool, self.pinned),
            *machine.without_room(found, job, copies=1),
        )

    def commands(self, job: EngineJob) -> tuple[HostCommand, ...]:
        out = str(job.out.absolute())
        argv = container_argv(
            self._tool(),
            job,
            checkpoint=str(job.checkpoint.absolute()),
            out=out,
            user=f"{os.getuid()}:{os.getgid()}",
            gpus=gpus_of(job, self.gpus),
            keep_id=os.getuid() != 0,
            network=self.network,
            pinned=self.pinned,
        )
        return (
            HostCommand(
                "a folder of the caller's own; docker would make it root's", "this machine", ("mkdir", "-p", out)
            ),
            HostCommand("the engine", f"this machine, in {self.pinned or job.release.image}", argv),
        )

    def build(self, job: EngineJob, log: Path, progress: Progress) -> None:
        folder, command = self.commands(job)
        watching.fresh(log)
        runner.run(folder.argv)
        remove = (self._tool(), "rm", "--force", run_name(job))
        runner.run(remove, timeout_s=_RM_TIMEOUT_S, check=False)  # what a machine that lost its power left
        code = watching.build(command.argv, job, log, progress, on=self.name, afterwards=remove)
        if code:
            raise watching.failure(
                command.argv, code, job, log, what=f"trtllm-build in {self.pinned or job.release.image}"
            )

    def _tool(self) -> str:
        return self.tool or next((tool for tool in TOOLS if shutil.which(tool)), TOOLS[0])


def connect(target: str) -> Container:
    """``target`` is what follows the colon of ``--on``: GPUs, a tool, ``network``, ``image=NAME``: ``"podman,1"``.

    Raises ToolError.
    """
    words = target.split(",") if target else []
    tools = [word for word in words if word in TOOLS]
    images = [word.removeprefix(_IMAGE) for word in words if word.startswith(_IMAGE)]
    gpus = ",".join(word for word in words if word not in (*TOOLS, "network") and not word.startswith(_IMAGE))
    if any(not IMAGE_NAME.fullmatch(name) for name in images):
        raise ToolError(f"--on container:{target}: no name of an image", hint="--on container:image=NAME:TAG")
    if len(tools) > 1:
        raise ToolError(f"--on container:{target}: docker or podman, not both", hint="--on container:podman")
    picked = read_gpus(gpus, f"container:{target}") if gpus else ()
    return Container(tools[0] if tools else "", picked, "network" in words, images[-1] if images else "")
