"""What a machine has that builds engines, asked with one shell script, here or over ssh; and what it lacks for a job.

The script is POSIX sh and needs nothing but what every Linux has. The version of TensorRT-LLM is read from the metadata
of the Python that ``trtllm-build`` names in its first line: importing ``tensorrt_llm`` would take half a minute.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from toolchain import runner
from toolchain.device import reported_device
from toolchain.errors import ToolError
from toolchain.host import EngineJob
from toolchain.hosts.command import image, size_of
from toolchain.units import format_bytes

VERSION = r"""
trtllm_version() {
  IFS= read -r first < "$(command -v trtllm-build)" || return
  python=${first#??}; python=${python%% *}
  case $python in */python*) ;; *) python=$(dirname "$(command -v trtllm-build)")/python3 ;; esac
  [ -x "$python" ] || python=python3
  "$python" -c "import importlib.metadata as m; print(m.version('tensorrt_llm'))" 2>&1 | tail -n 1
}
"""
"""A shell function: the version of TensorRT-LLM whose ``trtllm-build`` is on PATH."""

PROBE = (
    VERSION
    + r"""
folder=$1 image=$2 tools=$3
say() { printf 'scalellm %s %s\n' "$1" "$2"; }
nvidia-smi --query-gpu=index,name,compute_cap,memory.total,memory.free,driver_version \
  --format=csv,noheader,nounits 2>&1 | while IFS= read -r line; do say gpu "$line"; done
if builder=$(command -v trtllm-build); then
  say builder "$builder"
  say version "$(trtllm_version)"
fi
for tool in $tools; do
  command -v "$tool" > /dev/null || continue
  if said=$("$tool" info 2>&1 > /dev/null); then said=; fi
  say tool "$tool $(printf '%s' "$said" | tail -n 1)"
  if "$tool" image inspect "$image" > /dev/null 2>&1; then say image "$tool"; fi
done
if [ -d "$folder" ]; then say used_kib "$(du -sk "$folder" | cut -f 1)"; fi
while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
say disk_kib "$(df -Pk "$folder" | awk 'NR == 2 { print $4 }')"
say ram_kib "$(awk '/^(MemAvailable|SwapFree):/ { sum += $2 } END { print sum }' /proc/meminfo)"
if command -v rsync > /dev/null; then say rsync yes; fi
"""
)
"""Arguments: the folder whose disk is asked about, the image, the container tools to ask.

