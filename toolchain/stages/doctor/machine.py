"""This machine and the artifacts on it, whatever they are for."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from toolchain import workspace
from toolchain.errors import ScalellmError
from toolchain.gpu import visible_gpus
from toolchain.servers.triton import bundled
from toolchain.servers.triton.locate import find_server
from toolchain.stages.doctor.finding import Finding, absent, fail, good, warning
from toolchain.units import GIB, format_bytes

_PACKAGES = {
    "torch": "quantize",
    "transformers": "cpu",
    "openvino": "cpu",
    "openvino-genai": "cpu",
    "nvidia-pytriton": "cpu",
    "tritonclient": "",
}
"""Distribution -> the extra that brings it."""

_LITTLE_DISK = 20 * GIB
_LITTLE_MEMORY = 4 * GIB


def examine(work: Path) -> list[Finding]:
    """Everything worth knowing before a build on this machine, and the state of each artifact below ``work``."""
    return [*_machine(work), *_packages(), _triton(), _numpy(), *_containers(), *_artifacts(work)]


def _machine(work: Path) -> Iterator[Finding]:
    python = f"{platform.python_version()} ({sys.executable})"
    new = sys.version_info >= (3, 11)
    yield good("python", python) if new else fail("python", python, "Python 3.11 or newer")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shown = f"{format_bytes(memory)}, {len(os.sched_getaffinity(0))} cores"
    yield good("memory", shown) if memory > _LITTLE_MEMORY else fail("memory", shown, "4 GiB or more")
    place = next(folder for folder in (work, *work.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    shown = f"{format_bytes(free)} free in {place}"
    enough = free > _LITTLE_DISK
    yield good("disk", shown) if enough else warning("disk", shown, "a 13B model needs about 40 GB: --work DIR")
    gpus = ", ".join(f"{name} (SM {sm})" for name, sm in visible_gpus())
    yield good("gpu", gpus) if gpus else absent("gpu", "none (the CPU engine needs none)")
    builder = shutil.which("trtllm-build")
    hint = "run inside NVIDIA's tritonserver trtllm container on the GPU machine"
    yield good("trtllm-build", builder) if builder else absent("trtllm-build", "not on PATH", hint)


def _packages() -> Iterator[Finding]:
    for package, extra in _PACKAGES.items():
        try:
            yield good(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            name = f"'scalellm-toolchain[{extra}]'" if extra else package
            yield fail(package, "not installed", f"pip install {name}")


def _triton() -> Finding:
    try:
        server = find_server("auto", environ=os.environ)
        wheel = bundled.find_wheel()
        if server.kind == "bundled" and wheel is not None:
            bundled.check_stub(wheel.stub, bundled.environment(wheel, os.environ))
    except ScalellmError as error:
        return fail("tritonserver", error.message, error.hint)
    return good("tritonserver", f"{server.version} ({server.kind})")


def _numpy() -> Finding:
    version = importlib.metadata.version("numpy")
    try:
        bundled.check_numpy(version)
    except ScalellmError as error:
        return fail("numpy", error.message, error.hint)
    return good("numpy", version)


def _containers() -> Iterator[Finding]:
    found = ", ".join(name for name in ("docker", "podman") if shutil.which(name))
    yield good("containers", found) if found else absent("containers", "neither docker nor podman")


def _artifacts(work: Path) -> Iterator[Finding]:
    for stamp_file in sorted([*work.glob(f"*/*/{workspace.STAMP}"), *work.glob(f"*/*/*/{workspace.STAMP}")]):
        folder = stamp_file.parent
        try:
            known = workspace.read_stamp(folder)
            stamp = workspace.require(folder, known.stage if known else folder.name)
        except ScalellmError as error:
            yield fail(str(folder), error.message, error.hint)
            continue
        size = sum(record.size for record in stamp.files.values())
        yield good(str(folder), f"{format_bytes(size)}, made {stamp.created}, intact")
