"""What GPUs a machine has: from NVML, from nvidia-smi of new and old drivers, MIG slices, and their reported names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.machines import bare, nvidia_smi
from toolchain import gpu
from toolchain.device import devices, reported_device
from toolchain.units import GIB, MIB

ADA = "0, NVIDIA GeForce RTX 4090, GPU-1, 8.9, 550.54.15, 24564, 23000"
T4 = "1, Tesla T4, GPU-2, 7.5, 550.54.15, 15360, 15000"
A100 = "0, NVIDIA A100-SXM4-40GB, GPU-3, 8.0, 570.124.06, 40960, 40000"
SLICES = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-3)
  MIG 3g.20gb     Device  0: (UUID: MIG-a)
  MIG 1g.5gb      Device  1: (UUID: MIG-b)
GPU 1: Tesla T4 (UUID: GPU-2)"""

NVML = """
class NVMLError(Exception): pass
class NVMLError_NotSupported(NVMLError): pass
class NVMLError_NotFound(NVMLError): pass
class Memory:
    def __init__(self, total, free): self.total, self.free = total, free
class Process:
    def __init__(self, pid, size): self.pid, self.usedGpuMemory = pid, size
open_ = False
def nvmlInit():
    global open_
    if {broken}: raise NVMLError("Driver Not Loaded")
    open_ = True
def nvmlShutdown():
    global open_
    assert open_
    open_ = False
def nvmlDeviceGetCount(): return 2
def nvmlDeviceGetHandleByIndex(index): return ("card", index)
def nvmlDeviceGetName(handle):
    if handle[0] == "part": return {part}
    return ["NVIDIA GeForce RTX 4090", "NVIDIA A100-SXM4-80GB"][handle[1]]
def nvmlSystemGetDriverVersion(): return b"575.57.08"
def nvmlDeviceGetCudaComputeCapability(handle): return [(8, 9), (8, 0)][handle[1]]
def nvmlDeviceGetUUID(handle): return f"GPU-{{handle}}"
def nvmlDeviceGetMemoryInfo(handle):
    if handle[0] == "part": return Memory(40 * 2**30, 39 * 2**30)
    return Memory(24 * 2**30, 10 * 2**30)
def nvmlDeviceGetMigMode(handle):
    if handle[1] == 0: raise NVMLError_NotSupported()
    return [1, 1]
def nvmlDeviceGetMaxMigDeviceCount(handle): return 7
def nvmlDeviceGetMigDeviceHandleByIndex(handle, number):
    if number != 2: raise NVMLError_NotFound()
    return ("part", handle[1])
def nvmlDeviceGetComputeRunningProcesses(handle):
    return [Process(7, 13 * 2**30), Process(8, None)] if handle[1] == 0 else []
def nvmlDeviceGetGraphicsRunningProcesses(handle):
    return [Process(8, None), Process(9, 300 * 2**20)] if handle[1] == 0 else []
def nvmlSystemGetProcessName(pid):
    if pid == 8: raise NVMLError_NotFound()
    return {{7: "python", 9: b"Xorg"}}[pid]
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The one folder on PATH; without NVML's package, whatever this machine has."""
    folder = bare(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    return folder


def install_nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, broken: bool = False, part: str) -> None:
    (tmp_path / "nvml").mkdir()
    (tmp_path / "nvml" / "pynvml.py").write_text(NVML.format(broken=broken, part=part))
    monkeypatch.syspath_prepend(str(tmp_path / "nvml"))
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)


