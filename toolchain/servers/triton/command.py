"""Command lines and environments of tritonserver: settings in, argv and env out. Nothing here touches the machine.

Flags as ``tritonserver --help`` of Triton 2.51 prints them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CONTAINER_REPOSITORY = "/models"
_STUB_REGION_FLAG = "--backend-config=python,shm-region-prefix-name="


@dataclass(frozen=True)
class Ports:
    """The three TCP ports of a server; the defaults are Triton's own."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002

    def named(self) -> dict[str, int]:
        return {"http": self.http, "grpc": self.grpc, "metrics": self.metrics}


@dataclass(frozen=True)
class Settings:
    """Everything about one start that does not depend on where tritonserver comes from."""

    repository: Path
    ports: Ports = Ports()
    host: str = "127.0.0.1"
    """The address that all three listeners bind; Triton's own default would be every interface."""
    exit_timeout_s: int = 30
    """How long SIGTERM lets requests in flight finish."""
    name: str = "scalellm"
    """Unique on this machine: prefix of the shared memory regions, name of the container."""
    load: Literal["all", "none"] = "all"
    log_verbose: int = 0


@dataclass(frozen=True)
class Command:
    """How to start one server, and what is left to clean up after its last process is gone."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    delete: tuple[str, ...] = ()
    """Glob patterns of files."""
    afterwards: tuple[str, ...] = ()
    """A command to run."""


def server_flags(settings: Settings, repository: str) -> tuple[str, ...]:
    """Settings -> the flags of tritonserver; ``repository`` is the folder as the server sees it.

    The model control mode is explicit, so that nothing changes under a running server by itself. Model configurations
    are complete as written, hence no auto-complete, which would start every Python model twice.
    """
    ports = settings.ports
    flags = [
        f"--model-repository={repository}",
        "--model-control-mode=explicit",
        "--disable-auto-complete-config",
        f"--http-address={settings.host}",
        f"--http-port={ports.http}",
        f"--grpc-address={settings.host}",
        f"--grpc-port={ports.grpc}",
        f"--metrics-address={settings.host}",
        f"--metrics-port={ports.metrics}",
        f"--exit-timeout-secs={settings.exit_timeout_s}",
        f"{_STUB_REGION_FLAG}{settings.name}",
        "--log-format=default",
        f"--log-verbose={settings.log_verbose}",
    ]
    if settings.load == "all":
        flags.append("--load-model=*")
    return tuple(flags)


def local_command(
    executable: Path,
    settings: Settings,
    env: Mapping[str, str],
    *,
    backends: Path | None = None,
    caches: Path | None = None,
) -> Command:
    """A tritonserver binary of this machine; ``backends`` and ``caches`` are None where it finds its own."""
    argv = [str(executable), *server_flags(settings, str(settings.repository))]
    if backends:
        argv.append(f"--backend-directory={backends}")
    if caches:
        argv.append(f"--cache-directory={caches}")
    return Command(tuple(argv), env, delete=(f"/dev/shm/{settings.name}*",))


def local_environment(
    base: Mapping[str, str], *, prefix: Path, is_venv: bool, libraries: Sequence[Path]
) -> dict[str, str]:
    """The environment in which the Python backend's stubs find the interpreter that lives in ``prefix``.

    The stub embeds Python in isolated mode and locates its site-packages through the first ``python3`` on PATH; it
    reads no PYTHON* variable and no user site (measured with Triton 2.51 and Python 3.11; older Pythons would follow
    PYTHONHOME). ``libraries`` (the wheel's, libpython's) come before what LD_LIBRARY_PATH held.
    """
    env = {name: value for name, value in base.items() if name not in {"PYTHONHOME", "VIRTUAL_ENV"}}
    if is_venv:
        env["VIRTUAL_ENV"] = str(prefix)
    env["PATH"] = _joined(prefix / "bin", base.get("PATH", "/usr/local/bin:/usr/bin:/bin"))
    env["LD_LIBRARY_PATH"] = _joined(*libraries, base.get("LD_LIBRARY_PATH", ""))
    return env


def container_command(
    engine: str,
    image: str,
    settings: Settings,
    env: Mapping[str, str],
    *,
    user: tuple[int, int],
    gpus: str | None,
    shm_size: str = "1g",
) -> Command:
    """``docker run`` or ``podman run`` of tritonserver, in the foreground, removed afterwards.

    The network is the host's, so that ``settings.host`` decides who can reach the ports, as it does without a
    container. The repository is mounted read-only at /models. ``user`` (uid, gid) is the caller's, not root; it has no
    home inside, so HOME is /tmp. ``gpus`` is docker's ``--gpus`` value (``"all"``, ``"device=0"``), None for none. An
    image that is not there yet is not pulled, because that would take many minutes in silence. memlock and stack are
    the limits that NVIDIA's images ask for at start. podman names GPUs as CDI devices, and without root it maps the
    caller's uid only with keep-id (podman-run(1)).
    """
    argv = [
        engine,
        "run",
        "--rm",
        f"--name={settings.name}",
        "--pull=never",
        "--network=host",
        f"--user={user[0]}:{user[1]}",
        "--env=HOME=/tmp",
        f"--shm-size={shm_size}",
        "--ulimit=memlock=-1",
        "--ulimit=stack=67108864",
        f"--volume={settings.repository}:{CONTAINER_REPOSITORY}:ro",
    ]
    podman = Path(engine).name == "podman"
    if podman and user[0] != 0:
        argv.append("--userns=keep-id")
    if gpus:
        argv.append(f"--device=nvidia.com/gpu={gpus.removeprefix('device=')}" if podman else f"--gpus={gpus}")
    argv += [image, "tritonserver", *server_flags(settings, CONTAINER_REPOSITORY)]
    return Command(tuple(argv), env, afterwards=(engine, "rm", "--force", settings.name))


def _joined(*parts: Path | str) -> str:
    return ":".join(str(part) for part in parts if str(part))
