"""A rented GPU: a SkyPilot task that builds the engine in the release's image, on a cloud that has the plan's GPU.

scalellm writes the task, SkyPilot finds a machine, sends the checkpoint, runs the builder and shows its output; rsync
fetches the engine, and the machine is given back. It runs where the user's cloud credentials are (``sky check``).

The authors of scalellm had none: the task is checked with SkyPilot's own reader, a rented machine was never seen.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

from toolchain import runner
from toolchain.document import yaml_text
from toolchain.errors import ToolError
from toolchain.host import EngineJob, HostCommand
from toolchain.hosts import watching
from toolchain.hosts.command import run_name, size_of
from toolchain.progress import Progress
from toolchain.units import GIB

PLACE = "scalellm-build"
"""The folder in the home of the rented machine."""
IDLE_MINUTES = 30
"""After which SkyPilot itself gives the machine back, should scalellm have died."""

_INFRA = re.compile(r"[a-z0-9][a-z0-9-]*(/[a-z0-9*-]+){0,2}", re.IGNORECASE)
_CHECK_TIMEOUT_S = 600.0
_DOWN_TIMEOUT_S = 900.0
_FETCHES = 3
_IMAGE_GB = 60
"""Room for the image, unpacked, and the system; NVIDIA's Triton images with TensorRT-LLM have some 20 to 30 GB (a guess
on the safe side)."""
_INSTALL = "pip install 'skypilot[CLOUD]==0.14.1'   # in an environment of its own: it wants another click"


class Sky:
    """``infra`` as SkyPilot takes it, ``"runpod"`` or ``"aws/us-east-1"``; empty: the cheapest offer that fits."""

    def __init__(self, infra: str = "") -> None:
        self.infra = infra
        self.name = f"sky:{infra}" if infra else "sky"

    def lacks(self, job: EngineJob) -> tuple[str, ...]:
        device, cloud = job.device, self.infra.partition("/")[0]
        if not device.skypilot:
            return (f"an offer: none of SkyPilot's clouds has the {device.title}",)
        clouds = {name.lower() for name in device.skypilot_clouds}
        if cloud and cloud.lower() not in clouds:
            listed = ", ".join(device.skypilot_clouds)
            return (f"an offer on {cloud}: SkyPilot rents the {device.title}, with an image, on {listed}",)
        missing = [tool for tool in ("sky", "rsync") if shutil.which(tool) is None]
        if missing:
            ways = {"sky": f"sky on this machine: {_INSTALL}", "rsync": "rsync on this machine: apt-get install rsync"}
            return tuple(ways[tool] for tool in missing)
        enabled, said = _enabled(cloud)
        if not {name.lower() for name in enabled} & ({cloud.lower()} if cloud else clouds):
            wanted = cloud or " or ".join(device.skypilot_clouds)
            return (f"credentials for {wanted}: sky check shows {', '.join(enabled) or 'none'}{said}",)
        return ()

    def commands(self, job: EngineJob) -> tuple[HostCommand, ...]:
        name, file = run_name(job), self.file(job)
        here = "this machine"
        write = f"cat > {shlex.quote(str(file))} << 'END'\n{self.task(job)}END"
        idle = ("--idle-minutes-to-autostop", str(IDLE_MINUTES), "--down")
        fetched = f"{job.out.absolute()}/"
        flags = ("--recursive", "--times", "--partial", "--info=progress2")
        return (
            HostCommand("the task", here, ("sh", "-c", write)),
            HostCommand("the engine, built", here, ("sky", "launch", "--cluster", name, "--yes", *idle, str(file))),
            HostCommand("the engine, fetched", here, ("rsync", *flags, "--", f"{name}:{PLACE}/engine/", fetched)),
            HostCommand("the machine, given back", here, ("sky", "down", "--yes", name)),
        )

    def file(self, job: EngineJob) -> Path:
        """Where the task is written: beside the engine's folder."""
        return job.out.absolute().with_name("sky.yaml")

    def task(self, job: EngineJob) -> str:
        """The task as YAML.

        Keys: https://docs.skypilot.co/en/latest/reference/yaml-spec.html. The disk holds the image, the checkpoint and
        the engine; the RAM is 2.5 times the checkpoint, below which builders were seen to be killed
        (https://github.com/NVIDIA/TensorRT-LLM/issues/743).
        """
        size = size_of(job.checkpoint)
        resources: dict[str, Any] = {
            "accelerators": f"{job.device.skypilot}:{job.gpus}",
            "image_id": f"docker:{job.release.image}",
            "disk_size": _IMAGE_GB + -(-5 * size // (2 * 10**9)),
            "memory": f"{max(16, -(-5 * size // (2 * GIB)))}+",
        }
        if self.infra:
            resources["infra"] = self.infra
        builder = shlex.join(job.argv("@HOME@/checkpoint", "@HOME@/engine")).replace("@HOME@", f'"$HOME"/{PLACE}')
        task = {
            "name": run_name(job),
            "resources": resources,
            "file_mounts": {f"~/{PLACE}/checkpoint": str(job.checkpoint.absolute())},
            "run": f'set -e\nmkdir -p "$HOME"/{PLACE}/engine\ncd "$(mktemp -d)"\n{builder}\n',
        }
        return yaml_text(task)

    def build(self, job: EngineJob, log: Path, progress: Progress) -> None:
        write, launch, fetch, down = self.commands(job)
        watching.fresh(log)
        runner.run(write.argv)
        progress.note(f"SkyPilot rents {job.gpus} x {job.device.skypilot}; should this end: {shlex.join(down.argv)}")
        try:
            code = watching.build(launch.argv, job, log, progress, on=self.name)
            if code:
                hint = f"sky gpus list {job.device.skypilot}   # who has one, and for how much"
                raise watching.failure(launch.argv, code, job, log, what="sky launch", hint=hint)
        except BaseException:
            _give_back(down)
            raise
        for _ in range(_FETCHES):
            code = watching.transfer(fetch.argv, size_of(job.checkpoint), log, progress, "fetch the engine")
            if not code:
                break
        if code:  # the engine was paid for: it stays there until the machine has been idle for long enough
            hint = (
                f"{shlex.join(fetch.argv)}\n{shlex.join(down.argv)}   # it goes by itself after {IDLE_MINUTES} minutes"
            )
            raise watching.failure(fetch.argv, code, job, log, what="rsync from the rented machine", hint=hint)
        _give_back(down)


def _give_back(down: HostCommand) -> None:
    runner.run(down.argv, timeout_s=_DOWN_TIMEOUT_S, check=False)


def _enabled(cloud: str) -> tuple[list[str], str]:
    """The clouds whose credentials SkyPilot finds, and what else it says where that is nothing."""
    only = (cloud,) if cloud else ()
    done = runner.run(("sky", "check", "-o", "json", *only), timeout_s=_CHECK_TIMEOUT_S, check=False)
    try:
        found = json.loads(done.stdout)
        return [name for clouds in found.values() for name in clouds], ""
    except (ValueError, AttributeError, TypeError):
        words = (done.stderr or done.stdout).strip().splitlines()
        return [], f" ({words[-1].strip()})" if words else ""


def connect(target: str) -> Sky:
    """``target`` is what follows the colon of ``--on``: a cloud, with its region if need be. Raises ToolError."""
    if target and not _INFRA.fullmatch(target):
        raise ToolError(f"--on sky:{target}: no name of a cloud", hint="--on sky, sky:runpod or sky:aws/us-east-1")
    return Sky(target)
