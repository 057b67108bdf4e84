"""Run by the Python of SkyPilot's own environment: reads a task and command lines as SkyPilot does -> JSON.

Standard input: {"task": YAML text, "commands": [argv of sky, ...]}. No network: the catalog's names are in HOME.
"""

from __future__ import annotations

import json
import sys

import sky
import yaml
from sky.client.cli import command

asked = json.load(sys.stdin)
task = sky.Task.from_yaml_config(yaml.safe_load(asked["task"]))
task.validate()
(resources,) = task.resources
parsed = []
for _, verb, *args in asked["commands"]:
    context = command.cli.commands[verb].make_context(verb, args)
    parsed.append({name: value for name, value in context.params.items() if value})
json.dump(
    {
        "version": sky.__version__,
        "name": task.name,
        "accelerators": resources.accelerators,
        "image": resources.extract_docker_image(),
        "cloud": str(resources.cloud),
        "disk_size": resources.disk_size,
        "memory": resources.memory,
        "file_mounts": task.file_mounts,
        "run": task.run,
        "commands": parsed,
    },
    sys.stdout,
    default=str,
)
