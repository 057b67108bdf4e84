"""A build behind ssh: what is refused before anything is sent, what goes over, and what a lost connection costs."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hosts.fake_sshd import Sshd
from tests.hosts.fakes import A100, RTX4090, Programs, make_job
from toolchain import hosts
from toolchain.errors import ToolError
from toolchain.hosts import ssh
from toolchain.progress import Silent

IMAGE = "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"
SSH = shutil.which("ssh", path="/usr/bin:/bin")
Install = Callable[..., Programs]


class Far:
    """A GPU machine that is reached with the fake ssh, and the fake ssh and rsync of this one."""

    def __init__(self, near: Programs, far: Programs, home: Path, sshd: Sshd) -> None:
        self.near, self.far, self.home, self.sshd = near, far, home, sshd

    @property
    def builds(self) -> Path:
        return self.home / ".cache" / "scalellm" / "builds"


@pytest.fixture
def gpu_box(programs: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Far]]:
    """``gpu_box("trtllm-build", ...)`` -> a machine with an RTX 4090 and these programs."""
    monkeypatch.setattr(ssh, "WAITS_S", (0.0, 0.0, 0.0))
    servers: list[Sshd] = []

    def make(*names: str, version: str = "1.2.1", greeting: str = "") -> Far:
        home = tmp_path / "home of the other"
        home.mkdir()
        near = programs("ssh", "rsync")
        near.behave(home=str(home))
        far = Programs(tmp_path / "far", *names, version=version)
        (far.folder / "rsync").symlink_to("/bin/true")
        servers.append(Sshd(near.folder, home, {"PATH": far.path, "PYTHONPATH": str(far.site)}, greeting))
        return Far(near, far, home, servers[0])

    yield make
    for server in servers:
        server.close()


def test_the_engine_comes_back_and_nothing_is_left_there(gpu_box: Callable[..., Far], tmp_path: Path) -> None:
    box, job = gpu_box("trtllm-build", "nvidia-smi", greeting="Welcome to the GPU box!"), make_job(tmp_path / "work")
    box.far.behave(says=["[TRT] [I] Engine generation completed in 13.4 seconds."])
    host = hosts.load("ssh:me@gpu-box")
    assert host.lacks(job) == ()
    host.build(job, tmp_path / "build.log", Silent())
    assert sorted(file.name for file in job.out.iterdir()) == ["config.json", "rank0.engine"]
    assert "Engine generation completed" in (tmp_path / "build.log").read_text()
    assert list(box.builds.iterdir()) == []
    assert set(box.sshd.hosts) == {"me@gpu-box"}


def test_a_build_runs_exactly_the_commands_that_are_printed(gpu_box: Callable[..., Far], tmp_path: Path) -> None:
    box, job = gpu_box("trtllm-build", "nvidia-smi"), make_job(tmp_path / "work")
    host = hosts.load("ssh:gpu-box")
    printed = [command.argv for command in host.commands(job)]
    assert not box.near.calls("ssh")
    host.build(job, tmp_path / "build.log", Silent())
    ran = [(call["program"], *call["argv"]) for name in ("ssh", "rsync") for call in box.near.calls(name)]
    assert sorted(ran) == sorted(printed)


@pytest.mark.parametrize("tool", ["docker", "podman"])
def test_without_a_builder_of_the_release_the_image_is_used_there(
    gpu_box: Callable[..., Far], tmp_path: Path, tool: str
) -> None:
    box, job = gpu_box("trtllm-build", "nvidia-smi", tool, version="0.21.0"), make_job(tmp_path / "work")
    box.far.behave(images=[IMAGE])
    host = hosts.load("ssh:gpu-box")
    assert host.lacks(job) == ()
    host.build(job, tmp_path / "build.log", Silent())
    (run,) = [call["argv"] for call in box.far.calls(tool) if call["argv"][0] == "run"]
    folder = box.builds / job.key
    assert {
        f"--volume={folder}/checkpoint:/checkpoint:ro",
        f"--volume={folder}/engine:/engine",
        f"--user={os.getuid()}:{os.getgid()}",
        "--network=none",
        "--pull=never",
        IMAGE,
    } <= set(run)
    assert not box.far.calls("trtllm-build")
    assert (job.out / "rank0.engine").is_file()


def test_a_machine_with_neither_builder_nor_image_is_told_both_ways(
    gpu_box: Callable[..., Far], tmp_path: Path
) -> None:
    box = gpu_box("nvidia-smi", "docker")
    box.far.behave(gpus=[A100])
    gpu, *either = hosts.load("ssh:gpu-box").lacks(make_job(tmp_path / "work"))
    assert gpu.startswith("1 GPU of SM 89, such as the RTX 4090: it has 0: NVIDIA A100")
    assert [line.strip() for line in either] == [
        "one of these two:",
        "trtllm-build of TensorRT-LLM 1.2.1: it is not on PATH",
        f"the image of TensorRT-LLM 1.2.1: docker pull {IMAGE}",
    ]
    assert len(box.near.calls("ssh")) == 1


def test_gpus_can_be_named(gpu_box: Callable[..., Far], tmp_path: Path) -> None:
    box, job = gpu_box("trtllm-build", "nvidia-smi"), make_job(tmp_path / "work")
    box.far.behave(gpus=[A100, RTX4090.replace("0,", "1,", 1)])
    (gpu,) = hosts.load("ssh:me@gpu-box").lacks(job)
    assert gpu.endswith("Name them: --on ssh:me@gpu-box/1")
    host = hosts.load("ssh:me@gpu-box/1")
    assert host.lacks(job) == ()
    host.build(job, tmp_path / "build.log", Silent())
    assert box.far.calls("trtllm-build")[0]["env"]["CUDA_VISIBLE_DEVICES"] == "1"


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("Host key verification failed.", "compare the key that it shows"),
        ("me@gpu-box: Permission denied (publickey).", "ssh-copy-id gpu-box"),
        ("ssh: Could not resolve hostname gpu-box: Name or service not known", "the name is not known"),
    ],
)
def test_a_connection_that_is_refused_is_quoted_with_what_to_do(
    gpu_box: Callable[..., Far], tmp_path: Path, said: str, advice: str
) -> None:
    box, job = gpu_box("trtllm-build", "nvidia-smi"), make_job(tmp_path / "work")
    box.near.behave(refuse=said)
    host = hosts.load("ssh:gpu-box")
    (line,) = host.lacks(job)
    assert said in line
    assert advice in line
    with pytest.raises(ToolError) as caught:
        host.build(job, tmp_path / "build.log", Silent())
    assert said in caught.value.message
    assert advice in caught.value.hint


def test_a_dropped_connection_is_taken_up_again_and_the_log_is_whole(
    gpu_box: Callable[..., Far], tmp_path: Path
) -> None:
    box, job = gpu_box("trtllm-build", "nvidia-smi"), make_job(tmp_path / "work")
    box.near.behave(drop_at="Build TensorRT engine")
    box.far.behave(says=["begun", "[TRT-LLM] [I] Build TensorRT engine Unnamed Network 0", "done"], sleep_s=1)
    hosts.load("ssh:gpu-box").build(job, tmp_path / "build.log", Silent())
    assert (box.near.folder / "dropped").exists()
    assert len(box.far.calls("trtllm-build")) == 1
    log = (tmp_path / "build.log").read_text()
    assert [log.count(word) for word in ("begun", "Build TensorRT engine", "done")] == [1, 1, 1]
    assert (job.out / "rank0.engine").is_file()


def test_a_transfer_that_was_cut_off_sends_only_what_is_missing(gpu_box: Callable[..., Far], tmp_path: Path) -> None:
    box, job = gpu_box("trtllm-build", "nvidia-smi"), make_job(tmp_path / "work", gpus=2)
    box.near.behave(rsync_drops=True)
    hosts.load("ssh:gpu-box").build(job, tmp_path / "build.log", Silent())
    sent = (box.near.folder / "copied").read_text().split()
    assert sent[:3] == ["config.json", "rank0.safetensors", "rank1.safetensors"]
    assert (job.out / "rank1.engine").is_file()


def test_a_failed_build_there_is_explained_here_and_can_be_tried_again(
    gpu_box: Callable[..., Far], tmp_path: Path
) -> None:
    box, job = gpu_box("trtllm-build", "nvidia-smi"), make_job(tmp_path / "work")
    box.far.behave(says=["[TRT] [E] Error Code 2: OutOfMemory (no further information)"], exit=1)
    host = hosts.load("ssh:gpu-box")
    with pytest.raises(ToolError, match="Likely cause: the GPU's memory is full") as caught:
        host.build(job, tmp_path / "build.log", Silent())
    assert f"ssh gpu-box rm -rf .cache/scalellm/builds/{job.key}" in caught.value.hint
    assert "OutOfMemory" in (tmp_path / "build-failed.log").read_text()
    box.far.behave(says=[], exit=0)
    host.build(job, tmp_path / "build.log", Silent())
    assert len(box.far.calls("trtllm-build")) == 2
    assert (box.near.folder / "copied").read_text().split().count("rank0.safetensors") == 1


RUN = """
import sys
from pathlib import Path
from tests.hosts.fakes import make_job
from toolchain import hosts
from toolchain.progress import Silent
hosts.load("ssh:gpu-box").build(make_job(Path(sys.argv[1])), Path(sys.argv[1]) / "build.log", Silent())
"""


def test_kill_9_here_does_not_end_the_build_there_and_the_next_run_takes_it_up(
    gpu_box: Callable[..., Far], tmp_path: Path, root: Path
) -> None:
    box, folder = gpu_box("trtllm-build", "nvidia-smi"), tmp_path / "work"
    log = folder / "build.log"
    box.far.behave(says=["[TRT-LLM] [I] Build TensorRT engine Unnamed Network 0"], sleep_s=3)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ["PYTHONPATH"]])}
    victim = subprocess.Popen([sys.executable, "-c", RUN, str(folder)], cwd=root, env=env)
    try:
        end = time.monotonic() + 30
        while "Build TensorRT engine" not in (log.read_text() if log.exists() else ""):
            assert time.monotonic() < end
            time.sleep(0.02)
        victim.send_signal(signal.SIGKILL)
    finally:
        victim.kill()
        victim.wait()
    job = make_job(folder)
    assert list(job.out.iterdir()) == []
    hosts.load("ssh:gpu-box").build(job, log, Silent())
    assert len(box.far.calls("trtllm-build")) == 1
    assert json.loads((job.out / "config.json").read_text())["version"] == "1.2.1"


@pytest.mark.parametrize("target", ["", "-oProxyCommand=x", "a b", "a;b", "me@-x", "host/x", "$(x)", "a/"])
def test_a_target_that_is_no_host_is_refused(target: str) -> None:
    with pytest.raises(ToolError, match="--on ssh:"):
        hosts.load(f"ssh:{target}")


@pytest.mark.skipif(SSH is None, reason="no ssh client")
def test_the_ssh_client_takes_every_option_and_checks_host_keys_whatever_its_config_says(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("Host *\n  StrictHostKeyChecking no\n  BatchMode no\n")
    argv = hosts.load("ssh:me@gpu-box").commands(make_job(tmp_path / "work"))[0].argv
    asked = [str(SSH), "-F", str(config), "-G", *argv[1 : argv.index("--")], "gpu-box"]
    shown = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {"batchmode yes", "stricthostkeychecking true", "serveraliveinterval 15"} <= set(shown)


def test_what_is_run_there_is_plain_shell(tmp_path: Path) -> None:
    host = hosts.load("ssh:gpu-box")
    for command in host.commands(make_job(tmp_path / "work")):
        if command.argv[0] == "ssh":
            subprocess.run(["sh", "-n", "-c", shlex.split(command.argv[-1])[-1]], check=True)
