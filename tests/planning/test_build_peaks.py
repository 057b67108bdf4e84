"""Promises about what making an engine takes: sizes of files that are really written, and the published warnings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.backends import conftest as trtllm
from tests.backends.trtllm_folders import Folders
from toolchain.backends import tensorrt_llm
from toolchain.checkpoint import Checkpoint
from toolchain.family import LlamaConfig, published, read_config
from toolchain.planning.build_peaks import Peak, converted_bytes, peaks
from toolchain.planning.plan import Plan, make_plan
from toolchain.quantizers.peaks import peaks as of_quantize
from toolchain.recipe import available, load_recipe, parse_recipe
from toolchain.units import GIB


def plan_of(text: str, config: LlamaConfig | None = None) -> Plan:
    config = config or published("meta-llama/Llama-2-13b-chat-hf")
    assert config is not None
    return make_plan(parse_recipe(f"model: some/folder\n{text}", Path("mine.yaml")), config)


def shipped(name: str) -> Plan:
    config = published("meta-llama/Llama-2-13b-chat-hf")
    assert config is not None
    return make_plan(load_recipe(name), config)


def of(found: tuple[Peak, ...], stage: str, resource: str) -> Peak:
    (one,) = (peak for peak in found if (peak.stage, peak.resource) == (stage, resource))
    return one


quantized = trtllm.unified  # the fixture
WORDS = {
    "none": "{weights: none}",
    "fp8": "{weights: fp8}",
    "int4": "{weights: int4, group_size: 64}",
    "awq": "{weights: int4, group_size: 64, method: awq}",
    "int8": "{weights: int8}",
    "int8-sq": "{weights: int8_sq}",
}


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("way", WORDS)
def test_the_converted_checkpoint_is_as_large_as_its_files(
    quantized: Folders, tmp_path: Path, way: str, tp: int, pp: int
) -> None:
    folder = quantized("gqa", way)  # two kv heads: 4 ranks have copies of them
    tensorrt_llm.write(Checkpoint.open(folder), tmp_path, tp=tp, pp=pp)
    written = sum(file.stat().st_size for file in tmp_path.glob("rank*"))
    config = read_config(json.loads((folder / "config.json").read_text()), "config.json")
    text = f"device: h100\nquantization: {WORDS[way]}\nparallel: {{tp: {tp}, pp: {pp}}}\nlimits: {{max_seq_len: 512}}"
    headers = 10_000 * tp * pp
    assert 0 <= written - converted_bytes(plan_of(text, config)) <= headers


def test_the_builder_wants_two_and_a_half_checkpoints_of_memory() -> None:
    plan = shipped("rtx4090")
    ram = of(peaks(plan), "trtllm-build", "ram")
    assert ram.bytes == int(2.5 * converted_bytes(plan))
    assert ram.bytes / GIB == pytest.approx(31.1, abs=0.1)
    assert "743" in ram.source


def test_int8_weights_are_built_from_16_bits_and_take_as_much_as_them() -> None:
    int8, none = (plan_of(f"device: a100\nquantization: {{weights: {name}}}") for name in ("int8", "none"))
    assert converted_bytes(int8) == converted_bytes(none) == pytest.approx(26.03e9, rel=0.001)
    assert of(peaks(int8), "trtllm-build", "ram").bytes > 60 * GIB
    assert of(peaks(int8), "trtllm-build", "vram").bytes < of(peaks(none), "trtllm-build", "vram").bytes / 1.5


def test_a_fp16_13b_cannot_be_built_on_a_24_gb_card() -> None:
    # TensorRT-LLM issue 346: the build of Llama-2-13B asks for 24.8 GB at once
    vram = of(peaks(plan_of("device: a100\nlimits: {max_batch_size: 1}")), "trtllm-build", "vram")
    assert vram.bytes > 24_564 * 2**20


def test_a_t4_counts_its_attention_workspace_while_building() -> None:
    long, short = (
        of(
            peaks(plan_of(f"device: t4\nquantization: {{weights: int4}}\nlimits: {{max_batch_size: 2, {limits}}}")),
            "trtllm-build",
            "vram",
        )
        for limits in ("max_seq_len: 2048, max_num_tokens: 2048", "max_input_len: 1024, max_num_tokens: 2048")
    )
    assert long.bytes - short.bytes == 2 * 40 * (2048**2 - 1024**2) * 6
    assert "S^2" in long.how


def test_services_share_one_engine_which_is_built_once() -> None:
    one, three = shipped("a100"), shipped("a100-x3")
    assert of(peaks(three), "trtllm-build", "disk").bytes == of(peaks(one), "trtllm-build", "disk").bytes
    assert of(peaks(three), "trtllm-build", "vram").bytes <= of(peaks(one), "trtllm-build", "vram").bytes


@pytest.mark.parametrize("name", sorted(available()))
def test_every_shipped_recipe_says_what_each_of_its_stages_takes(name: str) -> None:
    plan = shipped(name)
    found = (*of_quantize(plan), *peaks(plan))
    stages = {peak.stage for peak in found}
    wanted = {"quantize", "convert", "trtllm-build"} if plan.backend == "tensorrt_engine" else {"quantize"}
    assert stages == wanted
    assert all(peak.bytes > 0 and peak.how and peak.source for peak in found)
    assert of(found, "quantize", "ram").bytes < 3 * GIB  # a 13B is quantized on a laptop


def test_nothing_is_quantized_where_weights_and_cache_stay_as_they_are() -> None:
    plan = plan_of("device: a100")
    assert of_quantize(plan) == ()
    assert {peak.resource for peak in peaks(plan) if peak.stage == "quantize"} == {"disk"}


def test_a_calibrated_quantize_takes_more_than_one_that_is_not() -> None:
    text = "device: cpu\nquantization: {{weights: int4, method: {}}}"
    rtn, awq = (of_quantize(plan_of(text.format(method))) for method in ("rtn", "awq"))
    assert of(awq, "quantize", "ram").bytes > of(rtn, "quantize", "ram").bytes


def test_plan_prints_what_making_it_takes_and_has_it_in_its_json(scalellm: Any, tmp_path: Path) -> None:
    told = scalellm("plan", "--recipe", "t4", "--work", tmp_path)
    assert "trtllm-build" in told.stdout, told.stderr
    assert "17.23 GiB" in told.stdout
    found = json.loads(scalellm("plan", "--recipe", "t4", "--work", tmp_path, "--json").stdout)["build_peaks"]
    assert {(one["stage"], one["resource"]) for one in found} >= {("trtllm-build", "vram"), ("convert", "disk")}
