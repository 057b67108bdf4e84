"""What a machine has that builds engines, asked with one shell script, here or over ssh; and what it lacks for a job.

The script is POSIX sh and needs nothing but what every Linux has. ``installed`` knows how to ask for the version of
TensorRT-LLM without importing it, ``gpu`` what nvidia-smi says.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from toolchain import gpu as gpus
from toolchain import installed, runner
from toolchain.errors import ToolError
from toolchain.gpu import Gpu
from toolchain.host import EngineJob
from toolchain.hosts.command import size_of
from toolchain.installed import is_release
from toolchain.units import KIB, format_bytes

VERSION = f"""
trtllm_version() {{
  command -v trtllm-build > /dev/null && ({installed.ASK}) | sed -n 's/^tensorrt_llm //p'
}}
"""
"""A shell function: the version of TensorRT-LLM whose ``trtllm-build`` is on PATH."""

PROBE = f"""
folder=$1 image=$2 tools=$3
say() {{ printf 'scalellm %s %s\\n' "$1" "$2"; }}
nvidia-smi {shlex.join(gpus.QUERY)} 2>&1 | while IFS= read -r line; do say gpu "$line"; done
nvidia-smi -L 2> /dev/null | while IFS= read -r line; do say listed "$line"; done
({installed.ASK}) | sed 's/^/scalellm /'
for tool in $tools; do
  command -v "$tool" > /dev/null || continue
  if said=$("$tool" info 2>&1 > /dev/null); then said=; fi
  say tool "$tool $(printf '%s' "$said" | tail -n 1)"
  if "$tool" image inspect "$image" > /dev/null 2>&1; then say image "$tool"; fi
done
if [ -d "$folder" ]; then say used_kib "$(du -sk "$folder" | cut -f 1)"; fi
while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
say disk_kib "$(df -Pk "$folder" | awk 'NR == 2 {{ print $4 }}')"
say ram_kib "$(awk '/^(MemAvailable|SwapFree):/ {{ sum += $2 }} END {{ print sum }}' /proc/meminfo)"
if command -v rsync > /dev/null; then say rsync yes; fi
"""
"""Arguments: the folder whose disk is asked about, the image, the container tools to ask."""

_INSTALLED = {"builder", "tensorrt_llm"}
_TIMEOUT_S = 120.0


@dataclass
class Machine:
    """What the script found."""

    gpus: list[Gpu] = field(default_factory=list)
    gpu_words: str = ""
    """What ``nvidia-smi`` said instead of a GPU."""
    builder: str = ""
    version: str = ""
    tools: dict[str, str] = field(default_factory=dict)
    """docker, podman -> why it does not answer; empty where it does."""
    images: set[str] = field(default_factory=set)
    """The tools that have the image."""
    disk_bytes: int | None = None
    used_bytes: int = 0
    """What an earlier build of the same engine left in the folder."""
    ram_bytes: int | None = None
    rsync: bool = False

    def engine(self) -> str:
        """The container tool to use: one that has the image, else one that answers, else any; empty for none."""
        ranked = sorted(self.tools, key=lambda tool: (tool not in self.images, bool(self.tools[tool])))
        return ranked[0] if ranked else ""


def ask(argv: Sequence[str], where: str) -> runner.Completed:
    """Run the script by this command. Raises ToolError where nothing comes back in two minutes."""
    try:
        return runner.run(argv, timeout_s=_TIMEOUT_S, check=False)
    except ToolError as error:  # without the script, which nobody wants to read
        words = error.message.splitlines()[-1] if error.message.startswith("cannot start") else "no answer"
        raise ToolError(
            f"{where} does not say what it has within {_TIMEOUT_S:g} s: {words}",
            hint="nvidia-smi; docker info   # by hand, there: one of them hangs",
        ) from error


def parse(text: str) -> Machine:
    """The script's output -> the machine. Other lines, such as a login's greeting, are none of ours."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        mark, _, rest = line.partition(" ")
        if mark == "scalellm":
            word, _, value = rest.partition(" ")
            found.setdefault(word, []).append(value)
    rows = found.get("gpu", [])
    builder, version = installed.parse("\n".join(f"{word} {found[word][-1]}" for word in _INSTALLED & found.keys()))
    visible = list(gpus.parse("\n".join(rows), listing="\n".join(found.get("listed", ()))))
    return Machine(
        gpus=visible,
        gpu_words="" if visible else " ".join(rows),
        builder=builder or "",
        version=version or "",
        tools={name: wrong.strip() for name, _, wrong in (value.partition(" ") for value in found.get("tool", ()))},
        images=set(found.get("image", ())),
        disk_bytes=_bytes(found, "disk_kib"),
        used_bytes=_bytes(found, "used_kib") or 0,
        ram_bytes=_bytes(found, "ram_kib"),
        rsync="rsync" in found,
    )


