"""Run by the Python of SkyPilot's own environment: reads a service and a command line as SkyServe does -> JSON.

Standard input: {"service": YAML text, "secrets": {name: value}, "command": argv of sky}. No network: the catalogs are
in HOME.
"""

from __future__ import annotations

import json
import sys

import sky
import yaml
from sky.client.cli import command
from sky.serve import serve_utils, spot_placer

asked = json.load(sys.stdin)
task = sky.Task.from_yaml_config(yaml.safe_load(asked["service"]), secrets_overrides=list(asked["secrets"].items()))
task.validate()
serve_utils.validate_service_task(task, pool=False)
service, placer = task.service, spot_placer.SpotPlacer.from_task(task.service, task)
context = command.cli.commands["serve"].commands["up"].make_context("up", asked["command"][3:])
json.dump(
    {
        "version": sky.__version__,
        "name": task.name,
        "resources": [
            {
                "cloud": str(one.cloud),
                "accelerators": one.accelerators,
                "image": one.extract_docker_image(),
                "use_spot": one.use_spot,
                "ports": one.ports,
                "max_hourly_cost": one.max_hourly_cost,
            }
            for one in task.resources
        ],
        "secrets": sorted(task.secrets),
        "file_mounts": task.file_mounts,
        "readiness": [service.readiness_path, service.initial_delay_seconds, service.post_data],
        "replicas": [service.min_replicas, service.max_replicas, service.target_qps_per_replica],
        "fallback": service.dynamic_ondemand_fallback,
        "placer": sorted(str(one.cloud) for one in placer.location2status) if placer else None,
        "policy": service.load_balancing_policy,
        "stream_timeout_s": service.lb_stream_timeout_seconds,
        "command": {name: value for name, value in context.params.items() if value},
    },
    sys.stdout,
    default=str,
)
