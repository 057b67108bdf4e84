"""A rented GPU: the task that SkyPilot gets, what is refused before money is spent, and that every machine goes back.

SkyPilot's own reader judges the task in ``test_sky_reader.py``. Nothing was ever rented for these tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.hosts.fakes import Programs, make_job
from toolchain import hosts
from toolchain.device import devices
from toolchain.errors import ToolError
from toolchain.progress import Silent

Install = Callable[..., Programs]
NAME = "scalellm-5f2c0a91d3e4"


@pytest.fixture
def rented(programs: Install, tmp_path: Path) -> Programs:
    """``sky`` with credentials for RunPod and AWS."""
    home = tmp_path / "home"
    home.mkdir()
    fake = programs("sky", "rsync", "trtllm-build")
    fake.behave(home=str(home), clouds=["AWS", "RunPod"])
    return fake


def test_the_engine_comes_back_by_exactly_the_commands_that_are_printed(rented: Programs, tmp_path: Path) -> None:
    job = make_job(tmp_path / "work")
    host = hosts.load("sky")
    assert host.lacks(job) == ()
    printed = [command.argv for command in host.commands(job)]
    assert len(rented.calls("sky")) == 1, "commands() runs nothing"
    rented.behave(says=["[TRT] [I] Engine generation completed in 13.4 seconds."])
    host.build(job, tmp_path / "build.log", Silent())
    assert sorted(file.name for file in job.out.iterdir()) == ["config.json", "rank0.engine"]
    ran = [(call["program"], *call["argv"]) for name in ("sky", "rsync") for call in rented.calls(name)]
    assert [argv for argv in printed if argv[0] == "sky"] == [argv for argv in ran if argv[0] == "sky"][1:]
    assert [argv for argv in printed if argv[0] == "rsync"] == [argv for argv in ran if argv[0] == "rsync"]
    assert printed[-1] == ("sky", "down", "--yes", NAME)
    assert "Engine generation completed" in (tmp_path / "build.log").read_text()


def test_the_task_asks_for_the_plans_gpu_in_the_pinned_image(rented: Programs, tmp_path: Path) -> None:
    job = make_job(tmp_path / "work", gpus=2, kind="a100-80gb", version="0.21.0")
    task = yaml.safe_load(hosts.load("sky:aws/us-east-1").task(job))
    assert task["name"] == NAME
    assert task["resources"]["accelerators"] == "A100-80GB:2"
    assert task["resources"]["image_id"] == "docker:nvcr.io/nvidia/tritonserver:25.08-trtllm-python-py3"
    assert task["resources"]["infra"] == "aws/us-east-1"
    assert task["file_mounts"] == {"~/scalellm-build/checkpoint": str(job.checkpoint)}
    assert task["run"].splitlines()[-1].startswith('trtllm-build --checkpoint_dir "$HOME"/scalellm-build/checkpoint ')
    assert "infra" not in yaml.safe_load(hosts.load("sky").task(job))["resources"]


def test_disk_and_memory_grow_with_the_checkpoint(rented: Programs, tmp_path: Path) -> None:
    job = make_job(tmp_path / "work")
    with (job.checkpoint / "rank0.safetensors").open("r+b") as stream:
        stream.truncate(14 * 10**9)
    resources = yaml.safe_load(hosts.load("sky").task(job))["resources"]
    assert resources["disk_size"] == 60 + 36
    assert resources["memory"] == "33+"


def test_a_gpu_that_nobody_rents_is_said_before_anything_runs(rented: Programs, tmp_path: Path) -> None:
    job = make_job(tmp_path / "work")
    own = replace(job, device=replace(job.device, title="Titan X", skypilot="", skypilot_clouds=()))
    assert hosts.load("sky").lacks(own) == ("an offer: none of SkyPilot's clouds has the Titan X",)
    assert hosts.load("sky:gcp").lacks(job) == (
        "an offer on gcp: SkyPilot rents the RTX 4090, with an image, on RunPod, Vast",
    )
    assert not rented.calls("sky")


def test_without_credentials_for_a_cloud_that_has_it_the_build_is_refused(rented: Programs, tmp_path: Path) -> None:
    job = make_job(tmp_path / "work")
    rented.behave(clouds=["AWS"])
    assert hosts.load("sky").lacks(job) == ("credentials for RunPod or Vast: sky check shows AWS",)
    assert hosts.load("sky:vast").lacks(job) == ("credentials for vast: sky check shows AWS",)
    rented.behave(refuse="No cloud is enabled. SkyPilot will not be able to run any task.")
    (line,) = hosts.load("sky").lacks(job)
    assert line.endswith("sky check shows none (No cloud is enabled. SkyPilot will not be able to run any task.)")


def test_a_machine_without_skypilot_says_how_to_get_it(programs: Install, tmp_path: Path) -> None:
    programs("rsync")
    (line,) = hosts.load("sky").lacks(make_job(tmp_path / "work"))
    assert "pip install 'skypilot[CLOUD]==0.14.1'" in line


def test_a_failed_build_gives_the_machine_back_and_is_explained(rented: Programs, tmp_path: Path) -> None:
    rented.behave(says=["[TRT] [E] Error Code 2: OutOfMemory (no further information)"], exit=1)
    with pytest.raises(ToolError, match="Likely cause: the GPU's memory is full") as caught:
        hosts.load("sky").build(make_job(tmp_path / "work"), tmp_path / "build.log", Silent())
    assert rented.calls("sky")[-1]["argv"] == ["down", "--yes", NAME]
    assert "sky gpus list RTX4090" in caught.value.hint


def test_an_engine_that_cannot_be_fetched_stays_where_it_was_paid_for(
    rented: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (rented.folder / "rsync").write_text("#!/bin/sh\necho 'connection unexpectedly closed' >&2\nexit 12\n")
    with pytest.raises(ToolError, match="connection unexpectedly closed") as caught:
        hosts.load("sky").build(make_job(tmp_path / "work"), tmp_path / "build.log", Silent())
    assert [call["argv"][0] for call in rented.calls("sky")] == ["launch"]
    assert f"sky down --yes {NAME}" in caught.value.hint


@pytest.mark.parametrize("target", ["a b", "-x", "aws/a/b/c", "$(x)"])
def test_a_cloud_that_is_none_is_refused(target: str) -> None:
    with pytest.raises(ToolError, match="--on sky:"):
        hosts.load(f"sky:{target}")


def test_every_gpu_says_who_rents_it_and_the_cpu_does_not() -> None:
    for entry in devices().values():
        assert bool(entry.skypilot) == bool(entry.skypilot_clouds) == (not entry.is_cpu)
