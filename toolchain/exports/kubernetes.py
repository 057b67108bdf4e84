"""Kubernetes: a Deployment for each kind of device behind one Service, scaled on the gateways' own metrics.

Each pod is whole: an init container pulls the engine by its digest, and one container runs Triton on loopback with the
gateway in front. So Kubernetes' Service spreads the requests, and a pod that is lost takes its running streams with it:
streams move on only behind ``scalellm deploy``'s own front.

Fields: https://kubernetes.io/docs/reference/kubernetes-api/ (1.37). Labels of GPUs: those of NVIDIA's GPU Feature
Discovery (NVIDIA/k8s-device-plugin internal/lm/resource.go @02f65cca): the driver's name, with hyphens for spaces.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from toolchain.document import yaml_text
from toolchain.errors import PlanError
from toolchain.exports import guide, monitoring
from toolchain.exports.commands import PORT, PREDICT_PORT
from toolchain.exports.pod import LABEL, pod
from toolchain.exports.wanted import Kind, Wanted

CLIENTS = {"scalellm-client": "true"}
"""The label of other namespaces that may ask."""
BUSY = 0.75
"""Requests at work, as a share of what an engine takes at a time, above which another replica is wanted. Our choice."""
_CALM_S = 300
"""Before a replica is taken away; Kubernetes' own default."""
_LONGEST_CALM_S = 3600
"""The most that a HorizontalPodAutoscaler takes."""
_LONGEST_NAME = 63


def files(wanted: Wanted) -> dict[str, str]:
    """Manifests, a kustomization that names them, and what Prometheus needs to know."""
    manifests = {
        "recipes.yaml": _recipes(wanted),
        "service.yaml": _service(wanted),
        "disruptions.yaml": _budget(wanted),
        "network.yaml": _network(wanted),
    }
    for kind in wanted.kinds:
        manifests[f"deployment-{kind.label}.yaml"] = _deployment(wanted, kind)
        if _scales(kind):
            manifests[f"autoscaler-{kind.label}.yaml"] = _autoscaler(wanted, kind)
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": wanted.namespace,
        "resources": sorted(manifests),
    }
    return {
        **{name: yaml_text(manifest) for name, manifest in manifests.items()},
        "kustomization.yaml": yaml_text(kustomization),
        "prometheus/scrape.yaml": yaml_text(monitoring.of_pods(wanted)),
        "prometheus/alerts.yaml": yaml_text(monitoring.alerts(wanted)),
        "README.md": guide.kubernetes(wanted, list(notes(wanted))),
    }


def notes(wanted: Wanted) -> Iterator[str]:
    """What the deployment asks for and Kubernetes is not told."""
    for kind in wanted.kinds:
        if kind.least == 0:
            yield (
                f"{kind.label}: its share of replicas.min is 0, and a HorizontalPodAutoscaler does not begin at zero: "
                f"kubectl scale deployment {_name(wanted, kind)} --replicas 1"
            )
    yield from wanted.left_out
    if wanted.deployment.max_price_per_hour is not None:
        yield "max_price_per_hour: Kubernetes knows no prices; the most replicas of each device are what it costs"


def _name(wanted: Wanted, kind: Kind) -> str:
    """Raises PlanError where it would be too long for a name of Kubernetes."""
    name = f"{wanted.name}-{kind.label}"
    if len(name) > _LONGEST_NAME:
        raise PlanError(
            f"{name}: more than the {_LONGEST_NAME} letters of a name in Kubernetes", hint="endpoint: SHORTER"
        )
    return name


def _labels(wanted: Wanted, kind: Kind | None = None) -> dict[str, str]:
    """Of all that belongs to the endpoint, or to one kind of it."""
    return {LABEL: wanted.name, **({"app.kubernetes.io/component": kind.label} if kind else {})}


def _meta(wanted: Wanted, name: str, kind: Kind | None = None) -> dict[str, Any]:
    return {"name": name, "labels": {**_labels(wanted, kind), "app.kubernetes.io/managed-by": "scalellm"}}


def _scales(kind: Kind) -> bool:
    return kind.most > kind.least > 0


def _recipes(wanted: Wanted) -> dict[str, Any]:
    """What the engines were built from; the server refuses an engine of another one."""
    data = {f"{kind.recipe.name}.yaml": kind.recipe.text for kind in wanted.kinds}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _meta(wanted, f"{wanted.name}-recipes"),
        "data": {**data, "DEPLOYMENT.yaml": wanted.text},
    }


def _deployment(wanted: Wanted, kind: Kind) -> dict[str, Any]:
    """With an autoscaler it has no number of its own, which would undo the autoscaler's at each ``apply``."""
    number = {} if _scales(kind) else {"replicas": kind.least}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _meta(wanted, _name(wanted, kind), kind),
        "spec": {
            **number,
            "selector": {"matchLabels": _labels(wanted, kind)},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "minReadySeconds": 10,
            "progressDeadlineSeconds": 3600,
            "template": {"metadata": {"labels": _labels(wanted, kind)}, "spec": pod(wanted, kind)},
        },
    }


def _service(wanted: Wanted) -> dict[str, Any]:
    ports = wanted.deployment.ports
    doors = [{"name": "openai", "port": ports.openai, "targetPort": PORT}]
    if ports.predict:
        doors.append({"name": "predict", "port": ports.predict, "targetPort": PREDICT_PORT})
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _meta(wanted, wanted.name),
        "spec": {"type": "ClusterIP", "selector": _labels(wanted), "ports": doors},
    }


def _autoscaler(wanted: Wanted, kind: Kind) -> dict[str, Any]:
    """More replicas when requests wait, or the engines are nearly full; fewer when it has been calm for long."""
    idle_s = getattr(wanted.deployment.replicas, "idle_seconds", None)
    calm_s = min(_LONGEST_CALM_S, round(idle_s or _CALM_S))
    wants = {"scalellm_gateway_running": max(1, math.floor(BUSY * kind.batch)), "scalellm_gateway_waiting": 1}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": _meta(wanted, _name(wanted, kind), kind),
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": _name(wanted, kind)},
            "minReplicas": kind.least,
            "maxReplicas": kind.most,
            "metrics": [
                {
                    "type": "Pods",
                    "pods": {"metric": {"name": name}, "target": {"type": "AverageValue", "averageValue": str(value)}},
                }
                for name, value in wants.items()
            ],
            "behavior": {
                "scaleUp": {
                    "stabilizationWindowSeconds": 0,
                    "policies": [{"type": "Pods", "value": 2, "periodSeconds": 60}],
                },
                "scaleDown": {
                    "stabilizationWindowSeconds": calm_s,
                    "policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}],
                },
            },
        },
    }


def _budget(wanted: Wanted) -> dict[str, Any]:
    """One pod at a time. Not ``minAvailable``: with a single replica no node could ever be drained."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _meta(wanted, wanted.name),
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": _labels(wanted)}},
    }


def _network(wanted: Wanted) -> dict[str, Any]:
    """In: the gateway's doors, from this namespace and those with the label ``CLIENTS``. Out: names, and HTTPS."""
    doors = [PORT, *([PREDICT_PORT] if wanted.deployment.ports.predict else [])]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _meta(wanted, wanted.name),
        "spec": {
            "podSelector": {"matchLabels": _labels(wanted)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {
                    "from": [{"podSelector": {}}, {"namespaceSelector": {"matchLabels": dict(CLIENTS)}}],
                    "ports": [{"protocol": "TCP", "port": port} for port in doors],
                }
            ],
            "egress": [
                {"ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]},
                {"ports": [{"protocol": "TCP", "port": 443}]},
            ],
        },
    }
