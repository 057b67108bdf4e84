"""Command lines of a build, from what is known without looking at a machine. Runs nothing.

It holds what the hosts have in common: the image of a release, the names of GPUs, ``docker run`` and ``podman run``.
What ``trtllm-build`` is told comes from the job.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from toolchain import gpu
from toolchain.errors import ToolError
from toolchain.host import EngineJob

CHECKPOINT, ENGINE = "/checkpoint", "/engine"
"""The two folders as a container sees them."""

_GPUS = re.compile(r"\d+(,\d+)*")


def run_name(job: EngineJob) -> str:
    """``"scalellm-5f2c0a91d3e4"``: what a container or cluster of this build is called."""
    return f"scalellm-{job.key[:12]}"


IMAGE_NAME = re.compile(r"[\w][\w./:@-]*")
"""What ``docker run`` takes for an image, without blanks and commas."""


def read_gpus(spoken: str, whole: str) -> tuple[str, ...]:
    """``"1,3"`` -> ("1", "3"), as nvidia-smi counts them; ``whole`` is what ``--on`` said, for the message."""
    if not _GPUS.fullmatch(spoken):
        raise ToolError(
            f"--on {whole}: {spoken!r} is no list of GPUs", hint="Numbers as nvidia-smi gives them: 0 or 0,1"
        )
    return tuple(spoken.split(","))


def gpus_of(job: EngineJob, picked: Sequence[str]) -> tuple[str, ...]:
    """The GPUs that a container gets: those that were picked, else the first ones."""
    return tuple(picked) or tuple(str(index) for index in range(job.gpus))


def with_gpus(argv: Sequence[str], picked: Sequence[str]) -> tuple[str, ...]:
    """The command on these GPUs alone, counted as nvidia-smi does; none picked: on those that it would see anyway."""
    told = [f"{name}={value}" for name, value in gpu.only(picked).items()]
    return ("env", *told, *argv) if told else tuple(argv)


def container_argv(
    engine: str,
    job: EngineJob,
    *,
    checkpoint: str,
    out: str,
    user: str,
    gpus: Sequence[str],
    keep_id: bool,
    network: bool = False,
    pinned: str = "",
) -> tuple[str, ...]:
    """``docker run`` or ``podman run`` of ``trtllm-build``, in the foreground, removed afterwards.

    ``checkpoint`` (read-only) and ``out`` are folders of the machine, ``user`` is ``UID:GID`` of the caller, who has no
    home inside: HOME and the working folder, where the builder leaves its timing cache, are /tmp. An image that is not
    there yet is not pulled, which would take many minutes in silence. The build needs no network and gets none, unless
    ``network``. ``pinned`` is another image than the release's. memlock and stack are the limits that NVIDIA's images
    ask for at start; podman names GPUs as CDI devices, and without root maps the caller's uid only with keep-id
    (podman-run(1)), and SELinux would keep it from both folders and the GPU
    (https://docs.nvidia.com/datacenter/cloud-native/container-toolkit/latest/cdi-support.html). Docker reads ``--gpus``
    as CSV, so a list needs quotes of its own (https://docs.docker.com/reference/cli/docker/container/run/#gpus).
    """
    argv = [
        engine,
        "run",
        "--rm",
        f"--name={run_name(job)}",
        "--pull=never",
        *(() if network else ("--network=none",)),
        f"--user={user}",
        "--env=HOME=/tmp",
        "--workdir=/tmp",
        "--shm-size=1g",
        "--ulimit=memlock=-1",
        "--ulimit=stack=67108864",
        f"--volume={checkpoint}:{CHECKPOINT}:ro",
        f"--volume={out}:{ENGINE}",
    ]
    if PurePosixPath(engine).name == "podman":
        argv += ["--userns=keep-id"] if keep_id else []
        argv += ["--security-opt=label=disable", *(f"--device=nvidia.com/gpu={gpu}" for gpu in gpus)]
    else:
        listed = f'"device={",".join(gpus)}"' if len(gpus) > 1 else f"device={gpus[0]}"
        argv.append(f"--gpus={listed}")
    return (*argv, pinned or job.release.image, *job.argv(CHECKPOINT, ENGINE))


def size_of(folder: Path) -> int:
    """Bytes of the files right in a folder; 0 where there is none yet."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) if folder.is_dir() else 0