Query fields: https://docs.nvidia.com/deploy/nvidia-smi/ (2026-11-01). https://packaging.python.org/en/latest/specifications/
core-metadata/ says where the version stands."""

_KIB = 1024
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Gpu:
    """One line of ``nvidia-smi``."""

    index: str
    name: str
    sm: int
    total_mib: int
    free_mib: int
    driver: str


@dataclass
class Machine:
    """What the script found."""

    gpus: list[Gpu] = field(default_factory=list)
    gpu_words: list[str] = field(default_factory=list)
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
    machine = Machine()
    for line in text.splitlines():
        mark, _, rest = line.partition(" ")
        if mark == "scalellm":
            _take(machine, *rest.partition(" ")[::2])
    return machine


def _take(machine: Machine, word: str, value: str) -> None:
    if word == "gpu":
        gpu = _gpu(value)
        machine.gpus.append(gpu) if gpu else machine.gpu_words.append(value)
    elif word == "tool":
        name, _, wrong = value.partition(" ")
        machine.tools[name] = wrong.strip()
    elif word == "image":
        machine.images.add(value)
    elif word in ("disk_kib", "used_kib", "ram_kib") and value.isdigit():
        setattr(machine, word.replace("_kib", "_bytes"), int(value) * _KIB)
    elif word in ("builder", "version"):
        setattr(machine, word, value)
    elif word == "rsync":
        machine.rsync = True


def _gpu(line: str) -> Gpu | None:
    fields = [part.strip() for part in line.split(",")]
    try:
        index, *name, capability, total, free, driver = fields
        return Gpu(index, ",".join(name), round(float(capability) * 10), int(total), int(free), driver)
    except ValueError:
        return None


def without_gpus(machine: Machine, job: EngineJob, used: Sequence[str] | None, *, on: str) -> list[str]:
    """Why the machine's GPUs do not do: too few, of another kind, or with too old a driver.

    ``used`` are those that the build will see, None for all of them. ``on`` is what names others, ``"container:"``.
    """
    wanted = f"{job.gpus} GPU{'s' * (job.gpus > 1)} of SM {job.device.sm}, such as the {job.device.title}"
    if not machine.gpus:
        said = next((f" (nvidia-smi: {words})" for words in machine.gpu_words), "")
        return [f"{wanted}: it shows no GPU{said}"]
    fitting = [gpu for gpu in machine.gpus if gpu.sm == job.device.sm]
    seen = ", ".join(f"{gpu.index}: {gpu.name} (SM {gpu.sm})" for gpu in machine.gpus)
    if len(fitting) < job.gpus:
        return [f"{wanted}: it has {seen}"]
    taken = machine.gpus if used is None else [gpu for gpu in machine.gpus if gpu.index in used]
    if len(taken) < job.gpus or any(gpu not in fitting for gpu in taken):
        named = ",".join(gpu.index for gpu in _best(fitting, job)[: job.gpus])
        which = "all that it has" if used is None else f"GPU {','.join(used)}"
        return [f"{wanted}: the build would see {which}, of {seen}. Name them: --on {on}{named}"]
    return _old_driver(taken, job)


def _best(gpus: Iterable[Gpu], job: EngineJob) -> list[Gpu]:
    """The device of the plan itself first, then those with the most free memory."""

    def rank(gpu: Gpu) -> tuple[bool, int]:
        known = reported_device(gpu.name)
        return (known is None or known.name != job.device.name, -gpu.free_mib)

    return sorted(gpus, key=rank)


def _old_driver(gpus: Sequence[Gpu], job: EngineJob) -> list[str]:
    """One line where the driver is too old, and the cards cannot make up for it.

    NVIDIA's data center cards run a newer CUDA on an older driver with the compatibility package that the images hold
    (https://docs.nvidia.com/deploy/cuda-compatibility/, 2026-11-22).
    """
    floor = job.release.driver
    for gpu in gpus:
        known = reported_device(gpu.name)
        if not (known and known.data_center) and _digits(gpu.driver) < _digits(floor):
            return [f"NVIDIA driver {floor} or newer, for TensorRT-LLM {job.release.version}: it has {gpu.driver}"]
    return []


def _digits(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def without_builder(machine: Machine, job: EngineJob) -> list[str]:
    """Why its own ``trtllm-build`` does not do."""
    version = job.release.version
    if not machine.builder:
        return [f"trtllm-build of TensorRT-LLM {version}: it is not on PATH"]
    if not same_release(machine.version, version):
        found = machine.version or "no version at all"
        return [f"trtllm-build of TensorRT-LLM {version}: {machine.builder} is of {found}"]
    return []


def same_release(found: str, wanted: str) -> bool:
    """Whether an installed version is that of the plan; ``0.17.0.post1`` and ``0.17.0+cu128`` are 0.17.0."""
    return found.partition("+")[0].partition(".post")[0] == wanted


def without_container(machine: Machine, job: EngineJob, engine: str, pinned: str = "") -> list[str]:
    """Why a container of the release's image, or of ``pinned``, does not do with ``engine``, docker or podman."""
    if engine not in machine.tools:
        return ["docker or podman with the NVIDIA Container Toolkit"]
    if wrong := machine.tools[engine]:
        return [f"a {engine} that answers: {wrong}"]
    if engine not in machine.images:
        if pinned:
            return [f"the image {pinned}, which --on names"]
        return [f"the image of TensorRT-LLM {job.release.version}: {engine} pull {image(job.release)}"]
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
