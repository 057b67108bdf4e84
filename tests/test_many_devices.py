"""Promises about one recipe built for several devices at once: what they share, and that one does not stop another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.gpu_machine import gpu_machine
from tests.hosts.fakes import L4

RECIPE = """\
name: many
model: unused/unused
device: rtx4090
quantization: {weights: auto, group_size: 64, method: rtn}
kv_cache: {dtype: auto}
calibration: {samples: 2, tokens: 32}
limits: {max_batch_size: 4, max_seq_len: 256}
"""
DEVICES = "rtx4090,l4,t4,a100-80gb"
SHARED = {"checkpoint-fp8-kv-fp8", "checkpoint-int4-g64-kv-int8"}

Run = Callable[..., CompletedProcess[str]]


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory, random_llama: Callable[..., Path], scalellm: Run
) -> tuple[Path, Run]:
    """``scalellm convert`` for four devices has run -> the work folder, and how to run more."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "many.yaml").write_text(RECIPE)

    def run(verb: str, *argv: str, **env: str) -> CompletedProcess[str]:
        model, work = random_llama(), folder / "work"
        return scalellm(verb, "--recipe", folder / "many.yaml", "--model", model, "--work", work, *argv, **env)

    done = run("convert", "--device", DEVICES, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    made = {device: one["artifacts"]["checkpoint"]["action"] for device, one in told.items()}
    assert made == {"rtx4090": "made", "l4": "kept", "t4": "made", "a100-80gb": "kept"}
    return folder / "work" / "many", run


def test_devices_of_the_same_formats_share_one_quantized_checkpoint(built: tuple[Path, Run]) -> None:
    work, _ = built
    assert {path.name for path in work.glob("checkpoint-*") if path.is_dir()} == SHARED
    configs = {
        device: json.loads((work / device / "trtllm-checkpoint" / "config.json").read_text())
        for device in DEVICES.split(",")
    }
    assert {device: config["quantization"]["quant_algo"] for device, config in configs.items()} == {
        "rtx4090": "FP8",
        "l4": "FP8",
        "t4": "W4A16_AWQ",
        "a100-80gb": "W4A16_AWQ",
    }


def test_an_engine_is_built_where_the_gpu_fits_and_the_others_say_what_they_lack(
    built: tuple[Path, Run], tmp_path: Path
) -> None:
    work, run = built
    machine = gpu_machine(tmp_path / "bin", L4, "1.2.1")
    done = run("build", "--device", "t4,l4", "--json", **machine.environment)
    assert done.returncode != 0
    assert "not made for t4" in done.stderr
    told = json.loads(done.stdout)
    assert "SM 75" in told["t4"]["error"]
    assert "NVIDIA L4 (SM 89)" in told["t4"]["error"]
    assert told["l4"]["artifacts"]["repository"]["action"] == "made"
    engine = work / "l4" / "engine"
    assert {"config.json", "rank0.engine", "tokenizer.json", "engine.json"} <= {file.name for file in engine.iterdir()}
    (one,) = [json.loads(line) for line in (machine.folder / "trtllm-build.jsonl").read_text().splitlines()]
    assert one["argv"][:2] == ["--checkpoint_dir", str(work / "l4" / "trtllm-checkpoint")]
    passport = json.loads((engine / "engine.json").read_text())
    assert (passport["device"], passport["sm"], passport["release"]) == ("l4", 89, "1.2.1")
    assert not (work / "t4" / "engine").exists()


def test_a_host_for_a_device_that_is_not_built_is_a_mistake(built: tuple[Path, Run]) -> None:
    done = built[1]("build", "--device", "l4", "--on", "t4=local")
    assert done.returncode == 2
    assert "--device does not name t4" in done.stderr
