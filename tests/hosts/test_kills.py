"""kill -9 of scalellm during a build: the builder dies with it, nothing half-made is taken for an engine, and the next
run builds again."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import SCALELLM
from tests.gpu_machine import gpu_machine
from tests.hosts.fakes import RTX4090, Programs
from toolchain import workspace

Install = Callable[..., Programs]

RUN = """
import sys
from dataclasses import replace
from pathlib import Path
from tests.hosts.fakes import make_job
from toolchain import hosts, workspace
from toolchain.progress import Silent

folder = Path(sys.argv[1])
with workspace.draft(folder / "engine", "engine", {"of": "the test"}) as draft:
    job = replace(make_job(folder / "made"), out=draft.path)
    hosts.load(sys.argv[2]).build(job, folder / "build.log", Silent())
    draft.commit(versions={}, recipe="")
"""
IMAGE = "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"


def _start(folder: Path, host: str, root: Path) -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(root), os.environ["PYTHONPATH"]])
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder), host], cwd=root, env={**os.environ, "PYTHONPATH": path}
    )


def _until(condition: Callable[[], object], deadline_s: float = 30) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def _sleepers(folder: Path) -> list[psutil.Process]:
    """The processes of the fake builder: they alone have its folder on PATH first."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("PATH", "").startswith(str(folder)) and process.status() != "zombie":
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.mark.parametrize("host", ["local", "container"])
def test_kill_9_leaves_no_stamped_engine_and_no_builder(
    programs: Install, tmp_path: Path, root: Path, host: str
) -> None:
    fake = programs("trtllm-build", "docker", "nvidia-smi")
    fake.behave(sleep_s=300, images=[IMAGE], says=["[TRT-LLM] [I] Build TensorRT engine Unnamed Network 0"])
    folder, log = tmp_path / "work", tmp_path / "work" / "build.log"
    victim = _start(folder, host, root)
    try:
        _until(lambda: log.exists() and "Build TensorRT engine" in log.read_text())
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    finally:
        victim.kill()
        victim.wait()
    _until(lambda: not _sleepers(fake.folder))
    assert workspace.read_stamp(folder / "engine") is None
    assert not list(folder.glob("**/rank*.engine"))
    if host == "container":  # the daemon's own child is none of ours, so that it must be told
        _until(lambda: fake.calls("docker")[-1]["argv"][:2] == ["rm", "--force"])

    fake.behave(sleep_s=0)
    again = _start(folder, host, root)
    assert again.wait(60) == 0
    stamp = workspace.require(folder / "engine", "engine")
    assert sorted(stamp.files) == ["config.json", "rank0.engine"]
    assert json.loads((folder / "engine" / "config.json").read_text())["version"] == "1.2.1"


RECIPE = """\
name: small
model: unused/unused
device: rtx4090
quantization: {weights: int4, group_size: 64, method: rtn}
kv_cache: {dtype: fp16}
limits: {max_batch_size: 4, max_seq_len: 256}
"""


@pytest.mark.parametrize("host", ["local", "container"])
def test_kill_9_of_scalellm_build_leaves_no_engine_and_the_next_run_builds_it(
    random_llama: Callable[..., Path],
    scalellm: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    host: str,
) -> None:
    (tmp_path / "small.yaml").write_text(RECIPE)
    work = tmp_path / "work"
    place = ["--recipe", str(tmp_path / "small.yaml"), "--model", str(random_llama()), "--work", str(work)]
    assert scalellm("convert", *place).returncode == 0
    fake = gpu_machine(tmp_path / "bin", RTX4090, "1.2.1")

    sleeping = Programs(tmp_path / "sleeping", "trtllm-build", "docker", "nvidia-smi")
    sleeping.behave(sleep_s=300, images=[IMAGE], says=["[TRT-LLM] [I] Build TensorRT engine Unnamed Network 0"])
    log, engine = work / "small" / "build.log", work / "small" / "engine"
    argv = [str(SCALELLM), "build", *place, "--on", host]
    with subprocess.Popen(argv, env={**os.environ, **sleeping.environment}) as victim:
        try:
            _until(lambda: log.exists() and "Build TensorRT engine" in log.read_text(), 120)
        finally:
            victim.kill()
    _until(lambda: not _sleepers(sleeping.folder))
    assert workspace.read_stamp(engine) is None
    assert not list(work.glob("**/rank*.engine"))
    if host == "container":
        _until(lambda: sleeping.calls("docker")[-1]["argv"][:2] == ["rm", "--force"])

    done = scalellm("build", *place, **fake.environment)
    assert done.returncode == 0, done.stderr
    stamp = workspace.require(engine, "engine")
    assert {"config.json", "rank0.engine", "engine.json", "build.log", "tokenizer.json"} <= set(stamp.files)
    assert "TensorRT-LLM version: 1.2.1" in (engine / "build.log").read_text()


def test_build_explain_prints_the_very_command_that_the_build_runs(
    random_llama: Callable[..., Path], scalellm: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "small.yaml").write_text(RECIPE)
    place = ["--recipe", str(tmp_path / "small.yaml"), "--model", str(random_llama()), "--work", str(tmp_path / "work")]
    fake = gpu_machine(tmp_path / "bin", RTX4090, "1.2.1")
    told = scalellm("build", *place, "--explain", "--json", **fake.environment)
    (engine,) = [state for state in json.loads(told.stdout) if state["name"] == "engine"]
    shown = scalellm("build", *place, "--explain", **fake.environment).stdout
    assert scalellm("build", *place, **fake.environment).returncode == 0
    (ran,) = [json.loads(line)["argv"] for line in (fake.folder / "trtllm-build.jsonl").read_text().splitlines()]
    assert engine["commands"][0]["argv"] == ["trtllm-build", *ran]
    assert f"--output_dir {shlex.quote(ran[ran.index('--output_dir') + 1])}" in shown


def test_a_failed_scalellm_build_shows_the_cause_and_keeps_the_log_beside_the_artifacts(
    random_llama: Callable[..., Path], scalellm: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "small.yaml").write_text(RECIPE)
    place = ["--recipe", str(tmp_path / "small.yaml"), "--model", str(random_llama()), "--work", str(tmp_path / "work")]
    fake = Programs(tmp_path / "bin", "trtllm-build", "nvidia-smi")
    fake.behave(says=["[TRT] [E] Error Code 2: OutOfMemory (no further information)"], exit=1)
    done = scalellm("build", *place, **fake.environment)
    assert done.returncode == 4
    assert "Likely cause: the GPU's memory is full" in done.stderr
    assert "https://github.com/NVIDIA/TensorRT-LLM/issues/346" in done.stderr
    assert "Traceback" not in done.stderr
    folder = tmp_path / "work" / "small"
    assert "OutOfMemory" in (folder / "build-failed.log").read_text()
    assert not (folder / "engine").exists()
    assert not list(folder.glob("engine.partial-*"))
