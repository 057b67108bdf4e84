"""The machine that a plan's engine is to be built on: this one, or one behind ssh. It judges nothing."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from toolchain import gpu
from toolchain.errors import RecipeError, ToolError
from toolchain.hosts import probe
from toolchain.hosts.probe import Machine
from toolchain.release import Release

PACKAGES = ("torch", "transformers", "openvino", "openvino-genai", "nvidia-pytriton")


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


def look(target: Target, folder: Path, release: Release | None) -> Machine:
    """The machine of ``target``. ``folder``: whose disk counts, on this machine; elsewhere the home's does.

    Raises ToolError where ssh does not get in, or where nothing comes back.
    """
    image = release.image if release else "none"
    if target.host:
        line = probe.over_ssh(target.host, shlex.join(probe.command("", image)))
        done = probe.ask(line, target.host)
        if done.exit_code:
            raise ToolError(
                f"no connection to {target.host}: {done.stderr.strip()}",
                hint=f"ssh {target.host} true   # must work without a password",
            )
        return probe.parse(done.stdout)
    text = probe.ask(probe.command(str(folder.absolute()), image), "this machine").stdout
    return replace(probe.parse(text, gpu.gpus()), packages=dict(_packages()))


def _packages() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)
