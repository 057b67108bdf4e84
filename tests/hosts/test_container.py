"""The pinned image on this machine: exactly what docker and podman are asked, and what is refused before."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hosts.fakes import A100, RTX4090, Programs, make_job
from toolchain import hosts
from toolchain.errors import ToolError
from toolchain.host import EngineJob
from toolchain.hosts.command import container_argv
from toolchain.progress import Silent

IMAGE = "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"
DOCKER = shutil.which("docker")
Install = Callable[..., Programs]


@pytest.mark.parametrize("tool", ["docker", "podman"])
def test_a_build_in_a_container_runs_exactly_the_command_that_is_printed(
    programs: Install, tmp_path: Path, tool: str
) -> None:
    fake, job = programs(tool, "nvidia-smi"), make_job(tmp_path / "work")
    fake.behave(images=[IMAGE])
    host = hosts.load("container")
    assert host.lacks(job) == ()
    _, printed = host.commands(job)
    host.build(job, tmp_path / "work" / "build.log", Silent())
    (run,) = [call for call in fake.calls(tool) if call["argv"][0] == "run"]
    assert host.commands(job)[0].argv == ("mkdir", "-p", str(job.out))
    assert (tool, *run["argv"]) == printed.argv
    assert sorted(file.name for file in job.out.iterdir()) == ["config.json", "rank0.engine"]


def test_the_container_gets_the_pinned_image_the_callers_id_a_read_only_checkpoint_and_no_network(
    programs: Install, tmp_path: Path
) -> None:
    programs("docker", "nvidia-smi")
    job = make_job(tmp_path / "work")
    _, command = hosts.load("container").commands(job)
    flags = set(command.argv)
    assert {
        "--rm",
        "--pull=never",
        "--network=none",
        f"--user={os.getuid()}:{os.getgid()}",
        "--env=HOME=/tmp",
        "--ulimit=memlock=-1",
        "--ulimit=stack=67108864",
        "--gpus=device=0",
        "--name=scalellm-5f2c0a91d3e4",
        f"--volume={job.checkpoint}:/checkpoint:ro",
        f"--volume={job.out}:/engine",
    } <= flags
    at = command.argv.index(IMAGE)
    assert command.argv[at + 1 :] == job.argv("/checkpoint", "/engine")
    assert "--network=none" not in hosts.load("container:network").commands(job)[1].argv


def test_another_image_can_be_named_as_one_compiled_for_an_old_gpu(programs: Install, tmp_path: Path) -> None:
    fake, job = programs("docker", "nvidia-smi"), make_job(tmp_path / "work")
    own = "registry.example/trtllm:0.13.0-75-real"
    host = hosts.load(f"container:image={own},0")
    assert host.lacks(job) == (f"the image {own}, which --on names",)
    fake.behave(images=[own])
    assert host.lacks(job) == ()
    host.build(job, tmp_path / "build.log", Silent())
    assert (job.out / "rank0.engine").is_file()
    with pytest.raises(ToolError, match="no name of an image"):
        hosts.load("container:image=a b")


def test_podman_names_gpus_as_cdi_devices(programs: Install, tmp_path: Path) -> None:
    programs("docker", "podman", "nvidia-smi")
    job = make_job(tmp_path / "work", gpus=2)
    _, command = hosts.load("container:podman,0,2").commands(job)
    assert command.argv[0] == "podman"
    assert {"--device=nvidia.com/gpu=0", "--device=nvidia.com/gpu=2"} <= set(command.argv)
    assert "--security-opt=label=disable" in command.argv
    _, command = hosts.load("container:0,2").commands(job)
    assert '--gpus="device=0,2"' in command.argv


def test_a_build_that_ends_badly_leaves_no_container(programs: Install, tmp_path: Path) -> None:
    fake, job = programs("docker", "nvidia-smi"), make_job(tmp_path / "work")
    fake.behave(images=[IMAGE], says=["[TRT] [E] Error Code 2: OutOfMemory (no further information)"], exit=1)
    with pytest.raises(ToolError, match="Likely cause: the GPU's memory is full"):
        hosts.load("container").build(job, tmp_path / "build.log", Silent())
    assert [call["argv"] for call in fake.calls("docker")][-1] == ["rm", "--force", "scalellm-5f2c0a91d3e4"]


def test_an_image_that_is_not_here_is_named_with_its_pull_command(programs: Install, tmp_path: Path) -> None:
    programs("docker", "nvidia-smi")
    (image,) = hosts.load("container").lacks(make_job(tmp_path / "work"))
    assert image == f"the image of TensorRT-LLM 1.2.1: docker pull {IMAGE}"


def test_a_daemon_that_does_not_answer_is_quoted(programs: Install, tmp_path: Path) -> None:
    fake = programs("docker", "nvidia-smi")
    words = "permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock"
    fake.behave(info_error=words)
    (tool,) = hosts.load("container").lacks(make_job(tmp_path / "work"))
    assert tool == f"a docker that answers: {words}"


def test_the_gpu_that_the_container_would_get_has_to_fit(programs: Install, tmp_path: Path) -> None:
    fake, job = programs("docker", "nvidia-smi"), make_job(tmp_path / "work")
    fake.behave(images=[IMAGE], gpus=[A100, RTX4090.replace("0,", "1,", 1)])
    (gpu,) = hosts.load("container").lacks(job)
    assert gpu.endswith("Name them: --on container:1")
    assert hosts.load("container:1").lacks(job) == ()


def test_a_machine_without_container_tools_says_so(programs: Install, tmp_path: Path) -> None:
    programs("nvidia-smi")
    assert hosts.load("container").lacks(make_job(tmp_path / "work")) == (
        "docker or podman with the NVIDIA Container Toolkit",
    )


@pytest.mark.skipif(DOCKER is None, reason="no docker client")
@pytest.mark.parametrize("gpus", [("0",), ("0", "1")])
def test_the_docker_client_takes_every_flag(tmp_path: Path, gpus: tuple[str, ...]) -> None:
    job: EngineJob = make_job(tmp_path / "work")
    argv = container_argv(
        str(DOCKER), job, checkpoint="/c", out="/o", user="1:1", gpus=gpus, keep_id=True, network=False
    )
    nowhere = {**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/none.sock"}
    refused = subprocess.run(argv, env=nowhere, capture_output=True, text=True, timeout=60, check=False)
    assert "connect" in refused.stderr
    assert "flag" not in refused.stderr
    assert "invalid" not in refused.stderr
