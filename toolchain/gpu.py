"""The GPUs of a machine, as its driver names them: through NVML where its Python package is, else through nvidia-smi.

It knows which device of the fact table a name stands for, and no recipe. Nothing here needs CUDA. A GPU that is cut by
MIG is told as its slices, because a program gets one of those.

NVML: https://docs.nvidia.com/deploy/nvml-api/ through the package nvidia-ml-py (functions looked at in 13.615.71). It
is optional: nvidia-smi says the same, but not how much memory of a MIG slice is free.
"""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from toolchain import runner
from toolchain.device import Device, reported_device
from toolchain.errors import ToolError
from toolchain.units import MIB

QUERY = (
    "--query-gpu=index,name,uuid,compute_cap,driver_version,memory.total,memory.free",
    "--format=csv,noheader,nounits",
)
"""Fields of https://docs.nvidia.com/deploy/nvidia-smi/ (2026-11-01)."""

OLD_QUERY = tuple(word.replace("compute_cap", "count") for word in QUERY)
"""Drivers up to R470 refuse ``compute_cap`` (https://github.com/huggingface/candle/issues/733); its column stays."""

APPS = ("--query-compute-apps=gpu_uuid,pid,used_gpu_memory,process_name", "--format=csv,noheader,nounits")
"""The name last: it is the only field that may hold a comma."""

VISIBLE = "CUDA_VISIBLE_DEVICES"
_SLICE = re.compile(r"^\s+MIG (?P<profile>\S+)\s+Device\s+\d+: \(UUID: (?P<uuid>\S+)\)")
_WHOLE = re.compile(r"^GPU (?P<index>\d+): (?P<name>.*) \(UUID: (?P<uuid>\S+)\)")
_TIMEOUT_S = 20


@dataclass(frozen=True)
class GpuProcess:
    """A program that holds memory of a GPU."""

    pid: int
    name: str
    """Empty where the driver does not say it, as from within a container."""
    bytes: int | None

    def __str__(self) -> str:
        size = f", {self.bytes // MIB} MiB" if self.bytes is not None else ""
        return f"pid {self.pid}" + (f" ({self.name}{size})" if self.name else size)


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one MIG slice of one."""

    index: int
    name: str
    """Such as ``"NVIDIA GeForce RTX 4090"`` or ``"NVIDIA A100-SXM4-40GB MIG 3g.20gb"``."""
    uuid: str
    sm: int | None
    """Compute capability times ten; None where neither the driver nor the fact table says it."""
    driver: str
    total_bytes: int | None
    """None of a slice that NVML was not asked for, and of memory that is the machine's own."""
    free_bytes: int | None
    processes: tuple[GpuProcess, ...] = ()

    @property
    def device(self) -> Device | None:
        """The device of the fact table; of a slice, the whole card's. None for a card that is not in it."""
        return reported_device(self.name)

    @property
    def is_slice(self) -> bool:
        return " MIG " in self.name


def gpus() -> tuple[Gpu, ...]:
    """The GPUs of this machine; empty where there is none, or no driver."""
    return _from_nvml() or _from_nvidia_smi()


def visible_gpus() -> list[tuple[str, int]]:
    """(name, SM) of each GPU whose SM is known, such as ``("NVIDIA GeForce RTX 4090", 89)``; empty without one."""
    return [(gpu.name, gpu.sm) for gpu in gpus() if gpu.sm is not None]


def names_of(device: str, environ: Mapping[str, str]) -> tuple[str, ...]:
    """This machine's GPUs of one device, as CUDA_VISIBLE_DEVICES names them, a MIG slice by its UUID; those that an
    ``environ`` with that variable leaves, in its order.
    """
    found = [one for one in gpus() if one.device is not None and one.device.name == device]
    visible = environ.get(VISIBLE)
    if visible is None:
        return tuple(one.uuid if one.is_slice else str(one.index) for one in found)
    known = {one.uuid for one in found} | {str(one.index) for one in found if not one.is_slice}
    return tuple(word for word in visible.replace(" ", "").split(",") if word in known)


def only(names: Sequence[str]) -> dict[str, str]:
    """The environment in which a program sees these GPUs alone, counted as nvidia-smi does; for no names, nothing.

    CUDA counts the fastest first unless it is told otherwise (CUDA C++ Programming Guide, environment variables,
    https://docs.nvidia.com/cuda/cuda-c-programming-guide/, 2026-11-22).
    """
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", VISIBLE: ",".join(names)} if names else {}


