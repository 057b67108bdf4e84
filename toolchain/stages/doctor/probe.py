"""What a machine has, asked with one shell script: of this machine, or of one behind ssh. It judges nothing.

The script is POSIX sh and needs only what every Linux has; what a machine lacks leaves its section empty.
"""

from __future__ import annotations

import importlib.metadata
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from toolchain import gpu, installed, runner
from toolchain.errors import RecipeError, ToolError
from toolchain.gpu import Gpu
from toolchain.release import Release
from toolchain.units import KIB

TOOLS = ("docker", "podman")
PACKAGES = ("torch", "transformers", "openvino", "openvino-genai", "nvidia-pytriton")

_TIMEOUT_S = 120.0
_MARK = "@scalellm "
_LISTEN = "0A"  # TCP_LISTEN, linux/net/tcp_states.h


@dataclass(frozen=True)
class Target:
    """Where the engine is to be built, as ``--on`` says it."""

    kind: str
    """``"local"``, ``"container"`` or ``"ssh"``."""
    host: str = ""
    """Of ssh: what ssh takes, ``"gpu-box"`` or ``"me@10.0.0.7"``."""

    @property
    def where(self) -> str:
        return f"on {self.host}" if self.host else "on this machine"


def target_of(on: str) -> Target:
    """``"local"``, ``"container"``, ``"ssh:HOST"``, each with what ``build --on`` takes behind it -> where to look.

    Raises RecipeError for a place that cannot be looked at.
    """
    kind, _, rest = on.partition(":")
    host = re.split(r"[:,/]", rest, maxsplit=1)[0]
    if kind == "sky":
        raise RecipeError(f"--on {on}: a machine that is not rented yet cannot be examined", hint="--on ssh:HOST")
    if kind not in ("local", "container", "ssh") or (kind == "ssh" and (not host or host.startswith("-"))):
        raise RecipeError(f"--on {on}: no such place", hint="--on local, --on container or --on ssh:HOST")
    return Target(kind, host if kind == "ssh" else "")


@dataclass(frozen=True)
class Machine:
    """What was found."""

    gpus: tuple[Gpu, ...] = ()
    ram_total: int | None = None
    ram_free: int | None = None
    """What programs can still get, page cache included, swap not (MemAvailable, proc(5))."""
    disk: str = ""
    """The folder whose disk was asked about."""
    disk_free: int | None = None
    builder: str | None = None
    """Path of ``trtllm-build``."""
    tensorrt_llm: str | None = None
    containers: tuple[str, ...] = ()
    """docker, podman."""
    refusals: dict[str, str] = field(default_factory=dict)
    """Container tool -> why it does not answer."""
    has_image: bool = False
    gpu_toolkit: bool = False
    """Whether the programs are there that give a container its GPUs."""
    listening: frozenset[int] = frozenset()
    """TCP ports in use, on whichever address."""
    packages: dict[str, str] = field(default_factory=dict)
    """Distribution -> version, of those in ``PACKAGES`` that our own Python has; empty of another machine."""


def look(target: Target, folder: Path, release: Release | None) -> Machine:
    """The machine of ``target``. ``folder``: whose disk counts, on this machine; elsewhere the home's does.

    Raises ToolError where ssh does not get in.
    """
    script = _script(None if target.host else folder, release.image if release else "none")
    if target.host:
        options = ("-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", "-o", "ConnectTimeout=15")
        argv = ("ssh", *options, target.host, f"sh -c {shlex.quote(script)}")
        hint = f"ssh {target.host} true   # must work without a password"
        return parse(runner.run(argv, timeout_s=_TIMEOUT_S, hint=hint).stdout)
    try:
        text = runner.run(("sh", "-c", script), timeout_s=_TIMEOUT_S, check=False).stdout
    except ToolError as error:  # a container daemon that hangs
        raise ToolError(error.message, hint="docker info   # does it answer?") from error
    return replace(parse(text, gpu.gpus()), packages=dict(_packages()))


def _packages() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


