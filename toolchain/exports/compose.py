"""A compose file for one machine: Tritons, the gateway in front of them, Prometheus and Grafana with its dashboards.

The gateway is published where the deployment says, Prometheus and Grafana on loopback, the Tritons nowhere. Keys:
https://github.com/compose-spec/compose-spec/blob/main/spec.md (read 2026-11-22).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from toolchain.document import yaml_text
from toolchain.errors import PlanError
from toolchain.exports import commands, dashboards, guide, monitoring
from toolchain.exports.commands import KEYS_FILE, PORT, PREDICT_PORT, START_S
from toolchain.exports.wanted import Kind, Wanted
from toolchain.servers.triton.command import PORTS_APART
from toolchain.servers.triton.command import Ports as TritonPorts

PROMETHEUS = "prom/prometheus:v3.13.4"
"""Release 3.13.4: VERSION of prometheus/prometheus @007a9e9b. The image was not pulled by us."""
GRAFANA = "grafana/grafana:12.3.2"
"""A tag that public compose files name (read 2026-11-22). The image was not pulled by us."""
ROOT, REGISTRY, SECRETS = "/scalellm", "/registry", "/run/secrets"
METRICS_KEY, GRAFANA_PASSWORD = "metrics-key", "grafana-password"
_HARDENED = {"read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"]}
_MARGIN_S = 15


def files(wanted: Wanted) -> dict[str, str]:
    """compose.yaml, and what Prometheus and Grafana are provisioned with. Raises PlanError for several devices."""
    kind = _only(wanted)
    provisioning = "grafana/provisioning"
    return {
        "compose.yaml": yaml_text(_compose(wanted, kind)),
        "prometheus/prometheus.yml": yaml_text(monitoring.of_gateway(f"gateway:{PORT}", f"{SECRETS}/{METRICS_KEY}")),
        "prometheus/alerts.yaml": yaml_text(monitoring.alerts(wanted)),
        f"{provisioning}/datasources/prometheus.yaml": yaml_text(datasource("http://prometheus:9090")),
        f"{provisioning}/dashboards/scalellm.yaml": yaml_text(provider()),
        **{f"grafana/dashboards/{name}": text for name, text in dashboards.texts(wanted.name)},
        "models/.gitkeep": "",
        "README.md": guide.compose(wanted, list(notes(wanted))),
    }


def notes(wanted: Wanted) -> Iterator[str]:
    """What the deployment asks for and compose does not do."""
    if wanted.most > wanted.least:
        yield f"replicas.max: compose does not scale; it keeps {wanted.least}"
    yield from wanted.left_out
    if wanted.deployment.max_price_per_hour is not None:
        yield "max_price_per_hour: compose rents no machines"


def _only(wanted: Wanted) -> Kind:
    if len(wanted.kinds) > 1:
        listed = ", ".join(kind.recipe.name for kind in wanted.kinds)
        raise PlanError(
            f"compose is for the GPUs of one machine, which are of one kind; the deployment has the recipes {listed}",
            hint="scalellm deploy export kubernetes, or one deployment for each recipe",
        )
    if not wanted.kinds[0].least:
        raise PlanError("compose does not begin at zero replicas", hint="replicas: {min: 1}")
    return wanted.kinds[0]


def _compose(wanted: Wanted, kind: Kind) -> dict[str, Any]:
    tritons = {f"triton-{number + 1}": _triton(wanted, kind, number) for number in range(kind.least)}
    names = ("gateway-keys.json", METRICS_KEY, GRAFANA_PASSWORD)
    return {
        "services": {
            "engine": _puller(wanted, kind),
            **tritons,
            "gateway": _gateway(wanted, kind, list(tritons)),
            "prometheus": prometheus(),
            "grafana": grafana(),
        },
        "networks": {"engines": {"internal": True}, "doors": {}},
        "volumes": {"prometheus": {}, "grafana": {}},
        "secrets": {name.partition(".")[0]: {"file": f"./secrets/{name}"} for name in names},
    }


def _ours(kind: Kind, command: tuple[str, ...], **more: Any) -> dict[str, Any]:
    """A container of ours: as the user who starts it, with nothing to write but the models' folder and /tmp."""
    return {
        "image": kind.image,
        "command": [word.replace("$", "$$") for word in command],  # compose fills in what begins with one
        "user": "${SCALELLM_UID:-1000}:${SCALELLM_GID:-1000}",
        "environment": {"HOME": "/tmp"},
        "volumes": [{"type": "bind", "source": "./models", "target": ROOT}],
        "tmpfs": ["/tmp:exec"],
        "init": True,
        **_HARDENED,
        **more,
    }


def _puller(wanted: Wanted, kind: Kind) -> dict[str, Any]:
    """Runs once, and ends; the others wait for it."""
    registry = REGISTRY if wanted.is_folder else wanted.registry
    lines = [*commands.install(wanted, ROOT), commands.pull(wanted, ROOT, kind.package, registry)]
    found = _ours(kind, ("sh", "-c", commands.script(lines)), networks=["doors"], restart="no")
    found["environment"] |= {**commands.NO_GPU, **dict.fromkeys(commands.credentials(wanted))}
    if wanted.is_folder:
        found["volumes"].append({"type": "bind", "source": wanted.registry, "target": REGISTRY, "read_only": True})
    return found