def parse(table: str, apps: str = "", listing: str = "") -> tuple[Gpu, ...]:
    """What nvidia-smi printed for ``QUERY`` (or ``OLD_QUERY``), ``APPS`` and ``-L`` -> GPUs. Skips what is no row."""
    users: dict[str, list[GpuProcess]] = {}
    for line in apps.splitlines():
        fields = [field.strip() for field in line.split(",", 3)]
        if len(fields) == 4 and fields[1].isdigit():
            users.setdefault(fields[0], []).append(GpuProcess(int(fields[1]), _known(fields[3]), _mib(fields[2])))
    slices = dict(_slices(listing))
    found: list[Gpu] = []
    for line in table.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 7 or not fields[0].isdigit():
            continue
        index, name, uuid, cap, driver, total, free = fields
        processes = tuple(users.get(uuid, ()))
        whole = Gpu(int(index), name, uuid, _sm(cap, name), driver, _mib(total), _mib(free), processes)
        parts = slices.get(uuid, [])
        found += [
            Gpu(whole.index, f"{name} MIG {profile}", part, whole.sm, driver, None, None) for profile, part in parts
        ] or [whole]
    return tuple(found)


def _slices(listing: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """UUID of a GPU -> (profile, UUID) of its MIG slices (https://docs.nvidia.com/datacenter/tesla/mig-user-guide/)."""
    parts: list[tuple[str, str]] = []
    for line in listing.splitlines():
        if whole := _WHOLE.match(line):
            parts = []
            yield whole["uuid"], parts
        elif part := _SLICE.match(line):
            parts.append((part["profile"], part["uuid"]))


def _sm(capability: str, name: str) -> int | None:
    """``"8.9"`` -> 89; of an old driver, what the fact table says of that name."""
    if re.fullmatch(r"\d+\.\d", capability):
        return int(capability.replace(".", ""))
    known = reported_device(name)
    return known.sm if known else None


def _mib(text: str) -> int | None:
    return int(text) * MIB if text.isdigit() else None


def _known(text: str) -> str:
    return "" if text.startswith("[") else text


def _from_nvidia_smi() -> tuple[Gpu, ...]:
    if shutil.which("nvidia-smi") is None:
        return ()
    table = _ask(*QUERY) or _ask(*OLD_QUERY)
    return parse(table, _ask(*APPS), _ask("-L")) if table else ()


def _ask(*words: str) -> str:
    """What nvidia-smi prints; empty where it fails, as without a driver."""
    try:
        return runner.run(["nvidia-smi", *words], timeout_s=_TIMEOUT_S).stdout
    except ToolError:
        return ""


def _from_nvml() -> tuple[Gpu, ...]:
    """What NVML says; empty without its package, its library or a driver."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return ()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return ()
    try:
        return tuple(gpu for index in range(nvml.nvmlDeviceGetCount()) for gpu in _of_nvml(nvml, index))
    except nvml.NVMLError:
        return ()
    finally:
        nvml.nvmlShutdown()


def _of_nvml(nvml: Any, index: int) -> Iterator[Gpu]:
    """One GPU, or its MIG slices, which have memory and processes of their own."""
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    name, driver = _text(nvml.nvmlDeviceGetName(handle)), _text(nvml.nvmlSystemGetDriverVersion())
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    parts = list(_nvml_slices(nvml, handle))
    for number, part in enumerate(parts or [handle]):
        shown = name if not parts else _slice_name(name, _text(nvml.nvmlDeviceGetName(part)), number)
        uuid = _text(nvml.nvmlDeviceGetUUID(part))
        memory = nvml.nvmlDeviceGetMemoryInfo(part)
        processes = tuple(_nvml_processes(nvml, part))
        yield Gpu(index, shown, uuid, 10 * major + minor, driver, memory.total, memory.free, processes)


def _slice_name(whole: str, part: str, number: int) -> str:
    """The slice's own name says its profile behind the word MIG; where it does not, its number does."""
    return part if " MIG " in part else f"{whole} MIG slice {number}"


def _nvml_slices(nvml: Any, handle: Any) -> Iterator[Any]:
    try:
        current, _pending = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError:  # a card that has no MIG
        return
    if not current:
        return
    for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        with suppress(nvml.NVMLError):  # a number that no slice has
            yield nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)


def _nvml_processes(nvml: Any, handle: Any) -> Iterator[GpuProcess]:
    """Programs that compute, and those that draw, such as a desktop; one that does both is told once."""
    seen: set[int] = set()
    for ask in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
        with suppress(nvml.NVMLError):
            for process in ask(handle):
                if process.pid not in seen:
                    seen.add(process.pid)
                    yield GpuProcess(process.pid, _nvml_name(nvml, process.pid), process.usedGpuMemory)


def _nvml_name(nvml: Any, pid: int) -> str:
    try:
        return _text(nvml.nvmlSystemGetProcessName(pid))
    except nvml.NVMLError:  # it has ended, or lives in another container
        return ""


def _text(value: str | bytes) -> str:
    """Packages up to 11.5 gave bytes."""
    return value.decode() if isinstance(value, bytes) else value
