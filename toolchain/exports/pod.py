"""The pod of one replica: pulled by an init container, run without root on a root file system that nobody writes to.

Triton and its metrics listen on the pod's loopback; the gateway's doors are all that the network sees.
"""

from __future__ import annotations

from typing import Any

from toolchain.exports import commands
from toolchain.exports.commands import KEYS_FILE, PORT, PREDICT_PORT, START_S
from toolchain.exports.wanted import Kind, Wanted
from toolchain.units import GIB

LABEL = "app.kubernetes.io/name"
GPU = "nvidia.com/gpu"
ROOT, RECIPES, KEYS, REGISTRY, SHARED = (
    "/scalellm",
    "/etc/scalellm/recipes",
    "/etc/scalellm/keys",
    "/registry",
    "/dev/shm",
)
USER = 10001
"""Any user but root; no image of ours has one of its own."""
PAUSE_S = 10
"""Between "no new requests" and "end": until every kube-proxy has taken the pod out. Our choice."""
_MARGIN_S = 15
_PROBE_S = 10
_LATE_S = 5
_RAM = 8 * GIB
"""Beside the weights: Triton, its Python models and TensorRT-LLM on the host. Our assumption, not measured on a GPU."""
_DISK = 8 * GIB
"""Beside the package: the virtual environment, logs and caches. Our assumption."""
_CPUS = "4"


def pod(wanted: Wanted, kind: Kind) -> dict[str, Any]:
    """PodSpec."""
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "shareProcessNamespace": True,  # so that dead processes of Triton are reaped by the pod's first one
        "terminationGracePeriodSeconds": PAUSE_S + round(commands.drain_s(wanted)) + _MARGIN_S,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **_where(kind),
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": {LABEL: wanted.name}},
            }
        ],
        "initContainers": [_puller(wanted, kind)],
        "containers": [_server(wanted, kind)],
        "volumes": _volumes(wanted, kind),
    }


def _where(kind: Kind) -> dict[str, Any]:
    """Nodes whose GPU is called as the device's are."""
    if kind.device.is_cpu:
        return {}
    names = sorted(name.replace(" ", "-") for name in kind.device.reported_as)
    wanted = {"matchExpressions": [{"key": f"{GPU}.product", "operator": "In", "values": names}]}
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [wanted]}}
    return {
        "affinity": {"nodeAffinity": required},
        "tolerations": [{"key": GPU, "operator": "Exists", "effect": "NoSchedule"}],
    }


def _container(kind: Kind, name: str, argv: list[str], **environment: str) -> dict[str, Any]:
    return {
        "name": name,
        "image": kind.image,
        "command": argv,
        "env": [{"name": key, "value": value} for key, value in {"HOME": "/tmp", **environment}.items()],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
    }


def _mounts(*paths: str) -> list[dict[str, Any]]:
    """Volumes by where they are mounted; those that are only read are mounted so."""
    names = {ROOT: "scalellm", "/tmp": "tmp", SHARED: "shared", RECIPES: "recipes", KEYS: "keys", REGISTRY: "registry"}
    read = {RECIPES, KEYS, REGISTRY}
    return [{"name": names[path], "mountPath": path, **({"readOnly": True} if path in read else {})} for path in paths]


def _puller(wanted: Wanted, kind: Kind) -> dict[str, Any]:
    """It asks for no GPU, so that it may run before one is free. The registry's credentials are in it alone."""
    registry = REGISTRY if wanted.is_folder else wanted.registry
    lines = [*commands.install(wanted, ROOT), commands.pull(wanted, ROOT, kind.package, registry)]
    credentials = {"envFrom": [{"secretRef": {"name": f"{wanted.name}-registry", "optional": True}}]}
    return {
        **_container(kind, "engine", ["sh", "-c", commands.script(lines)], **commands.NO_GPU),
        **({} if wanted.is_folder else credentials),
        "resources": {"requests": {"cpu": "1", "memory": "2Gi"}},
        "volumeMounts": _mounts(ROOT, "/tmp", *([REGISTRY] if wanted.is_folder else [])),
    }


def _server(wanted: Wanted, kind: Kind) -> dict[str, Any]:
    recipe = f"{RECIPES}/{kind.recipe.name}.yaml"
    argv = commands.serve(
        *(wanted, ROOT, kind.name, "--recipe", recipe),
        keys=f"{KEYS}/{KEYS_FILE}",
        server=commands.server_of(kind),
    )
    ports = [{"name": "openai", "containerPort": PORT}]
    if wanted.deployment.ports.predict:
        ports.append({"name": "predict", "containerPort": PREDICT_PORT})
    return {
        **_container(kind, "server", list(argv)),
        "ports": ports,
        **_probes(),
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(PAUSE_S)]}}},
        "resources": _resources(kind),
        "volumeMounts": _mounts(ROOT, "/tmp", SHARED, RECIPES, KEYS),
    }


def _probes() -> dict[str, Any]:
    """Ready: a token was generated lately. Alive: the gateway answers, since its supervisor replaces a Triton that
    generates no more; where that is given up, the process ends.
    """

    def ask(path: str, **more: int) -> dict[str, Any]:
        return {
            "httpGet": {"path": path, "port": "openai"},
            "periodSeconds": _PROBE_S,
            "timeoutSeconds": _LATE_S,
            **more,
        }

    return {
        "startupProbe": ask("/ready", failureThreshold=round(START_S / _PROBE_S) + 6),
        "readinessProbe": ask("/ready", failureThreshold=1),
        "livenessProbe": ask("/health", failureThreshold=6),
    }


def _resources(kind: Kind) -> dict[str, Any]:
    def gib(size: int) -> str:
        return f"{-(-size // GIB)}Gi"

    asked = {"cpu": _CPUS, "memory": gib(kind.bytes + _RAM), "ephemeral-storage": gib(2 * kind.bytes + _DISK)}
    if kind.device.is_cpu:
        return {"requests": asked}
    return {"requests": asked, "limits": {GPU: str(kind.gpus)}}


def _volumes(wanted: Wanted, kind: Kind) -> list[dict[str, Any]]:
    """The same shared memory as ``serve`` gives a container of its own: for Triton's Python models, and for NCCL."""
    shared = "4Gi" if kind.gpus > 1 else "1Gi"
    registry = {"name": "registry", "persistentVolumeClaim": {"claimName": wanted.claim, "readOnly": True}}
    return [
        {"name": "scalellm", "emptyDir": {}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "shared", "emptyDir": {"medium": "Memory", "sizeLimit": shared}},
        {"name": "recipes", "configMap": {"name": f"{wanted.name}-recipes"}},
        {"name": "keys", "secret": {"secretName": f"{wanted.name}-keys", "defaultMode": 0o440}},
        *([registry] if wanted.is_folder else []),
    ]
