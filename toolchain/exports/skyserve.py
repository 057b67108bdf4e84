"""SkyServe: a service of SkyPilot on spot GPUs, wherever one of its clouds has them, with fallback on demand.

SkyServe gets the machines, replaces those that are taken away, and spreads the requests; it scales on requests per
second, the only load that it knows. Its balancer does not move a stream that has begun, and speaks plain HTTP to the
replicas. Keys: https://docs.skypilot.co/en/latest/serving/service-yaml-spec.html and sky/utils/schemas.py of 0.14.1.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

from toolchain import workspace
from toolchain.document import yaml_text
from toolchain.errors import PlanError
from toolchain.exports import commands, guide
from toolchain.exports.commands import KEYS_FILE, KEYS_SECRET, PORT, START_S
from toolchain.exports.wanted import Kind, Wanted
from toolchain.units import GIB

_ROOT, _HOME = "@HOME@", '"$HOME"/scalellm'
_REGISTRY = "~/scalellm-registry"
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_PROBE_TIMEOUT_S = 15
_STREAM_S = 1800
"""Of silence, after which SkyServe's balancer gives a stream up: no shorter than a gateway's whole request."""
_IMAGE_GB = 60
"""Room for the image, unpacked, and the system, as for a build on a rented machine (``hosts.sky``)."""
_RAM_GIB = 8
"""Beside the weights; the same assumption as for a pod."""


def files(wanted: Wanted) -> dict[str, str]:
    """service.yaml. Raises PlanError where SkyServe could not be told what is wanted."""
    return {"service.yaml": yaml_text(service(wanted)), "README.md": guide.skyserve(wanted, list(notes(wanted)))}


def notes(wanted: Wanted) -> Iterator[str]:
    """What the deployment asks for and SkyServe is not told, or cannot do."""
    if wanted.spot and not _spot(wanted):
        yield "no cloud of SkyPilot rents these devices as spot machines: they are rented on demand"
    if len(wanted.kinds) > 1 and _spot(wanted):
        yield "several devices: SkyServe rents whichever is cheapest; its spot_placer is for one kind, and left out"
    yield (
        "drain_seconds: SkyServe leaves a replica that it no longer needs 120 s; one that a cloud takes away gets no "
        "time (SkyPilot 0.14.1 acts on a spot machine's notice on Kubernetes alone)"
    )
    yield from wanted.left_out
    if wanted.deployment.ports.predict:
        yield "ports.predict: SkyServe has one port, OpenAI's API"


def service(wanted: Wanted) -> dict[str, Any]:
    """The service and its task, as plain data."""
    if not _NAME.fullmatch(wanted.name):
        raise PlanError(f"{wanted.name}: SkyServe's names end with a letter or a digit", hint="endpoint: my-llama")
    spot = _spot(wanted)
    bytes_ = max(kind.bytes for kind in wanted.kinds)
    resources: dict[str, Any] = {
        "any_of": list(_any_of(wanted, spot=spot)),
        "use_spot": spot,
        "cpus": "4+",
        "memory": f"{_RAM_GIB - (-bytes_ // GIB)}+",
        "disk_size": _IMAGE_GB - (-3 * bytes_ // 10**9),
        "ports": PORT,
    }
    if (budget := wanted.deployment.max_price_per_hour) is not None:
        resources["max_hourly_cost"] = round(budget / wanted.most, 4)
    registry = {"file_mounts": {_REGISTRY: wanted.registry}} if wanted.is_folder else {}
    return {
        "name": wanted.name,
        "service": {
            "readiness_probe": {
                "path": "/ready",
                "initial_delay_seconds": round(START_S),
                "timeout_seconds": _PROBE_TIMEOUT_S,
            },
            "replica_policy": _policy(wanted, spot=spot),
            "load_balancing_policy": "least_load",
            "load_balancer": {"stream_timeout_seconds": _STREAM_S},
            "ports": PORT,
        },
        "resources": resources,
        "secrets": dict.fromkeys([KEYS_SECRET, *commands.credentials(wanted)]),
        **registry,
        "setup": _setup(wanted),
        "run": _run(wanted),
    }


def _spot(wanted: Wanted) -> bool:
    """Whether there is a spot machine of every kind."""
    return wanted.spot and all(any(_clouds(kind, spot=True)) for kind in wanted.kinds)


def _clouds(kind: Kind, *, spot: bool) -> list[str]:
    """The clouds that have the device, and rent it so."""
    known = workspace.facts("clouds")["clouds"]
    return [cloud for cloud in kind.device.skypilot_clouds if known[cloud]["spot"] or not spot]


def _any_of(wanted: Wanted, *, spot: bool) -> Iterator[dict[str, Any]]:
    for kind in wanted.kinds:
        if not kind.device.skypilot:
            raise PlanError(
                f"{kind.recipe.name}: SkyPilot's clouds do not rent the {kind.device.title}",
                hint="scalellm deploy export kubernetes, or a recipe for another device",
            )
        for cloud in _clouds(kind, spot=spot):
            yield {
                "infra": cloud.lower(),
                "accelerators": {kind.device.skypilot: kind.gpus},
                "image_id": f"docker:{kind.image}",
            }


def _policy(wanted: Wanted, *, spot: bool) -> dict[str, Any]:
    if wanted.most > wanted.least and wanted.target_qps is None:
        raise PlanError(
            f"replicas: {wanted.least} to {wanted.most}: SkyServe scales on requests per second for each replica, and "
            "no number of them is known",
            hint="--target-qps N   # what one replica answers in time: scalellm bench",
        )
    scaling = {"max_replicas": wanted.most, "target_qps_per_replica": wanted.target_qps}
    placer = {"spot_placer": "dynamic_fallback"} if len(wanted.kinds) == 1 else {}
    return {
        "min_replicas": wanted.least,
        **(scaling if wanted.most > wanted.least else {}),
        **({**placer, "dynamic_ondemand_fallback": True} if spot else {}),
    }


def _setup(wanted: Wanted) -> str:
    """Installs, and pulls the package for the GPU that was got."""
    registry = _REGISTRY if wanted.is_folder else wanted.registry
    pull = shlex.join(commands.pull(wanted, _ROOT, "PACKAGE", registry)).replace("PACKAGE", '"$package"')
    if wanted.is_folder:
        pull = pull.replace(shlex.quote(_REGISTRY), _REGISTRY)  # the shell's to expand
    return commands.script(["mkdir -p @HOME@", *commands.install(wanted, _ROOT), _chosen(wanted), pull], _HOME)


def _run(wanted: Wanted) -> str:
    keys = f"{_ROOT}/{KEYS_FILE}"
    write = f'(umask 077 && printf %s "${KEYS_SECRET}" > {keys})'
    serve = commands.serve(wanted, _ROOT, "NAME", keys=keys, server="path", predict=False)
    exec_ = "exec " + shlex.join(serve).replace("/NAME/", '/"${package%%@*}"/')
    return commands.script([_chosen(wanted), write, exec_], _HOME)


def _chosen(wanted: Wanted) -> str:
    """Shell: ``package`` becomes the one for this machine's GPU."""
    lines = ['gpu="$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)"', 'case "$gpu" in']
    for kind in wanted.kinds:
        names = "|".join(shlex.quote(name) for name in kind.device.reported_as)
        lines.append(f"  {names}) package={shlex.quote(kind.package)} ;;")
    lines += ['  *) echo "There is no package for this GPU: $gpu" >&2; exit 1 ;;', "esac"]
    return "\n".join(lines)
