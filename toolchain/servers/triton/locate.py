"""Finds a Triton server: bundled in the wheel nvidia-pytriton, on PATH (inside NVIDIA's containers), or as a container.

It knows what each of the three needs before it can start; it starts nothing itself.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from toolchain import runner
from toolchain.errors import ToolError
from toolchain.gpu import visible_gpus
from toolchain.servers.triton import bundled
from toolchain.servers.triton.command import Command, Settings, container_command, local_command
from toolchain.servers.triton.needs import Needs

Kind = Literal["bundled", "path", "container"]
Preference = Literal["auto", "bundled", "path", "container"]
DEFAULT_IMAGE = "nvcr.io/nvidia/tritonserver:24.10-py3"
"""The image with the Triton (2.51) that the wheel bundles. Source: NVIDIA Triton release notes 24.10, 2024-10-30."""
_BUNDLED_BACKENDS = frozenset({"python"})
NOTHING_SPECIAL = Needs()
"""Python models only."""
_INSTALL = "pip install 'nvidia-pytriton==0.7.0'"


class Server(Protocol):
    """A Triton that can be started."""

    @property
    def kind(self) -> Kind: ...

    @property
    def version(self) -> str: ...

    def command(self, settings: Settings) -> Command:
        """How to start it; prepares what that needs and refuses (``ToolError``) what could not work."""


@dataclass(frozen=True)
class BundledServer:
    """The server of the installed wheel."""

    wheel: bundled.Wheel
    environ: Mapping[str, str]
    kind: Kind = "bundled"

    @property
    def version(self) -> str:
        return self.wheel.triton_version

    def command(self, settings: Settings) -> Command:
        bundled.check_numpy()
        staging = bundled.stage(self.wheel, _cache(self.environ))
        env = bundled.environment(self.wheel, self.environ)
        bundled.check_stub(staging.backends / "python" / "triton_python_backend_stub", env)
        return local_command(staging.executable, settings, env, backends=staging.backends, caches=staging.caches)


@dataclass(frozen=True)
class PathServer:
    """A tritonserver that was installed with all that it needs, as inside NVIDIA's images."""

    executable: Path
    environ: Mapping[str, str]
    kind: Kind = "path"

    @property
    def version(self) -> str:
        """NVIDIA's images say it in the environment; elsewhere only the running server can."""
        return self.environ.get("TRITON_SERVER_VERSION", "unknown")

    def command(self, settings: Settings) -> Command:
        return local_command(self.executable, settings, self.environ)


@dataclass(frozen=True)
class ContainerServer:
    """A container image, run by docker or podman."""

    engine: Path
    image: str
    environ: Mapping[str, str]
    gpus: str | None = None
    kind: Kind = "container"

    @property
    def version(self) -> str:
        return self.image.rpartition(":")[2]

    def command(self, settings: Settings) -> Command:
        self._check_image()
        user = (os.getuid(), os.getgid())
        return container_command(str(self.engine), self.image, settings, self.environ, user=user, gpus=self.gpus)

    def _check_image(self) -> None:
        """Refuses an image that is not on this machine: pulling it would look like a start that hangs."""
        found = runner.run(
            [str(self.engine), "image", "inspect", self.image], env=self.environ, timeout_s=30, check=False
        )
        if found.exit_code:
            hint = f"{self.engine.name} pull {self.image}"
            raise ToolError(f"the image {self.image} is not on this machine", hint=hint)


def find_server(prefer: Preference = "auto", *, environ: Mapping[str, str], needs: Needs = NOTHING_SPECIAL) -> Server:
    """The first server that has what the repository needs: bundled, on PATH, container; or only the kind in ``prefer``.

    The bundled one comes first because its Python models run in this very environment. Nothing found is a
    ``ToolError`` that says what was tried.
    """
    if needs.sm is not None and (lacking := needs.lacking_gpus(visible_gpus())):
        raise ToolError(
            lacking, hint=f"build it for this GPU: device in the recipe {needs.recipe}, then scalellm build"
        )
    kinds: tuple[Kind, ...] = ("bundled", "path", "container") if prefer == "auto" else (prefer,)
    reasons = []
    for kind in kinds:
        found = _try(kind, environ, needs)
        if not isinstance(found, str):
            return found
        reasons.append(f"{kind}: {found}")
    raise ToolError("no Triton server was found (" + "; ".join(reasons) + ")", hint=_hint(needs))


def _try(kind: Kind, environ: Mapping[str, str], needs: Needs) -> Server | str:
    """The server of one kind, or why there is none."""
    path = environ.get("PATH", "")
    if kind == "path":
        return _on_path(environ, needs)
    if kind == "container":
        engine = shutil.which("docker", path=path) or shutil.which("podman", path=path)
        if not engine:
            return "no docker or podman on PATH"
        image = needs.image or DEFAULT_IMAGE
        return _refusal_of(engine, environ) or ContainerServer(Path(engine), image, environ, needs.devices(environ))
    lacking = sorted(needs.backends - _BUNDLED_BACKENDS)
    if lacking:
        return f"the bundled server lacks the backend {', '.join(lacking)}"
    if needs.release:
        return f"the bundled server has no TensorRT-LLM {needs.release}"
    wheel = bundled.find_wheel()
    return BundledServer(wheel, environ) if wheel else "nvidia-pytriton is not installed"


def _on_path(environ: Mapping[str, str], needs: Needs) -> Server | str:
    path = environ.get("PATH", "")
    executable = shutil.which("tritonserver", path=path)
    if not executable:
        return "no tritonserver on PATH"
    if refusal := needs.refusal(environ):
        return refusal
    if needs.ranks > 1 and not shutil.which("mpirun", path=path):
        return f"no mpirun on PATH, which starts the {needs.ranks} ranks of this engine"
    return PathServer(Path(executable), environ)


def _refusal_of(engine: str, environ: Mapping[str, str]) -> str:
    """Why a container engine does not work here (its daemon is down, no right to its socket); empty when it does."""
    info = runner.run([engine, "info"], env=environ, timeout_s=30, check=False)
    if not info.exit_code:
        return ""
    reason = (info.stderr.strip().splitlines() or ["no reason given"])[-1]
    return f"{Path(engine).name} does not answer: {reason}"


def _hint(needs: Needs) -> str:
    if needs.image:
        image = needs.image
        rebuild = (
            f"\nor build the engine again for the release that you have: tensorrt_llm in the recipe {needs.recipe}"
        )
        return f"run this inside {image}, or install docker and: docker pull {image}{rebuild}"
    if needs.backends <= _BUNDLED_BACKENDS:
        return _INSTALL
    return f"run this inside NVIDIA's image, such as {DEFAULT_IMAGE}, or install docker and pull it"


def _cache(environ: Mapping[str, str]) -> Path:
    """XDG_CACHE_HOME/scalellm, by default ~/.cache/scalellm. Source: XDG Base Directory Specification 0.8."""
    home = environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if home.startswith("/") else Path(environ.get("HOME", "~")).expanduser() / ".cache") / "scalellm"
