"""The command lines of a machine that takes part: install scalellm, pull a package, serve it. The same in every format.

scalellm gets a virtual environment of its own beside the image's Python, so that no library of the image changes: the
models inside Triton are run by the image's. ``--without-pip``, because Debian's Python has no ensurepip without
python3-venv; pip installs into it from outside (``--python``, pip 22.3 and newer).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from toolchain.exports.wanted import Kind, Wanted

KEYS_FILE = "gateway-keys.json"
KEYS_SECRET = "SCALELLM_GATEWAY_KEYS"
"""Where a file cannot be given, what is in it: in the environment."""
START_S = 1800.0
"""Until an engine must have answered first: our choice, for weights that come over a network's disk."""
PORT, PREDICT_PORT = 8080, 2345
"""Inside a machine; what clients see is the deployment's."""
TRITON_PORTS = {"--http-port": 18000, "--grpc-port": 18001, "--metrics-port": 18002}
"""On loopback; each next service has them 10 higher."""
NO_GPU = {"NVIDIA_VISIBLE_DEVICES": "void"}
"""For what needs none, since NVIDIA's images ask for all: container-toolkit/docker-specialized of docs.nvidia.com."""
CREDENTIALS = {
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
    "s3a": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
}
"""Scheme -> what its package reads from the environment (botocore's guide/configuration, read 2026-11-22)."""


def extras(registry: str, *, is_folder: bool, cpu: bool) -> tuple[str, tuple[str, ...]]:
    """What scalellm is installed with there: its extras, ``"cpu,gateway"``, and what its registry needs beside."""
    named = [*(["cpu"] if cpu else []), "gateway", *([] if is_folder else ["registry"])]
    if is_folder:
        return ",".join(named), ()
    from toolchain.registry.remote import package_for

    return ",".join(named), tuple(name for name in [package_for(registry)] if name)


def credentials(wanted: Wanted) -> tuple[str, ...]:
    """The environment's variables with which the registry is read; empty where it needs none, or we know none."""
    return () if wanted.is_folder else CREDENTIALS.get(wanted.registry.partition(":")[0], ())


def install(wanted: Wanted, root: str) -> list[tuple[str, ...]]:
    """Empty where the image has scalellm."""
    if not wanted.install:
        return []
    venv = f"{root}/venv"
    return [
        ("python3", "-m", "venv", "--without-pip", venv),
        ("python3", "-m", "pip", "--python", f"{venv}/bin/python", "install", "--no-cache-dir", *wanted.install),
    ]


def program(wanted: Wanted, root: str) -> str:
    return f"{root}/venv/bin/scalellm" if wanted.install else "scalellm"


def pull(wanted: Wanted, root: str, package: str, registry: str) -> tuple[str, ...]:
    """``registry``: as that machine sees it."""
    return (program(wanted, root), *("model", "pull", "-n", package, "--home", f"{root}/home", "--registry", registry))


def repository(root: str, name: str) -> str:
    return f"{root}/home/models/{name}/repository"


def serve(
    wanted: Wanted, root: str, name: str, *more: str, keys: str, server: str, predict: bool = True
) -> tuple[str, ...]:
    """Triton on loopback, supervised, and the gateway at every address, with keys."""
    ports = [word for flag, port in TRITON_PORTS.items() for word in (flag, str(port))]
    return (
        *(program(wanted, root), "serve", "--repository", repository(root, name), *more),
        *("--server", server, *ports, "--start-timeout", f"{START_S:g}"),
        *("--gateway", "--host", "0.0.0.0", "--gateway-port", str(PORT), "--keys", keys),
        *(predict_door(wanted) if predict else ("--no-predict",)),
        *("--model-name", wanted.name, "--max-queue", str(wanted.deployment.max_queue)),
        *("--drain", f"{drain_s(wanted):g}"),
    )


def predict_door(wanted: Wanted) -> tuple[str, ...]:
    """``/predict``, where the deployment has it."""
    return ("--predict-port", str(PREDICT_PORT)) if wanted.deployment.ports.predict else ("--no-predict",)


def drain_s(wanted: Wanted) -> float:
    """Seconds; Triton waits for one at the least."""
    return max(1.0, wanted.deployment.drain_seconds)


def server_of(kind: Kind) -> str:
    """Inside NVIDIA's image the server is on PATH; on a CPU it came with scalellm."""
    return "bundled" if kind.device.is_cpu else "path"


def script(lines: Iterable[tuple[str, ...] | str], home: str = "") -> str:
    """Command lines -> a script of the shell; a ``str`` is one already. ``home``: what stands for ``@HOME@``."""
    spoken = (line if isinstance(line, str) else shlex.join(line) for line in lines)
    return "set -e\n" + "".join(f"{line}\n" for line in spoken).replace("@HOME@", home)