def _bytes(found: Mapping[str, Sequence[str]], word: str) -> int | None:
    value = found.get(word, [""])[-1]
    return int(value) * KIB if value.isdigit() else None


def without_gpus(machine: Machine, job: EngineJob, used: Sequence[str] | None, *, on: str) -> list[str]:
    """Why the machine's GPUs do not do: too few, of another kind, or with too old a driver.

    ``used`` are those that the build will see, None for all of them. ``on`` is what names others, ``"container:"``.
    """
    wanted = f"{job.gpus} GPU{'s' * (job.gpus > 1)} of SM {job.device.sm}, such as the {job.device.title}"
    if not machine.gpus:
        said = f" (nvidia-smi: {machine.gpu_words})" if machine.gpu_words else ""
        return [f"{wanted}: it shows no GPU{said}"]
    fitting = [gpu for gpu in machine.gpus if gpu.sm == job.device.sm]
    seen = ", ".join(f"{gpu.index}: {gpu.name} (SM {gpu.sm})" for gpu in machine.gpus)
    if len(fitting) < job.gpus:
        return [f"{wanted}: it has {seen}"]
    taken = machine.gpus if used is None else [gpu for gpu in machine.gpus if str(gpu.index) in used]
    if len(taken) < job.gpus or any(gpu not in fitting for gpu in taken):
        named = ",".join(str(gpu.index) for gpu in _best(fitting, job)[: job.gpus])
        which = "all that it has" if used is None else f"GPU {','.join(used)}"
        return [f"{wanted}: the build would see {which}, of {seen}. Name them: --on {on}{named}"]
    return _old_driver(taken, job)


def _best(some: Iterable[Gpu], job: EngineJob) -> list[Gpu]:
    """The device of the plan itself first, then those with the most free memory."""

    def rank(gpu: Gpu) -> tuple[bool, int]:
        return (gpu.device is None or gpu.device.name != job.device.name, -(gpu.free_bytes or 0))

    return sorted(some, key=rank)


def _old_driver(used: Sequence[Gpu], job: EngineJob) -> list[str]:
    """One line where the driver is too old, and the cards cannot make up for it.

    NVIDIA's data center cards run a newer CUDA on an older driver with the compatibility package that the images hold
    (https://docs.nvidia.com/deploy/cuda-compatibility/, 2026-11-22).
    """
    floor = job.release.driver
    for gpu in used:
        if not (gpu.device and gpu.device.data_center) and _digits(gpu.driver) < _digits(floor):
            return [f"NVIDIA driver {floor} or newer, for TensorRT-LLM {job.release.version}: it has {gpu.driver}"]
    return []


def _digits(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def without_builder(machine: Machine, job: EngineJob) -> list[str]:
    """Why its own ``trtllm-build`` does not do."""
    version = job.release.version
    if not machine.builder:
        return [f"trtllm-build of TensorRT-LLM {version}: it is not on PATH"]
    if not is_release(machine.version, version):
        found = machine.version or "no version at all"
        return [f"trtllm-build of TensorRT-LLM {version}: {machine.builder} is of {found}"]
    return []


def without_container(machine: Machine, job: EngineJob, engine: str, pinned: str = "") -> list[str]:
    """Why a container of the release's image, or of ``pinned``, does not do with ``engine``, docker or podman."""
    if engine not in machine.tools:
        return ["docker or podman with the NVIDIA Container Toolkit"]
    if wrong := machine.tools[engine]:
        return [f"a {engine} that answers: {wrong}"]
    if engine not in machine.images:
        if pinned:
            return [f"the image {pinned}, which --on names"]
        return [f"the image of TensorRT-LLM {job.release.version}: {engine} pull {job.release.image}"]
    return []


def without_room(machine: Machine, job: EngineJob, *, copies: int) -> list[str]:
    """Why its disk or memory does not do, for ``copies`` of the checkpoint's size on the disk.

    An engine is about as large as its checkpoint, and the builder holds the weights of all ranks in RAM: with less free
    than the checkpoint has bytes it cannot work (derived). With less than 2.5 times it was seen to be killed
    (https://github.com/NVIDIA/TensorRT-LLM/issues/743), which is not refused: the failure says it then.
    """
    size = size_of(job.checkpoint)
    lacking = []
    wanted = copies * size - machine.used_bytes
    if machine.disk_bytes is not None and machine.disk_bytes < wanted:
        lacking.append(f"{format_bytes(wanted)} of disk: {format_bytes(machine.disk_bytes)} are free")
    if machine.ram_bytes is not None and machine.ram_bytes < size:
        lacking.append(f"{format_bytes(size)} of RAM: {format_bytes(machine.ram_bytes)} are free, swap included")
    return lacking
