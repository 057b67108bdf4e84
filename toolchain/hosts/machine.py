"""What a machine that builds engines lacks for a job. ``probe`` has asked it what it has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from toolchain import installed
from toolchain.gpu import Gpu
from toolchain.host import EngineJob
from toolchain.hosts.command import size_of
from toolchain.hosts.probe import Machine
from toolchain.installed import is_release
from toolchain.units import format_bytes

VERSION = f"""
trtllm_version() {{
  command -v trtllm-build > /dev/null && ({installed.ASK}) | sed -n 's/^tensorrt_llm //p'
}}
"""
"""A shell function: the version of TensorRT-LLM whose ``trtllm-build`` is on PATH."""


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
    if not is_release(machine.tensorrt_llm or "", version):
        found = machine.tensorrt_llm or "no version at all"
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
    if machine.disk_free is not None and machine.disk_free < wanted:
        lacking.append(f"{format_bytes(wanted)} of disk: {format_bytes(machine.disk_free)} are free")
    if machine.ram_free is not None and machine.ram_free + machine.swap_free < size:
        free = format_bytes(machine.ram_free + machine.swap_free)
        lacking.append(f"{format_bytes(size)} of RAM: {free} are free, swap included")
    return lacking
