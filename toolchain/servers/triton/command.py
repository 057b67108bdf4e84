"""Command lines and environments of tritonserver: settings in, argv and env out. Nothing here touches the machine.

Flags as ``tritonserver --help`` of Triton 2.51 prints them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CONTAINER_REPOSITORY = "/models"
ENGINE_MODEL = "tensorrt_llm"
DRAFT_MODEL = "tensorrt_llm_draft"
"""The only model that ranks beside the first load."""
PORTS_APART = 10
"""Between the ports of one service and the next; Triton's own defaults are 8000 to 8002."""
STATUS_FILE = "SCALELLM_STATUS_FILE"
"""The environment variable in which ``model_repo_templates/common/shared/engine_model.py`` looks for it."""
_SHM_SIZE, _SHM_SIZE_OF_RANKS = "1g", "4g"
"""Shared memory of a container: for Triton's Python models, and for NCCL between ranks. Our choice."""
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
    status_file: Path | None = None
    """Where our own engines write what they do; not used of a container, which does not see it."""
    load: Literal["all", "none"] = "all"
    log_verbose: int = 0
    ranks: int = 1
    """Processes of one engine, each with a GPU of its own: tp x pp."""
    engines: tuple[str, ...] = (ENGINE_MODEL,)
    """The models that every rank loads; the others are on the first alone."""


@dataclass(frozen=True)
class Command:
    """How to start one server, and what is left to clean up after its last process is gone."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    delete: tuple[str, ...] = ()
    """Glob patterns of files."""
    afterwards: tuple[str, ...] = ()
    """A command to run."""
    cwd: Path | None = None
    """The folder to start in. Paths in the models' configurations may be relative to it: it is the repository."""


def server_flags(settings: Settings, repository: str, rank: int = 0) -> tuple[str, ...]:
    """Settings -> the flags of tritonserver; ``repository`` is the folder as the server sees it.

    A ``rank`` above 0 loads the engine's model alone, in which it stays: it never gets as far as opening a port.

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
        f"{_STUB_REGION_FLAG}{settings.name}{f'-rank{rank}' if rank else ''}",
        "--log-format=default",
        f"--log-verbose={settings.log_verbose}",
    ]
    if settings.load == "all":
        flags += [f"--load-model={model}" for model in (settings.engines if rank else ("*",))]
    return tuple(flags)


def server_argv(program: str, settings: Settings, repository: str, more: Sequence[str] = ()) -> tuple[str, ...]:
    """One server, or under ``mpirun`` one for each rank of the engine, of which the first one listens.

    Source: scripts/launch_triton_server.py of tensorrtllm_backend @v0.12.0 and @v0.19.0. A world of size 1 also runs
    without mpirun (docs/llama_multi_instance.md @v0.17.0).
    """
    ranks = [(program, *server_flags(settings, repository, rank), *more) for rank in range(settings.ranks)]
    if settings.ranks == 1:
        return ranks[0]
    return ("mpirun", "--allow-run-as-root", *_joined_by_colons(ranks))


def _joined_by_colons(ranks: Sequence[Sequence[str]]) -> Iterator[str]:
    for rank, argv in enumerate(ranks):
        yield from (*((":",) if rank else ()), "-n", "1", *argv)


def rank_environment(settings: Settings) -> dict[str, str]:
    """What mpirun must be told beyond its flags: to leave its ranks time to drain. Empty without ranks.

    Open MPI kills one second after SIGTERM unless told otherwise: MCA parameter odls_base_sigkill_timeout of Open MPI 4
    (ompi_info --param odls all), which PRRTE of Open MPI 5 has under its own prefix. Not run: there was no GPU.
    """
    if settings.ranks == 1:
        return {}
    timeout_s = str(settings.exit_timeout_s + 1)
    return {f"{prefix}_MCA_odls_base_sigkill_timeout": timeout_s for prefix in ("OMPI", "PRTE")}


def local_command(
    executable: Path,
    settings: Settings,
    env: Mapping[str, str],
    *,
    backends: Path | None = None,
    caches: Path | None = None,
) -> Command:
    """A tritonserver binary of this machine; ``backends`` and ``caches`` are None where it finds its own."""
    more = [f"--backend-directory={backends}"] if backends else []
    more += [f"--cache-directory={caches}"] if caches else []
    argv = server_argv(str(executable), settings, str(settings.repository), more)
    told = {STATUS_FILE: str(settings.status_file)} if settings.status_file else {}
    env = {**env, **rank_environment(settings), **told}
    return Command(argv, env, delete=(f"/dev/shm/{settings.name}*",), cwd=settings.repository)


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
) -> Command:
    """``docker run`` or ``podman run`` of tritonserver, in the foreground, removed afterwards.

    The network is the host's, so that ``settings.host`` decides who can reach the ports, as it does without a
    container. The repository is mounted read-only at /models, where the server starts. ``user`` (uid, gid) is the
    caller's, not root; it has no home inside, so HOME is /tmp. ``gpus`` is docker's ``--gpus`` value (``"all"``,
    ``"device=0,1"``), None for none. An image that is not there yet is not pulled, because that would take many minutes
    in silence. memlock and stack are the limits that NVIDIA's images ask for at start. podman names GPUs as CDI
    devices, without root it maps the caller's uid only with keep-id, and under SELinux it reads the caller's folders
    only without labels (podman-run(1)).
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
        *(f"--env={name}={value}" for name, value in rank_environment(settings).items()),
        f"--shm-size={_SHM_SIZE if settings.ranks == 1 else _SHM_SIZE_OF_RANKS}",
        "--ulimit=memlock=-1",
        "--ulimit=stack=67108864",
        f"--volume={settings.repository}:{CONTAINER_REPOSITORY}:ro",
        f"--workdir={CONTAINER_REPOSITORY}",
    ]
    podman = Path(engine).name == "podman"
    if podman:
        argv += [*(["--userns=keep-id"] if user[0] else []), "--security-opt=label=disable"]
    if gpus and podman:
        argv += [f"--device=nvidia.com/gpu={gpu}" for gpu in gpus.removeprefix("device=").split(",")]
    elif gpus:
        argv.append(f'--gpus="{gpus}"' if "," in gpus else f"--gpus={gpus}")  # docker reads the value as CSV
    argv += [image, *server_argv("tritonserver", settings, CONTAINER_REPOSITORY)]
    return Command(tuple(argv), env, afterwards=(engine, "rm", "--force", settings.name))


def _joined(*parts: Path | str) -> str:
    return ":".join(str(part) for part in parts if str(part))