def test_nvml_is_asked_first_and_names_who_holds_memory(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(path, T4)
    install_nvml(tmp_path, monkeypatch, part="'NVIDIA A100-SXM4-80GB MIG 3g.40gb'")
    ada, part = gpu.gpus()
    assert (ada.name, ada.sm, ada.driver, ada.total_bytes, ada.free_bytes) == (
        "NVIDIA GeForce RTX 4090",
        89,
        "575.57.08",
        24 * GIB,
        10 * GIB,
    )
    assert [str(one) for one in ada.processes] == ["pid 7 (python, 13312 MiB)", "pid 8", "pid 9 (Xorg, 300 MiB)"]
    assert (part.name, part.sm, part.free_bytes) == ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", 80, 39 * GIB)
    assert part.is_slice
    assert not ada.is_slice
    assert part.device is not None
    assert part.device.name == "a100-80gb"
    monkeypatch.delitem(sys.modules, "pynvml")


def test_a_slice_whose_name_says_no_profile_is_told_by_its_number(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_nvml(tmp_path, monkeypatch, part="b'NVIDIA A100-SXM4-80GB'")
    assert gpu.gpus()[1].name == "NVIDIA A100-SXM4-80GB MIG slice 0"
    monkeypatch.delitem(sys.modules, "pynvml")


def test_nvidia_smi_is_asked_where_nvml_finds_no_driver(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(path, T4)
    install_nvml(tmp_path, monkeypatch, broken=True, part="''")
    assert gpu.visible_gpus() == [("Tesla T4", 75)]
    monkeypatch.delitem(sys.modules, "pynvml")


def test_nvidia_smi_says_memory_and_programs_with_commas_in_their_names(path: Path) -> None:
    nvidia_smi(path, f"{ADA}\n{T4}", "GPU-1, 12, 500, /opt/a,b\nGPU-2, 13, [N/A], [Not Found]")
    ada, turing = gpu.gpus()
    assert ada.total_bytes == 24564 * MIB
    assert [str(one) for one in ada.processes] == ["pid 12 (/opt/a,b, 500 MiB)"]
    assert [str(one) for one in turing.processes] == ["pid 13"]
    assert [one.device.name for one in (ada, turing) if one.device] == ["rtx4090", "t4"]


def test_an_old_driver_that_knows_no_compute_capability_is_told_by_the_table(path: Path) -> None:
    nvidia_smi(
        path, "0, Tesla T4, GPU-2, 1, 470.182.03, 15109, 15000\n1, Tesla K80, GPU-4, 1, 470.1, 11441, 11000", old=True
    )
    assert [(one.name, one.sm) for one in gpu.gpus()] == [("Tesla T4", 75), ("Tesla K80", None)]
    assert gpu.visible_gpus() == [("Tesla T4", 75)]


def test_a_cut_gpu_is_its_slices_whose_memory_nvidia_smi_does_not_say(path: Path) -> None:
    nvidia_smi(path, f"{A100}\n{T4}", listing=SLICES)
    found = gpu.gpus()
    assert [one.name for one in found] == [
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "Tesla T4",
    ]
    assert [(one.uuid, one.free_bytes) for one in found[:2]] == [("MIG-a", None), ("MIG-b", None)]
    assert found[0].device is not None
    assert found[0].device.name == "a100-40gb"


def test_no_driver_is_no_gpu(path: Path) -> None:
    assert gpu.gpus() == ()
    (path / "nvidia-smi").write_text(
        "#!/bin/sh\necho 'NVIDIA-SMI has failed because it could not talk to it'; exit 9\n"
    )
    (path / "nvidia-smi").chmod(0o755)
    assert gpu.gpus() == ()


def test_what_is_no_row_is_passed_over() -> None:
    assert gpu.parse(f"Welcome to gpu-box\n{ADA}\n0, half, a, row") == gpu.parse(ADA)
    unified = gpu.parse("0, NVIDIA GB10, GPU-9, 12.1, 580.95.05, [N/A], [N/A]")[0]
    assert (unified.sm, unified.total_bytes) == (121, None)


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla T4", "t4"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB MIG 1g.5gb", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A10", None),
    ],
)
def test_a_reported_name_is_one_device_or_none_and_never_its_neighbor(reported: str, name: str | None) -> None:
    found = reported_device(reported)
    assert (found.name if found else None) == name


def test_every_gpu_of_the_table_has_a_reported_name_of_its_own() -> None:
    names = [name for one in devices().values() for name in one.reported_as]
    assert len(names) == len(set(names))
    assert all(one.reported_as or one.is_cpu for one in devices().values())
    consumer = {one.name for one in devices().values() if not one.data_center and not one.is_cpu}
    assert consumer == {"rtx4090", "rtx3090", "rtx5090"}


def test_gpus_are_named_as_cuda_names_them_and_only_those_that_are_visible(path: Path) -> None:
    ada = ADA.replace("0, ", "2, ", 1).replace("GPU-1", "GPU-9")
    nvidia_smi(path, f"{ADA}\n{T4}\n{ada}")
    assert gpu.names_of("rtx4090", {}) == ("0", "2")
    assert gpu.names_of("rtx4090", {"CUDA_VISIBLE_DEVICES": "GPU-9, 1,0"}) == ("GPU-9", "0")
    assert gpu.names_of("rtx4090", {"CUDA_VISIBLE_DEVICES": ""}) == ()
    assert gpu.names_of("h100", {}) == ()


def test_a_slice_is_named_by_its_uuid(path: Path) -> None:
    nvidia_smi(path, A100, listing=SLICES)
    assert gpu.names_of("a100-40gb", {}) == ("MIG-a", "MIG-b")
