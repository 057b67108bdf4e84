"""Examine this machine and the artifacts on it: what works, what is missing, what to type. Changes nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from toolchain import workspace
from toolchain.errors import ScalellmError
from toolchain.gpu import visible_gpus
from toolchain.servers.triton import bundled
from toolchain.servers.triton.locate import find_server
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


@dataclass(frozen=True)
class Finding:
    """One thing looked at. ``needed``: whether the main job on this machine fails without it."""

    name: str
    ok: bool
    text: str
    hint: str = ""
    needed: bool = True


def examine(work: Path) -> list[Finding]:
    """Everything worth knowing before a build on this machine, and the state of each artifact below ``work``."""
    return [*_machine(work), *_packages(), _triton(), _numpy(), *_containers(), *_artifacts(work)]


def _machine(work: Path) -> Iterator[Finding]:
    python = platform.python_version()
    yield Finding("python", sys.version_info >= (3, 11), f"{python} ({sys.executable})", "Python 3.11 or newer")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    yield Finding("memory", memory > _LITTLE_MEMORY, f"{format_bytes(memory)}, {cores} cores", "4 GiB or more")
    place = next(folder for folder in (work, *work.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    hint = "" if free > _LITTLE_DISK else "a 13B model needs about 40 GB: --work DIR"
    yield Finding("disk", free > _LITTLE_DISK, f"{format_bytes(free)} free in {place}", hint, needed=False)
    gpus = visible_gpus()
    shown = ", ".join(f"{name} (SM {sm})" for name, sm in gpus) or "none (the CPU engine needs none)"
    yield Finding("gpu", bool(gpus), shown, needed=False)
    builder = shutil.which("trtllm-build")
    hint = "" if builder else "run inside NVIDIA's tritonserver trtllm container on the GPU machine"
    yield Finding("trtllm-build", bool(builder), builder or "not on PATH", hint, needed=False)


def _packages() -> Iterator[Finding]:
    for package, extra in _PACKAGES.items():
        try:
            yield Finding(package, True, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            name = f"'scalellm-toolchain[{extra}]'" if extra else package
            yield Finding(package, False, "not installed", f"pip install {name}")


def _triton() -> Finding:
    try:
        server = find_server("auto", environ=os.environ)
        wheel = bundled.find_wheel()
        if server.kind == "bundled" and wheel is not None:
            bundled.check_stub(wheel.stub, bundled.environment(wheel, os.environ))
    except ScalellmError as error:
        return Finding("tritonserver", False, error.message, error.hint)
    return Finding("tritonserver", True, f"{server.version} ({server.kind})")


def _numpy() -> Finding:
    version = importlib.metadata.version("numpy")
    try:
        bundled.check_numpy(version)
    except ScalellmError as error:
        return Finding("numpy", False, error.message, error.hint)
    return Finding("numpy", True, version)


def _containers() -> Iterator[Finding]:
    found = [name for name in ("docker", "podman") if shutil.which(name)]
    yield Finding("containers", bool(found), ", ".join(found) or "neither docker nor podman", needed=False)


def _artifacts(work: Path) -> Iterator[Finding]:
    for stamp_file in sorted([*work.glob(f"*/*/{workspace.STAMP}"), *work.glob(f"*/*/*/{workspace.STAMP}")]):
        folder = stamp_file.parent
        try:
            known = workspace.read_stamp(folder)
            stamp = workspace.require(folder, known.stage if known else folder.name)
        except ScalellmError as error:
            yield Finding(str(folder), False, error.message, error.hint)
            continue
        size = sum(record.size for record in stamp.files.values())
        yield Finding(str(folder), True, f"{format_bytes(size)}, made {stamp.created}, intact")