def _triton(wanted: Wanted, kind: Kind, number: int) -> dict[str, Any]:
    """The ``number``-th replica, on the GPUs that follow those of the one before."""
    serve = (commands.program(wanted, ROOT), "serve", "--repository", commands.repository(ROOT, kind.name))
    flags = ("--server", commands.server_of(kind), "--host", "0.0.0.0", "--start-timeout", f"{START_S:g}")
    drain = ("--drain", f"{commands.drain_s(wanted):g}", "--log", f"{ROOT}/triton-{number + 1}/triton.log")
    ready = f"http://127.0.0.1:{TritonPorts().http}/v2/health/ready"
    found = _ours(
        kind,
        (*serve, *flags, *drain),
        networks=["engines"],
        depends_on={"engine": {"condition": "service_completed_successfully"}},
        healthcheck=_healthy(wanted, ready),
        **_lasting(wanted),
        shm_size="4gb" if kind.gpus > 1 else "1gb",
    )
    if kind.gpus:
        ids = [str(number * kind.gpus + one) for one in range(kind.gpus)]
        gpus = {"driver": "nvidia", "device_ids": ids, "capabilities": ["gpu"]}
        found["deploy"] = {"resources": {"reservations": {"devices": [gpus]}}}
    return found


def _gateway(wanted: Wanted, kind: Kind, tritons: list[str]) -> dict[str, Any]:
    deployment, first = wanted.deployment, TritonPorts()
    behind = [
        word
        for host in tritons
        for place in range(0, kind.services * PORTS_APART, PORTS_APART)
        for word in (
            *("--triton", f"http://{host}:{first.http + place}"),
            *("--triton-metrics", f"http://{host}:{first.metrics + place}/metrics"),
        )
    ]
    published = [f"{deployment.host}:{deployment.ports.openai}:{PORT}"]
    if deployment.ports.predict:
        published.append(f"{deployment.host}:{deployment.ports.predict}:{PREDICT_PORT}")
    command = (
        *(commands.program(wanted, ROOT), "gateway", "--repository", commands.repository(ROOT, kind.name), *behind),
        *("--host", "0.0.0.0", "--port", str(PORT), *commands.predict_door(wanted), "--model-name", wanted.name),
        *("--keys", f"{SECRETS}/{KEYS_FILE.partition('.')[0]}", "--max-queue", str(deployment.max_queue)),
    )
    found = _ours(
        kind,
        command,
        networks=["engines", "doors"],
        ports=published,
        secrets=[KEYS_FILE.partition(".")[0]],
        depends_on={
            "engine": {"condition": "service_completed_successfully"},
            **{host: {"condition": "service_started"} for host in tritons},
        },
        healthcheck=_healthy(wanted, f"http://127.0.0.1:{PORT}/ready"),
        **_lasting(wanted),
    )
    found["environment"] |= commands.NO_GPU
    return found


def _lasting(wanted: Wanted) -> dict[str, Any]:
    return {"restart": "unless-stopped", "stop_grace_period": f"{round(commands.drain_s(wanted)) + _MARGIN_S}s"}


def _healthy(wanted: Wanted, url: str) -> dict[str, Any]:
    """Asked with Python, since not every image has curl."""
    python = f"{ROOT}/venv/bin/python" if wanted.install else "python3"
    ask = f"import urllib.request; urllib.request.urlopen({url!r}, timeout=5)"
    test = ["CMD", python, "-c", ask]
    return {"test": test, "interval": "10s", "timeout": "10s", "retries": 3, "start_period": f"{START_S:g}s"}


def prometheus() -> dict[str, Any]:
    """Its service, published on loopback."""
    return {
        "image": PROMETHEUS,
        "command": ["--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.retention.time=15d"],
        "volumes": [
            {"type": "bind", "source": "./prometheus", "target": "/etc/prometheus", "read_only": True},
            {"type": "volume", "source": "prometheus", "target": "/prometheus"},
        ],
        "secrets": [METRICS_KEY],
        "ports": ["127.0.0.1:9090:9090"],
        "networks": ["doors"],
        "restart": "unless-stopped",
        "depends_on": {"gateway": {"condition": "service_started"}},
        **_HARDENED,
    }


def grafana() -> dict[str, Any]:
    """Its service, published on loopback."""
    return {
        "image": GRAFANA,
        "environment": {
            "GF_SECURITY_ADMIN_PASSWORD__FILE": f"{SECRETS}/{GRAFANA_PASSWORD}",
            "GF_ANALYTICS_REPORTING_ENABLED": "false",
            "GF_USERS_ALLOW_SIGN_UP": "false",
        },
        "volumes": [
            {
                "type": "bind",
                "source": "./grafana/provisioning",
                "target": "/etc/grafana/provisioning",
                "read_only": True,
            },
            {"type": "bind", "source": "./grafana/dashboards", "target": "/dashboards", "read_only": True},
            {"type": "volume", "source": "grafana", "target": "/var/lib/grafana"},
        ],
        "tmpfs": ["/tmp"],
        "secrets": [GRAFANA_PASSWORD],
        "ports": ["127.0.0.1:3000:3000"],
        "networks": ["doors"],
        "restart": "unless-stopped",
        "depends_on": {"prometheus": {"condition": "service_started"}},
        **_HARDENED,
    }


def datasource(url: str) -> dict[str, Any]:
    """Prometheus: https://grafana.com/docs/grafana/latest/administration/provisioning/ (read 2026-11-22)."""
    return {
        "apiVersion": 1,
        "datasources": [
            {
                "name": "Prometheus",
                "uid": dashboards.DATASOURCE["uid"],
                "type": "prometheus",
                "access": "proxy",
                "url": url,
                "isDefault": True,
            }
        ],
    }


def provider() -> dict[str, Any]:
    """Where Grafana finds the dashboards."""
    options = {"path": "/dashboards"}
    return {
        "apiVersion": 1,
        "providers": [{"name": "scalellm", "type": "file", "allowUiUpdates": False, "options": options}],
    }
