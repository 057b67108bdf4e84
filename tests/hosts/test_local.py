"""trtllm-build on PATH: what is asked of the machine before it runs, what it is told, what is left when it fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hosts.fakes import A100, L4, RTX4090, Programs, make_job
from toolchain import hosts
from toolchain.errors import ToolError
from toolchain.hosts import probe
from toolchain.progress import Silent

Install = Callable[..., Programs]


class Watcher(Silent):
    """A progress that remembers."""

    def __init__(self) -> None:
        self.total = self.done = 0
        self.texts: list[str] = []

    def task(self, label: str, total: int, unit: str) -> Watcher:
        self.total = total
        return self

    def advance(self, amount: int) -> None:
        self.done += amount

    def describe(self, text: str) -> None:
        self.texts.append(text)

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_a_build_leaves_the_engine_and_runs_exactly_the_command_that_is_printed(
    programs: Install, tmp_path: Path
) -> None:
    fake, job = programs("trtllm-build", "nvidia-smi"), make_job(tmp_path / "work")
    host = hosts.load("local")
    assert host.lacks(job) == ()
    (printed,) = host.commands(job)
    fake.behave(
        says=["[TRT-LLM] [I] Build TensorRT engine Unnamed Network 0", "[TRT] [I] Engine generation completed in 1"]
    )
    watcher = Watcher()
    host.build(job, tmp_path / "work" / "build.log", watcher)
    (call,) = fake.calls("trtllm-build")
    assert ("trtllm-build", *call["argv"]) == printed.argv
    assert sorted(file.name for file in job.out.iterdir()) == ["config.json", "rank0.engine"]
    assert json.loads((job.out / "config.json").read_text())["pretrained_config"]["architecture"] == "LlamaForCausalLM"
    assert "Engine generation completed" in (tmp_path / "work" / "build.log").read_text()
    assert watcher.texts == ["TensorRT compiles", "compiled"]
    assert watcher.done == watcher.total == 3


def test_the_timing_cache_stays_out_of_the_users_folder_and_of_the_engine(
    programs: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, job = programs("trtllm-build", "nvidia-smi"), make_job(tmp_path / "work")
    monkeypatch.chdir(tmp_path)
    hosts.load("local").build(job, tmp_path / "build.log", Silent())
    (call,) = fake.calls("trtllm-build")
    assert not Path(call["cwd"]).exists()
    assert not list(tmp_path.rglob("model.cache"))


@pytest.mark.parametrize("version", ["1.2.1", "1.2.1.post1", "1.2.1+cu131"])
def test_the_version_is_that_of_the_python_beside_the_builder(programs: Install, tmp_path: Path, version: str) -> None:
    programs("trtllm-build", "nvidia-smi", version=version)
    assert hosts.load("local").lacks(make_job(tmp_path / "work")) == ()


@pytest.mark.parametrize("version", ["1.2.0", "1.2.1rc1", "0.21.0"])
def test_another_release_of_the_builder_is_refused(programs: Install, tmp_path: Path, version: str) -> None:
    fake = programs("trtllm-build", "nvidia-smi", version=version)
    builder = fake.folder / "trtllm-build"
    found = hosts.load("local").lacks(make_job(tmp_path / "work"))
    assert found == (f"trtllm-build of TensorRT-LLM 1.2.1: {builder} is of {version}",)


def test_a_machine_without_anything_lacks_the_gpu_and_the_builder(programs: Install, tmp_path: Path) -> None:
    programs()
    gpu, builder = hosts.load("local").lacks(make_job(tmp_path / "work"))
    assert gpu.startswith("1 GPU of SM 89, such as the RTX 4090: it shows no GPU (nvidia-smi: ")
    assert builder == "trtllm-build of TensorRT-LLM 1.2.1: it is not on PATH"


def test_the_gpu_has_to_be_of_the_plans_kind(programs: Install, tmp_path: Path) -> None:
    programs("trtllm-build", "nvidia-smi", gpus=(A100,))
    (gpu,) = hosts.load("local").lacks(make_job(tmp_path / "work"))
    assert gpu == "1 GPU of SM 89, such as the RTX 4090: it has 0: NVIDIA A100-SXM4-80GB (SM 80)"


def test_a_driver_that_does_not_answer_is_quoted(programs: Install, tmp_path: Path) -> None:
    words = "Failed to initialize NVML: Driver/library version mismatch"
    programs("trtllm-build", "nvidia-smi", gpus=(words,))
    (gpu,) = hosts.load("local").lacks(make_job(tmp_path / "work"))
    assert words in gpu


def test_two_ranks_need_two_gpus(programs: Install, tmp_path: Path) -> None:
    fake, job = programs("trtllm-build", "nvidia-smi"), make_job(tmp_path / "work", gpus=2)
    (gpu,) = hosts.load("local").lacks(job)
    assert gpu.startswith("2 GPUs of SM 89")
    fake.behave(gpus=[RTX4090, L4])
    assert hosts.load("local").lacks(job) == ()
    hosts.load("local").build(job, tmp_path / "build.log", Silent())
    assert (job.out / "rank1.engine").is_file()


def test_where_there_are_several_kinds_the_user_names_the_gpu(
    programs: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, job = (
        programs("trtllm-build", "nvidia-smi", gpus=(A100, RTX4090.replace("0,", "1,", 1))),
        make_job(tmp_path / "w"),
    )
    (gpu,) = hosts.load("local").lacks(job)
    assert gpu.endswith("Name them: --on local:1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert hosts.load("local").lacks(job) == ()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    host = hosts.load("local:1")
    assert host.lacks(job) == ()
    host.build(job, tmp_path / "build.log", Silent())
    (call,) = fake.calls("trtllm-build")
    assert (call["env"]["CUDA_VISIBLE_DEVICES"], call["env"]["CUDA_DEVICE_ORDER"]) == ("1", "PCI_BUS_ID")
    assert host.commands(job)[0].argv[:3] == ("env", "CUDA_DEVICE_ORDER=PCI_BUS_ID", "CUDA_VISIBLE_DEVICES=1")


def test_a_geforce_with_an_old_driver_is_refused_and_a_data_center_card_is_not(
    programs: Install, tmp_path: Path
) -> None:
    programs("trtllm-build", "nvidia-smi", gpus=(RTX4090.replace("595.10.02", "570.124.06"),))
    job = make_job(tmp_path / "work")
    assert hosts.load("local").lacks(job) == (
        "NVIDIA driver 590.44 or newer, for TensorRT-LLM 1.2.1: it has 570.124.06",
    )


def test_a_data_center_card_may_have_an_older_driver(programs: Install, tmp_path: Path) -> None:
    programs("trtllm-build", "nvidia-smi", gpus=(A100,))
    assert hosts.load("local").lacks(make_job(tmp_path / "work", kind="a100-80gb")) == ()


@pytest.mark.parametrize("spoken", ["nowhere", "local:x", "local:1,", "container:docker,podman", "container:a"])
def test_a_host_that_is_none_is_refused(spoken: str) -> None:
    with pytest.raises(ToolError, match="--on"):
        hosts.load(spoken)


def test_a_failed_build_says_its_last_words_the_likely_cause_and_keeps_its_log(
    programs: Install, tmp_path: Path
) -> None:
    fake, job = programs("trtllm-build", "nvidia-smi"), make_job(tmp_path / "work")
    seen = "trtllm-build: error: unrecognized arguments: --max_output_len 5"
    fake.behave(says=[*(f"line {number}" for number in range(50)), seen], exit=2)
    log = tmp_path / "work" / "build.log"
    with pytest.raises(ToolError) as caught:
        hosts.load("local").build(job, log, Silent())
    message, hint = caught.value.message, caught.value.hint
    assert "trtllm-build ended with exit code 2" in message
    assert seen in message
    assert "line 49" in message
    assert "line 20" not in message
    assert "Likely cause: this trtllm-build does not know the flag --max_output_len 5" in message
    assert "--on container" in hint
    assert str(tmp_path / "work" / "build-failed.log") in hint
    assert "line 0" in (tmp_path / "work" / "build-failed.log").read_text()
    assert not log.exists()

    fake.behave(says=["all is well"], exit=0)
    hosts.load("local").build(job, log, Silent())
    assert log.read_text() == "all is well\n"


def test_a_machine_that_hangs_is_named_without_the_script_that_asked_it(
    programs: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = programs("trtllm-build", "nvidia-smi")
    (fake.folder / "nvidia-smi").write_text("#!/bin/sh\nsleep 60\n")
    monkeypatch.setattr(probe, "_TIMEOUT_S", 0.5)
    with pytest.raises(ToolError, match=r"this machine does not say what it has within 0\.5 s") as caught:
        hosts.load("local").lacks(make_job(tmp_path / "work"))
    assert "say()" not in caught.value.message
    assert "nvidia-smi" in caught.value.hint
