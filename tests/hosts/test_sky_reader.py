"""SkyPilot itself reads the tasks and the command lines that scalellm writes: ``make test-sky``.

It lives in an environment of its own, because it wants another click than we do; SCALELLM_SKY names its Python.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.fakes import make_job
from toolchain import hosts
from toolchain.device import devices

PYTHON = os.environ.get("SCALELLM_SKY", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="no SkyPilot: make test-sky")

_READER = Path(__file__).with_name("sky_reader.py")
CATALOG = "v8"
"""sky.skylet.constants.CATALOG_SCHEMA_VERSION of SkyPilot 0.14.1."""


def read(home: Path, asked: dict[str, Any], reader: Path = _READER) -> Any:
    """What SkyPilot makes of it in ``reader``, offline: with our names of GPUs for its catalog."""
    catalog = home / ".sky" / "catalogs" / CATALOG / "common"
    catalog.mkdir(parents=True)
    rows = [f'{entry.skypilot},"{list(entry.skypilot_clouds)}"' for entry in devices().values() if entry.skypilot]
    (catalog / "accelerators.csv").write_text("\n".join(["AcceleratorName,Clouds", *rows]) + "\n")
    (catalog / "metadata.csv").write_text("GPU,MemoryGB,Manufacturer\n")
    done = subprocess.run(
        [PYTHON, str(reader)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1", "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["rtx4090", "a100-80gb"])
def test_skypilot_reads_the_task_and_the_commands_as_they_are_meant(kind: str, tmp_path: Path) -> None:
    job = make_job(tmp_path / "work", gpus=2, kind=kind)
    cloud = job.device.skypilot_clouds[0]
    host = hosts.load(f"sky:{cloud.lower()}")
    commands = [command.argv for command in host.commands(job) if command.argv[0] == "sky"]
    (tmp_path / "home").mkdir()
    found = read(tmp_path / "home", {"task": host.task(job), "commands": [*commands, ("sky", "check", "-o", "json")]})
    assert found["version"] == "0.14.1"
    assert found["accelerators"] == {job.device.skypilot: 2}
    assert found["cloud"] == cloud
    assert found["image"] == "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"
    assert found["file_mounts"] == {"~/scalellm-build/checkpoint": str(job.checkpoint)}
    assert found["memory"] == "16+"
    launch, down, check = found["commands"]
    assert (launch["cluster"], launch["idle_minutes_to_autostop"], launch["down"], launch["yes"]) == (
        found["name"],
        30,
        True,
        True,
    )
    assert down["clusters"] == [found["name"]]
    assert check["output_format"] == "json"
