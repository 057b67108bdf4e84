"""`scalellm doctor --recipe`: what a machine has against what the plan needs, and what to do about it."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SCALELLM
from tests.machines import bare, docker, environment, nvidia_smi, program, ssh, trtllm_build
from toolchain.errors import RecipeError, ToolError
from toolchain.family import published
from toolchain.gpu import Gpu, GpuProcess
from toolchain.hosts.probe import SSH_OPTIONS, parse
from toolchain.planning import build_peaks
from toolchain.planning.plan import Plan, make_plan
from toolchain.quantizers import peaks as quantizer_peaks
from toolchain.recipe import available, load_recipe, parse_recipe
from toolchain.stages.doctor import Finding, Machine, Target, look, preflight, target_of
from toolchain.units import GIB, MIB

LOCAL, CONTAINER = Target("local"), Target("container")
PORTS = "serve: {http_port: 18000, grpc_port: 18001, metrics_port: 18002}\n"
FP8 = "device: rtx4090\nquantization: {weights: fp8}\nkv_cache: {dtype: fp8}\nlimits: {max_batch_size: 8}\n" + PORTS
ADA = Gpu(0, "NVIDIA GeForce RTX 4090", "GPU-1", 89, "590.44.01", 24564 * MIB, 24000 * MIB)
MACHINE = Machine(
    gpus=(ADA,),
    ram_total=64 * GIB,
    ram_free=60 * GIB,
    disk="/data",
    disk_free=200 * GIB,
    builder="/usr/local/bin/trtllm-build",
    tensorrt_llm="1.2.1",
    tools={"docker": ""},
    images=frozenset({"docker"}),
    gpu_toolkit=True,
    packages={"torch": "2", "transformers": "5"},
)


def plan_of(text: str = FP8) -> Plan:
    config = published("meta-llama/Llama-2-13b-chat-hf")
    assert config is not None
    return make_plan(parse_recipe(f"model: some/folder\n{text}", Path("mine.yaml")), config)


def found(machine: Machine, text: str = FP8, target: Target = LOCAL, **more: Any) -> dict[str, Finding]:
    plan = plan_of(text)
    peaks = (*quantizer_peaks.peaks(plan), *build_peaks.peaks(plan))
    here = more.pop("here", machine)
    return {one.name: one for one in preflight(plan, peaks, target, machine, here, **more)}


def test_a_machine_that_has_everything_fails_in_nothing_and_warns_of_nothing() -> None:
    assert {one.level for one in found(MACHINE).values()} == {"ok"}
    assert {"gpu", "vram 0", "driver", "ram trtllm-build", "disk", "tensorrt-llm", "ports"} <= set(found(MACHINE))


@pytest.mark.parametrize(
    ("gpu", "level", "text", "hint"),
    [
        (replace(ADA, name="Tesla T4", sm=75), "fail", "an engine for SM 89 runs on SM 89 only", "device: t4"),
        (replace(ADA, name="NVIDIA RTX 4000 Ada"), "warning", "SM 89 as the RTX 4090, but another card", "Measure"),
        (replace(ADA, name="NVIDIA GeForce RTX 4090 D"), "warning", "another card", "Measure"),
        (replace(ADA, sm=None), "fail", "SM unknown", "RTX 4090"),
    ],
)
def test_the_gpu_must_have_the_sm_of_the_plan(gpu: Gpu, level: str, text: str, hint: str) -> None:
    one = found(replace(MACHINE, gpus=(gpu,)))["gpu"]
    assert one.level == level
    assert text in one.text
    assert hint in one.hint


def test_no_gpu_and_too_few_of_them_fail() -> None:
    assert "--on ssh:HOST" in found(replace(MACHINE, gpus=()))["gpu"].hint
    two = found(MACHINE, FP8 + "parallel: {tp: 2}\n")["gpu"]
    assert (two.level, "takes 2 GPUs" in two.text) == ("fail", True)


def test_a_slice_of_the_right_card_is_a_warning() -> None:
    part = Gpu(0, "NVIDIA A100-SXM4-80GB MIG 3g.40gb", "MIG-1", 80, "590.44.01", 40 * GIB, 39 * GIB)
    text = "device: a100\nquantization: {weights: int4}\nlimits: {max_batch_size: 4}\n" + PORTS
    one = found(replace(MACHINE, gpus=(part,)), text)["gpu"]
    assert (one.level, "a slice has less memory" in one.text) == ("warning", True)


def test_a_full_gpu_fails_and_names_who_holds_its_memory() -> None:
    busy = replace(ADA, free_bytes=6 * GIB, processes=(GpuProcess(4711, "python", 17 * GIB),))
    one = found(replace(MACHINE, gpus=(busy,)))["vram 0"]
    assert one.level == "fail"
    assert "others hold pid 4711 (python, 17408 MiB)" in one.text
    assert "trtllm-build takes" in one.text
    assert one.hint == "Stop pid 4711 (python, 17408 MiB)"


def test_a_gpu_that_can_build_and_not_serve_is_a_warning() -> None:
    peak = next(one for one in build_peaks.peaks(plan_of()) if one.resource == "vram")
    one = found(replace(MACHINE, gpus=(replace(ADA, free_bytes=peak.bytes),)))["vram 0"]
    assert (one.level, "serving takes" in one.text) == ("warning", True)


def test_the_freest_gpus_are_the_ones_that_count() -> None:
    busy = replace(ADA, free_bytes=GIB)
    assert found(replace(MACHINE, gpus=(busy, replace(ADA, index=1))))["vram 1"].ok


@pytest.mark.parametrize(
    ("driver", "level"),
    [("590.44", "ok"), ("590.44.01", "ok"), ("600.1", "ok"), ("590.9", "fail"), ("575.57.08", "fail")],
)
def test_drivers_are_compared_as_numbers(driver: str, level: str) -> None:
    one = found(replace(MACHINE, gpus=(replace(ADA, driver=driver),)))["driver"]
    assert one.level == level
    assert "590.44 or newer" in one.text


def test_an_old_driver_is_a_warning_on_a_data_center_card() -> None:
    card = Gpu(0, "NVIDIA L4", "GPU-1", 89, "535.183.01", 23034 * MIB, 22500 * MIB)
    one = found(replace(MACHINE, gpus=(card,)), FP8.replace("rtx4090", "l4"))["driver"]
    assert one.level == "warning"
    assert "forward-compatibility" in one.hint


@pytest.mark.parametrize(
    ("total", "free", "level"), [(64, 60, "ok"), (64, 20, "warning"), (24, 22, "warning"), (8, 7, "fail")]
)
def test_memory_of_the_build_is_derived_so_that_some_less_is_a_warning(total: int, free: int, level: str) -> None:
    one = found(replace(MACHINE, ram_total=total * GIB, ram_free=free * GIB))["ram trtllm-build"]
    assert one.level == level
    assert "31.07 GiB" in one.text


def test_disk_counts_all_artifacts_less_what_is_there_already() -> None:
    little = replace(MACHINE, disk_free=30 * GIB)
    assert found(little)["disk"].level == "fail"
    assert found(little, present_bytes=12 * GIB)["disk"].ok


def test_behind_ssh_each_machine_is_held_against_its_own_part() -> None:
    laptop = Machine(packages=MACHINE.packages, ram_total=8 * GIB, ram_free=6 * GIB, disk="/home", disk_free=100 * GIB)
    told = found(replace(MACHINE, disk_free=20 * GIB), target=Target("ssh", "gpu-box"), here=laptop)
    assert told["gpu"].ok
    assert told["ram quantize"].ok
    assert told["ram trtllm-build"].ok
    assert told["disk"].ok
    assert told["disk gpu-box"].level == "fail"


@pytest.mark.parametrize(
    ("version", "level"),
    [("1.2.1", "ok"), ("1.2.1+cu130", "ok"), ("1.2.1.post1", "ok"), ("1.2.10", "fail"), ("0.21.0", "fail")],
)
def test_the_installed_release_must_be_the_one_of_the_plan(version: str, level: str) -> None:
    one = found(replace(MACHINE, tensorrt_llm=version))["tensorrt-llm"]
    assert one.level == level
    assert version in one.text


def test_without_a_builder_the_image_is_named() -> None:
    one = found(replace(MACHINE, builder=None))["tensorrt-llm"]
    assert one.level == "fail"
    assert "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3" in one.hint


def test_behind_ssh_a_container_of_the_image_takes_the_builders_place() -> None:
    nothing, there = replace(MACHINE, builder=None, tensorrt_llm=None), Target("ssh", "gpu-box")
    used = found(nothing, target=there)["tensorrt-llm"]
    assert used.ok
    assert "which is used instead" in used.text
    pull = found(replace(nothing, images=frozenset()), target=there)["tensorrt-llm"]
    assert (pull.level, pull.hint.startswith("ssh gpu-box docker pull nvcr.io/")) == ("fail", True)
    assert found(replace(nothing, tools={}), target=there)["tensorrt-llm"].level == "fail"
    assert found(nothing)["tensorrt-llm"].level == "fail"  # --on local starts no container
    assert found(nothing, "backend: tensorrt_llmapi\n" + FP8)["tensorrt-llm"].ok  # nothing is compiled, and serve does


def test_a_container_needs_a_tool_that_answers_an_image_and_no_builder() -> None:
    nothing = replace(MACHINE, builder=None, tensorrt_llm=None)
    assert {one.level for one in found(nothing, target=CONTAINER).values()} <= {"ok", "absent"}
    gone = found(replace(nothing, tools={}), target=CONTAINER)["container"]
    down = found(replace(nothing, tools={"docker": "permission denied"}), target=CONTAINER)["container"]
    pull = found(replace(nothing, images=frozenset()), target=CONTAINER)["image"]
    blind = found(replace(nothing, gpu_toolkit=False), target=CONTAINER)["gpus in containers"]
    assert [one.level for one in (gone, down, pull, blind)] == ["fail", "fail", "fail", "warning"]
    assert "permission denied" in down.text
    assert pull.hint == "docker pull nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"
    assert found(replace(MACHINE, tools={}))["container"].level == "absent"  # a local build needs none


def test_a_taken_port_is_told_with_its_owner(tmp_path: Path) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(1)
        port = listening.getsockname()[1]
        one = found(MACHINE, FP8.replace("18001", str(port)))["ports"]
    assert one.level == "fail"
    assert f"grpc port {port} is taken by pid {os.getpid()}" in one.text
    there = found(replace(MACHINE, listening=frozenset({18002})), target=Target("ssh", "gpu-box"))["ports"]
    assert there.text == "metrics port 18002 is taken (on gpu-box)"


def test_every_service_of_the_recipe_needs_ports_of_its_own() -> None:
    text = "device: a100\nquantization: {weights: int4}\nlimits: {max_batch_size: 2}\nservices: 2\n" + PORTS
    gpu = Gpu(0, "NVIDIA A100-SXM4-80GB", "GPU-1", 80, "590.44.01", 81920 * MIB, 81000 * MIB)
    machine = replace(MACHINE, gpus=(gpu,), listening=frozenset({18012}))
    assert "18010, 18011, 18012 are free" in found(machine, text)["ports"].text  # nobody listens here
    assert found(machine, text, Target("ssh", "gpu-box"))["ports"].text.startswith("metrics port 18012 is taken")


def test_a_freer_gpu_than_the_first_must_be_named_to_the_build() -> None:
    two = (replace(ADA, free_bytes=GIB), replace(ADA, index=1))
    assert found(replace(MACHINE, gpus=two))["gpu choice"].hint == "--on local:1"
    mixed = (replace(ADA, name="Tesla T4", sm=75), replace(ADA, index=1))
    assert found(replace(MACHINE, gpus=mixed), target=CONTAINER)["gpu choice"].hint == "--on container:1"
    assert "gpu choice" not in found(MACHINE)


def test_a_t4_is_warned_of_the_kernels_that_no_image_has() -> None:
    text = "device: t4\nquantization: {weights: int4}\nlimits: {max_seq_len: 512, max_batch_size: 1}\n" + PORTS
    one = found(MACHINE, text)["kernels"]
    assert (one.level, "75-real" in one.text) == ("warning", True)
    assert one.hint.startswith("scalellm commands --recipe mine")
    assert "kernels" not in found(MACHINE)


def test_the_packages_that_a_stage_imports_must_be_there() -> None:
    bare_python = found(replace(MACHINE, packages={}))
    assert bare_python["torch"].hint == "pip install 'scalellm-toolchain[quantize]'"
    cpu = "device: cpu\nquantization: {weights: int4}\nlimits: {max_seq_len: 512, max_batch_size: 1}\n" + PORTS
    assert {"openvino", "nvidia-pytriton"} <= set(found(MACHINE, cpu))
    assert "openvino" not in found(MACHINE)


def test_a_cpu_must_hold_what_it_serves() -> None:
    cpu = "device: cpu\nquantization: {weights: int4}\nlimits: {max_seq_len: 512, max_batch_size: 1}\n" + PORTS
    assert found(MACHINE, cpu)["ram serving"].ok
    assert found(replace(MACHINE, ram_total=4 * GIB, ram_free=3 * GIB), cpu)["ram serving"].level == "fail"


@pytest.mark.parametrize("name", sorted(available()))
def test_every_shipped_recipe_can_be_held_against_a_machine(name: str) -> None:
    config = published("meta-llama/Llama-2-13b-chat-hf")
    assert config is not None
    plan = make_plan(load_recipe(name), config)
    peaks = (*quantizer_peaks.peaks(plan), *build_peaks.peaks(plan))
    told = preflight(plan, peaks, LOCAL, Machine(), Machine())
    assert told[0].ok
    assert ("gpu" in {one.name for one in told}) == (not plan.device.is_cpu)
    assert all(one.text for one in told)
    assert all(one.hint for one in told if one.level == "fail")


@pytest.mark.parametrize(
    ("on", "target"),
    [
        ("local", LOCAL),
        ("local:0,1", LOCAL),
        ("container:podman,1", CONTAINER),
        ("ssh:me@gpu-box", Target("ssh", "me@gpu-box")),
        ("ssh:gpu-box/1", Target("ssh", "gpu-box")),
    ],
)
def test_on_names_a_place_as_build_does(on: str, target: Target) -> None:
    assert target_of(on) == target


@pytest.mark.parametrize("on", ["sky", "sky:aws", "ssh", "ssh:-oProxyCommand=x", "moon"])
def test_a_place_that_cannot_be_looked_at_is_refused(on: str) -> None:
    with pytest.raises(RecipeError, match="--on"):
        target_of(on)


class TestProbe:
    """The script, run by a real shell with fake programs on PATH."""

    @pytest.fixture
    def path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        folder = bare(tmp_path / "bin")
        monkeypatch.setitem(sys.modules, "pynvml", None)
        monkeypatch.setenv("PATH", str(folder))
        return folder

    def test_a_bare_machine_has_memory_and_disk_and_nothing_else(self, path: Path, tmp_path: Path) -> None:
        machine = look(LOCAL, tmp_path / "not" / "yet", plan_of().release)
        assert (machine.gpus, machine.builder, machine.tensorrt_llm, machine.tools) == ((), None, None, {})
        assert machine.disk == str(tmp_path)
        assert machine.disk_free is not None
        assert machine.ram_total is not None
        assert machine.ram_free is not None
        assert 0 < machine.ram_free <= machine.ram_total

    def test_a_gpu_machine_is_read_without_starting_or_importing_anything(self, path: Path, tmp_path: Path) -> None:
        release = plan_of().release
        assert release is not None
        nvidia_smi(path, "0, NVIDIA GeForce RTX 4090, GPU-1, 8.9, 590.44.01, 24564, 24000")
        trtllm_build(path, "1.2.1")
        docker(path, release.image)
        program(path, "nvidia-ctk", "exit 0")
        machine = look(LOCAL, tmp_path, release)
        assert machine.gpus == (ADA,)
        assert "torch" in machine.packages
        assert (machine.builder, machine.tensorrt_llm) == (str(path / "trtllm-build"), "1.2.1")
        assert machine.tools == {"docker": ""}
        assert machine.images == {"docker"}
        assert machine.gpu_toolkit

    def test_a_daemon_that_is_down_is_told_in_its_own_words(self, path: Path, tmp_path: Path) -> None:
        docker(path, refuses="Cannot connect to the Docker daemon")
        machine = look(LOCAL, tmp_path, plan_of().release)
        assert machine.tools == {"docker": "Cannot connect to the Docker daemon"}
        assert not machine.images

    def test_the_same_over_ssh_without_a_password(self, path: Path, tmp_path: Path) -> None:
        elsewhere = bare(tmp_path / "elsewhere")
        nvidia_smi(elsewhere, "0, Tesla T4, GPU-2, 1, 470.182.03, 15109, 15000", old=True)
        trtllm_build(elsewhere, "0.13.0")
        ssh(path, elsewhere, tmp_path / "ssh.log")
        machine = look(Target("ssh", "me@gpu-box"), tmp_path, plan_of().release)
        assert [(one.name, one.sm) for one in machine.gpus] == [("Tesla T4", 75)]
        assert machine.tensorrt_llm == "0.13.0"
        assert machine.disk == str(elsewhere)
        asked = (tmp_path / "ssh.log").read_text().splitlines()
        assert [word for word in asked if word != "-o"] == [*SSH_OPTIONS, "--", "me@gpu-box"]
        assert {"BatchMode=yes", "StrictHostKeyChecking=yes"} < set(asked)

    def test_an_ssh_that_does_not_get_in_says_what_must_work(self, path: Path, tmp_path: Path) -> None:
        program(path, "ssh", "echo 'Permission denied (publickey).' >&2; exit 255")
        with pytest.raises(ToolError, match="Permission denied") as caught:
            look(Target("ssh", "gpu-box"), tmp_path, None)
        assert caught.value.hint.startswith("ssh gpu-box true")

    def test_a_port_in_use_is_seen_in_proc(self, path: Path, tmp_path: Path) -> None:
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen(1)
            assert listening.getsockname()[1] in look(LOCAL, tmp_path, None).listening

    def test_the_memory_of_a_control_group_is_what_counts(self) -> None:
        text = (
            "@scalellm memory\nMemTotal: 1048576 kB\nMemAvailable: 524288 kB\n@scalellm limit\n268435456\n200000000\n"
        )
        machine = parse(text, ())
        assert (machine.ram_total, machine.ram_free) == (268435456, 68435456)
        assert parse(text.replace("268435456", "max"), ()).ram_total == GIB


class TestVerb:
    """`scalellm doctor --recipe` as a person types it."""

    @pytest.fixture
    def recipe(self, tmp_path: Path) -> Path:
        file = tmp_path / "mine.yaml"
        file.write_text("model: meta-llama/Llama-2-13b-chat-hf\n" + FP8)
        return file

    @pytest.fixture
    def doctor(self, recipe: Path, tmp_path: Path) -> Callable[..., Any]:
        import subprocess

        def run(*words: object, env: Mapping[str, str]) -> Any:
            argv = [str(SCALELLM), "doctor", "--recipe", recipe, "--work", tmp_path / "work", *words]
            return subprocess.run(
                list(map(str, argv)), env=env, capture_output=True, text=True, check=False, timeout=60
            )

        return run

    def test_a_fail_is_exit_code_1_and_says_what_to_do(self, doctor: Callable[..., Any], tmp_path: Path) -> None:
        done = doctor(env=environment(bare(tmp_path / "bin")))
        assert done.returncode == 1, done.stderr
        assert "no GPU, or no driver" in done.stdout
        assert "Traceback" not in done.stderr

    def test_a_machine_that_does_is_exit_code_0_and_each_line_is_json(
        self, doctor: Callable[..., Any], tmp_path: Path
    ) -> None:
        folder = bare(tmp_path / "bin")
        nvidia_smi(folder, "0, NVIDIA GeForce RTX 4090, GPU-1, 8.9, 590.44.01, 24564, 24000")
        trtllm_build(folder, "1.2.1")
        done = doctor("--json", env=environment(folder))
        told = {one["name"]: one for one in json.loads(done.stdout)}
        needs_room = {name for name, one in told.items() if one["level"] == "fail" and name.startswith(("ram", "disk"))}
        assert done.returncode == (1 if needs_room else 0), told  # of the machine that runs this test
        assert told["gpu"] == {
            "name": "gpu",
            "level": "ok",
            "text": "NVIDIA GeForce RTX 4090 (SM 89)",
            "hint": "",
            "ok": True,
        }
        assert told["tensorrt-llm"]["ok"]

    def test_a_place_that_is_not_rented_yet_is_refused(self, doctor: Callable[..., Any]) -> None:
        done = doctor("--on", "sky", env=dict(os.environ))
        assert done.returncode == 2
        assert "not rented yet" in done.stderr
