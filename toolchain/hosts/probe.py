"""What a machine has, asked with one shell script: of this machine, or of one behind ssh. It judges nothing.

The script is POSIX sh and needs only what every Linux has; what a machine lacks leaves its section empty. ``installed``
knows how to ask for the version of TensorRT-LLM without importing it, ``gpu`` what nvidia-smi says.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from toolchain import gpu, installed, runner
from toolchain.errors import ToolError
from toolchain.gpu import Gpu
from toolchain.units import KIB

TOOLS = ("docker", "podman")

SSH_OPTIONS = (
    "BatchMode=yes",  # a key or an agent; a question would wait for nobody
    "StrictHostKeyChecking=yes",  # whatever the user's config says
    "ServerAliveInterval=15",
    "ServerAliveCountMax=4",
    "ConnectTimeout=20",
)
"""Options of ssh_config(5). A dead connection is noticed after a minute."""

_TIMEOUT_S = 120.0
_MARK = "@scalellm "
_LISTEN = "0A"  # TCP_LISTEN, linux/net/tcp_states.h

_SCRIPT = f"""
folder=${{1:-$HOME}} image=$2 tools=$3
mark() {{ printf '\\n{_MARK}%s\\n' "$1"; }}
mark gpus; nvidia-smi {shlex.join(gpu.QUERY)} 2>&1 || nvidia-smi {shlex.join(gpu.OLD_QUERY)} 2> /dev/null
mark apps; nvidia-smi {shlex.join(gpu.APPS)} 2> /dev/null
mark list; nvidia-smi -L 2> /dev/null
mark memory; cat /proc/meminfo 2> /dev/null
mark limit; cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory.current 2> /dev/null
if [ -d "$folder" ]; then mark used; du -sk "$folder" 2> /dev/null | cut -f 1; fi
while [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
mark disk; printf '%s\\n' "$folder"; df -Pk "$folder" 2> /dev/null | awk 'NR == 2 {{ print $4 }}'
mark builder; ({installed.ASK})
for tool in $tools; do
  command -v "$tool" > /dev/null || continue
  if said=$("$tool" info 2>&1 > /dev/null); then said=; else said=${{said:-no reason given}}; fi
  mark "tool $tool"; printf '%s\\n' "$said" | tail -n 1
  if [ -z "$said" ] && "$tool" image inspect "$image" > /dev/null 2>&1; then mark "image $tool"; fi
done
if command -v nvidia-ctk > /dev/null || command -v nvidia-container-cli > /dev/null; then mark toolkit; fi
if command -v rsync > /dev/null; then mark rsync; fi
mark ports; cat /proc/net/tcp /proc/net/tcp6 2> /dev/null
mark end
"""
"""Arguments: the folder whose disk is asked about, empty for the home; the image; the container tools to ask."""


@dataclass(frozen=True)
class Machine:
    """What was found."""

    gpus: tuple[Gpu, ...] = ()
    gpu_words: str = ""
    """What ``nvidia-smi`` said instead of a GPU."""
    ram_total: int | None = None
    ram_free: int | None = None
    """What programs can still get, page cache included, swap not (MemAvailable, proc(5))."""
    swap_free: int = 0
    disk: str = ""
    """The folder whose disk was asked about, or the nearest one above it that is there."""
    disk_free: int | None = None
    used_bytes: int = 0
    """What lies in the folder already."""
    builder: str | None = None
    """Path of ``trtllm-build``."""
    tensorrt_llm: str | None = None
    tools: Mapping[str, str] = field(default_factory=dict)
    """docker, podman -> why it does not answer; empty where it does."""
    images: frozenset[str] = frozenset()
    """The tools that have the image."""
    gpu_toolkit: bool = False
    """Whether the programs are there that give a container its GPUs."""
    rsync: bool = False
    listening: frozenset[int] = frozenset()
    """TCP ports in use, on whichever address."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Distribution -> version, of those that somebody asked this machine's own Python for; empty of another machine."""

    @property
    def usable(self) -> tuple[str, ...]:
        """The container tools that answer."""
        return tuple(tool for tool, wrong in self.tools.items() if not wrong)

    def engine(self) -> str:
        """The container tool to use: one that has the image, else one that answers, else any; empty for none."""
        ranked = sorted(self.tools, key=lambda tool: (tool not in self.images, bool(self.tools[tool])))
        return ranked[0] if ranked else ""


def command(folder: str, image: str, tools: Iterable[str] = TOOLS) -> tuple[str, ...]:
    """The script as a command line; ``folder`` empty for the home, ``image`` as docker names it."""
    return ("sh", "-c", _SCRIPT, "probe", folder, image, " ".join(tools))


def over_ssh(host: str, line: str) -> tuple[str, ...]:
    """A line of shell, run on ``host``, which is what ssh takes."""
    return ("ssh", *ssh_options(), "--", host, line)


def ssh_options() -> tuple[str, ...]:
    return tuple(word for option in SSH_OPTIONS for word in ("-o", option))


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


def parse(text: str, gpus: tuple[Gpu, ...] | None = None) -> Machine:
    """What the script printed -> the machine; ``gpus`` replaces what nvidia-smi said. A login's greeting is skipped."""
    found: dict[str, list[str]] = {}
    section: list[str] = []
    for line in text.splitlines():
        if line.startswith(_MARK):
            section = found.setdefault(line.removeprefix(_MARK).strip(), [])
        elif line.strip():
            section.append(line)
    if gpus is None:
        gpus = gpu.parse(*("\n".join(found.get(name, ())) for name in ("gpus", "apps", "list")))
    total, free, swap = _memory(found.get("memory", []), found.get("limit", []))
    disk = found.get("disk", [])
    builder, version = installed.parse("\n".join(found.get("builder", ())))
    tools = {name.removeprefix("tool "): lines for name, lines in found.items() if name.startswith("tool ")}
    return Machine(
        gpus=gpus,
        gpu_words="" if gpus else " ".join(found.get("gpus", ())),
        ram_total=total,
        ram_free=free,
        swap_free=swap,
        disk=disk[0] if disk else "",
        disk_free=_kib(disk[1:]),
        used_bytes=_kib(found.get("used", ())) or 0,
        builder=builder,
        tensorrt_llm=version,
        tools={tool: lines[-1].strip() if lines else "" for tool, lines in tools.items()},
        images=frozenset(name.removeprefix("image ") for name in found if name.startswith("image ")),
        gpu_toolkit="toolkit" in found,
        rsync="rsync" in found,
        listening=frozenset(_ports(found.get("ports", []))),
    )


def _kib(lines: Sequence[str]) -> int | None:
    return int(lines[0]) * KIB if lines and lines[0].isdigit() else None


def _memory(lines: list[str], limit: list[str]) -> tuple[int | None, int | None, int]:
    """(total, free, free swap) bytes of /proc/meminfo, or of this shell's control group where that has less.

    memory.max and memory.current: https://docs.kernel.org/admin-guide/cgroup-v2.html (2026-11-22).
    """
    words = {line.split(":")[0]: line.split()[1] for line in lines if ":" in line and len(line.split()) > 1}
    total, free = (int(words[key]) * KIB if key in words else None for key in ("MemTotal", "MemAvailable"))
    if len(limit) == 2 and all(value.isdigit() for value in limit) and total is not None and free is not None:
        most, used = map(int, limit)
        total, free = min(total, most), min(free, max(0, most - used))
    return total, free, int(words.get("SwapFree", 0)) * KIB


def _ports(lines: list[str]) -> list[int]:
    """Listening ports of /proc/net/tcp and tcp6 (proc(5): the second word is HEX:PORT, the fourth the state)."""
    rows = (line.split() for line in lines)
    return [int(row[1].rpartition(":")[2], 16) for row in rows if len(row) > 3 and row[3] == _LISTEN]
