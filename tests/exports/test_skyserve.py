"""The service, as it was written; SkyPilot itself reads it with ``make test-sky``, in an environment of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.exports import golden
from tests.exports.conftest import FLAGS, Export
from tests.exports.packages import DEPLOYMENT, push
from tests.hosts.test_sky_reader import CATALOG, PYTHON
from tests.hosts.test_sky_reader import read as read_with_sky
from toolchain import workspace
from toolchain.device import devices
from toolchain.errors import PlanError
from toolchain.exports.commands import KEYS_SECRET as KEYS

needs_sky = pytest.mark.skipif(not PYTHON, reason="no SkyPilot: make test-sky")
SKY = FLAGS["skyserve"]
TWO = DEPLOYMENT.replace("[rtx4090]", "[rtx4090, l4]")
_COLUMNS = "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Price,Region,GpuInfo,SpotPrice"


def service(export: Export, text: str = DEPLOYMENT, *flags: object) -> dict[str, Any]:
    found: dict[str, Any] = export("skyserve", text, *(flags or SKY))["service.yaml"]
    return found


def read(home: Path, text: str, command: list[str], *secrets: str) -> Any:
    """What SkyServe makes of it, offline: with a catalog of made-up prices for the two clouds that have the card."""
    for name, columns, end in (("runpod", f"{_COLUMNS},AvailabilityZone", ",US-GA-1"), ("vast", _COLUMNS, "")):
        folder = home / ".sky" / "catalogs" / CATALOG / name
        folder.mkdir(parents=True)
        row = f'1x_RTX4090,RTX4090,1.0,16,64,0.69,US,"{{}}",0.35{end}'
        (folder / "vms.csv").write_text(f"{columns}\n{row}\n")
    asked = {"service": text, "secrets": dict.fromkeys(secrets, "{}"), "command": command}
    return read_with_sky(home, asked, Path(__file__).with_name("sky_service_reader.py"))


@needs_sky
def test_skyserve_reads_the_service_as_it_is_meant(export: Export, tmp_path: Path) -> None:
    found = export("skyserve", DEPLOYMENT, *SKY, raw=True)
    up = next(line for line in found["README.md"].splitlines() if "sky serve up" in line)
    command = ["sky", "serve", "up", str(tmp_path / "out" / "service.yaml"), "-n", "my-llama"]
    assert all(word in up for word in (*command[:3], *command[4:]))
    told = read(tmp_path / "sky-home", found["service.yaml"], [*command, "--secret", f"{KEYS}={{}}"], KEYS)
    assert told["version"] == "0.14.1"
    assert sorted(one["cloud"] for one in told["resources"]) == ["RunPod", "Vast"]
    for one in told["resources"]:
        assert (one["accelerators"], one["use_spot"], one["ports"]) == ({"RTX4090": 1}, True, ["8080"])
        assert one["image"] == "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"
        assert one["max_hourly_cost"] == 4.5 / 6
    assert told["readiness"] == ["/ready", 1800, None]
    assert told["replicas"] == [2, 6, 2]
    assert told["fallback"] is True
    assert told["placer"] == ["RunPod", "Vast"]
    assert (told["policy"], told["stream_timeout_s"]) == ("least_load", 1800)
    assert told["secrets"] == [KEYS]


@needs_sky
def test_skyserve_reads_a_service_of_several_devices(tmp_path: Path) -> None:
    text = golden.files("skyserve")["service.yaml"]
    secrets = (KEYS, "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    told = read(tmp_path / "sky-home", text, ["sky", "serve", "up", "service.yaml"], *secrets)
    rented = sorted({(one["cloud"], *one["accelerators"].items()) for one in told["resources"]})
    assert rented == [
        *((cloud, ("A100-80GB", 2)) for cloud in ("AWS", "Azure", "GCP", "RunPod")),
        *((cloud, ("RTX4090", 1)) for cloud in ("RunPod", "Vast")),
    ]
    assert (told["placer"], told["fallback"], told["secrets"]) == (None, True, sorted(secrets))


def test_machines_are_spot_on_every_cloud_that_rents_the_card_so(export: Export) -> None:
    resources = service(export)["resources"]
    assert resources["use_spot"] is True
    assert [one["infra"] for one in resources["any_of"]] == ["runpod", "vast"]
    assert {tuple(one["accelerators"].items()) for one in resources["any_of"]} == {(("RTX4090", 1),)}


def test_clouds_without_spot_machines_are_left_out_unless_it_is_on_demand(export: Export) -> None:
    text = DEPLOYMENT.replace("rtx4090", "l4")
    assert [one["infra"] for one in service(export, text)["resources"]["any_of"]] == ["aws", "gcp", "runpod"]
    found = service(export, text, *SKY, "--on-demand", "--force")
    assert [one["infra"] for one in found["resources"]["any_of"]] == ["aws", "gcp", "runpod", "seeweb"]
    assert found["resources"]["use_spot"] is False
    assert not found["service"]["replica_policy"].keys() & {"spot_placer", "dynamic_ondemand_fallback"}


def test_every_cloud_of_a_device_is_known_to_rent_spot_machines_or_not() -> None:
    known = workspace.facts("clouds")["clouds"]
    assert {cloud for one in devices().values() for cloud in one.skypilot_clouds} <= known.keys()


def test_several_devices_each_get_their_package_and_no_spot_placer(export: Export) -> None:
    found = export("skyserve", TWO, *SKY)
    text = found["service.yaml"]
    assert "spot_placer" not in text["service"]["replica_policy"]
    assert text["service"]["replica_policy"]["dynamic_ondemand_fallback"] is True
    assert "spot_placer" in found["README.md"]
    for kind in ("rtx4090", "l4"):
        assert f"package={found['told']['packages'][kind]} " in text["setup"]


@pytest.mark.parametrize(
    ("gpu", "package"), [("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA L4", "l4"), ("Tesla T4", "")]
)
def test_a_machine_pulls_the_package_of_the_gpu_that_it_has(
    export: Export, tmp_path: Path, gpu: str, package: str
) -> None:
    """The setup itself, run by a shell with stand-ins for the programs."""
    found = export("skyserve", TWO, *SKY)
    programs, home = tmp_path / "bin", tmp_path / "machine"
    programs.mkdir()
    home.mkdir()
    for name, body in (("nvidia-smi", f"echo '{gpu}'"), ("python3", 'test "$2" != venv || mkdir -p "$4/bin"')):
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    pulls = home / "scalellm" / "venv" / "bin" / "scalellm"
    pulls.parent.mkdir(parents=True)
    pulls.write_text('#!/bin/sh\necho "$@"\n')
    pulls.chmod(0o755)
    env = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(home)}
    done = subprocess.run(
        ["bash", "-c", found["service.yaml"]["setup"]], env=env, capture_output=True, text=True, timeout=30, check=False
    )
    if not package:
        assert (done.returncode, done.stderr) == (1, f"There is no package for this GPU: {gpu}\n")
        return
    assert done.returncode == 0, done.stderr
    digest = found["told"]["packages"][package]
    assert done.stdout.split() == [
        *("model", "pull", "-n", digest, "--home", f"{home}/scalellm/home"),
        *("--registry", f"{home}/scalellm-registry"),
    ]


def test_a_registry_in_a_folder_is_sent_along(export: Export, registry: Path) -> None:
    assert service(export)["file_mounts"] == {"~/scalellm-registry": str(registry)}


def test_the_budget_is_skypilots_limit_for_each_replica(export: Export) -> None:
    assert service(export)["resources"]["max_hourly_cost"] == 0.75


def test_replicas_that_vary_need_a_number_of_requests(export: Export) -> None:
    with pytest.raises(PlanError, match="SkyServe scales on requests per second") as found:
        export("skyserve", DEPLOYMENT)
    assert "--target-qps" in found.value.hint
    fixed = export("skyserve", DEPLOYMENT.replace(", max: 6", ""))["service.yaml"]["service"]["replica_policy"]
    assert (fixed["min_replicas"], "max_replicas" in fixed) == (2, False)


def test_a_device_that_no_cloud_rents_is_refused(export: Export, registry: Path) -> None:
    push(registry, "cpu", device="cpu", sm=None, release=None)
    with pytest.raises(PlanError, match="SkyPilot's clouds do not rent the CPU"):
        export("skyserve", DEPLOYMENT.replace("rtx4090", "cpu"), *SKY, "--image", "python:3.12-slim", "--on-demand")