def _script(folder: Path | None, image: str) -> str:
    place = shlex.quote(str(folder.absolute())) if folder else '"$HOME"'
    smi = " ".join(map(shlex.quote, gpu.QUERY))
    old = " ".join(map(shlex.quote, gpu.OLD_QUERY))
    apps = " ".join(map(shlex.quote, gpu.APPS))
    return f"""
mark() {{ printf '\\n{_MARK}%s\\n' "$1"; }}
mark gpus; nvidia-smi {smi} 2>/dev/null || nvidia-smi {old} 2>/dev/null
mark apps; nvidia-smi {apps} 2>/dev/null
mark list; nvidia-smi -L 2>/dev/null
mark memory; cat /proc/meminfo 2>/dev/null
mark limit; cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory.current 2>/dev/null
place={place}
while [ ! -d "$place" ]; do place=$(dirname "$place"); done
mark disk; printf '%s\\n' "$place"; df -Pk "$place" 2>/dev/null | awk 'NR == 2 {{ print $4 }}'
mark builder; {installed.ASK}
for tool in {" ".join(TOOLS)}; do
  command -v "$tool" > /dev/null || continue
  if said=$("$tool" info 2>&1 > /dev/null); then said=; else said=${{said:-no reason given}}; fi
  mark "tool $tool"; printf '%s\\n' "$said" | tail -n 1
  [ -n "$said" ] || ! "$tool" image inspect {shlex.quote(image)} > /dev/null 2>&1 || mark image
done
if command -v nvidia-ctk > /dev/null || command -v nvidia-container-cli > /dev/null; then mark toolkit; fi
mark ports; cat /proc/net/tcp /proc/net/tcp6 2>/dev/null
mark end
"""


def parse(text: str, gpus: tuple[Gpu, ...] | None = None) -> Machine:
    """What the script printed -> the machine; ``gpus`` replaces what nvidia-smi said. Other words are none of ours."""
    found: dict[str, list[str]] = {}
    section: list[str] = []
    for line in text.splitlines():
        if line.startswith(_MARK):
            section = found.setdefault(line.removeprefix(_MARK).strip(), [])
        elif line.strip():
            section.append(line)
    if gpus is None:
        gpus = gpu.parse(*("\n".join(found.get(name, ())) for name in ("gpus", "apps", "list")))
    total, free = _memory(found.get("memory", []), found.get("limit", []))
    disk = found.get("disk", [])
    builder, version = installed.parse("\n".join(found.get("builder", ())))
    tools = {name.removeprefix("tool "): lines for name, lines in found.items() if name.startswith("tool ")}
    return Machine(
        gpus=gpus,
        ram_total=total,
        ram_free=free,
        disk=disk[0] if disk else "",
        disk_free=int(disk[1]) * KIB if len(disk) > 1 and disk[1].isdigit() else None,
        builder=builder,
        tensorrt_llm=version,
        containers=tuple(tools),
        refusals={tool: lines[-1].strip() for tool, lines in tools.items() if lines},
        has_image="image" in found,
        gpu_toolkit="toolkit" in found,
        listening=frozenset(_ports(found.get("ports", []))),
    )


def _memory(lines: list[str], limit: list[str]) -> tuple[int | None, int | None]:
    """(total, free) bytes of /proc/meminfo, or of the control group that this shell is in where that has less.

    memory.max and memory.current: https://docs.kernel.org/admin-guide/cgroup-v2.html (2026-11-22).
    """
    words = {line.split(":")[0]: line.split()[1] for line in lines if ":" in line and len(line.split()) > 1}
    total, free = (int(words[key]) * KIB if key in words else None for key in ("MemTotal", "MemAvailable"))
    if len(limit) == 2 and all(value.isdigit() for value in limit) and total is not None and free is not None:
        most, used = map(int, limit)
        total, free = min(total, most), min(free, max(0, most - used))
    return total, free


def _ports(lines: list[str]) -> list[int]:
    """Listening ports of /proc/net/tcp and tcp6 (proc(5): the second word is HEX:PORT, the fourth the state)."""
    rows = (line.split() for line in lines)
    return [int(row[1].rpartition(":")[2], 16) for row in rows if len(row) > 3 and row[3] == _LISTEN]
