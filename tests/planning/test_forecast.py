"""Promises about what a plan says of speed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from toolchain.device import device
from toolchain.engine import Limits
from toolchain.family import published
from toolchain.planning.forecast import DRAFTED, KIND, Band, Estimate, band, forecast, verdict
from toolchain.planning.latency import Deployment, interconnect
from toolchain.planning.plan import Plan, make_plan
from toolchain.quantization import KV, WEIGHTS
from toolchain.recipe import parse_recipe

_CONFIG = published("meta-llama/Llama-2-13b-chat-hf")
assert _CONFIG is not None
CONFIG = _CONFIG


def plan(text: str) -> Plan:
    return make_plan(parse_recipe(f"model: some/folder\n{text}", Path("mine.yaml")), CONFIG)


def on(name: str, weights: str = "none", kv: str = "fp16") -> Deployment:
    return Deployment(CONFIG, WEIGHTS[weights], KV[kv], device(name), interconnect=interconnect(device(name).name))


def test_a_plan_estimates_first_tokens_by_length_and_steps_by_batch() -> None:
    made = plan("device: h100\nquantization: {weights: fp8}\nkv_cache: {dtype: fp8}\nlimits: {max_batch_size: 8}")
    speed = made.latency
    assert speed is not None
    assert speed.kind == KIND
    assert [one.tokens for one in speed.ttft] == [512, 1024, 2048, 4096]
    assert [one.batch for one in speed.itl] == [1, 8]
    assert all(one.seconds >= one.floor_s > 0 for one in (*speed.ttft, *speed.itl))
    assert 0 < speed.tokens_per_s <= speed.ceiling_tokens_per_s
    assert speed.assumptions == ()


def test_prompts_beyond_max_input_len_are_not_estimated_and_max_input_len_is() -> None:
    made = plan("device: h100\nlimits: {max_seq_len: 3000, max_input_len: 1500, max_batch_size: 4}").latency
    assert made is not None
    assert [one.tokens for one in made.ttft] == [512, 1024, 1500]
    assert (made.prompt, made.output) == (1500, 1500)


def test_sequences_in_flight_are_what_the_cache_holds_at_full_length() -> None:
    made = plan("device: l4\nquantization: {weights: fp8}\nkv_cache: {dtype: fp8}\nlimits: {max_batch_size: 64}")
    assert made.latency is not None
    assert made.latency.sequences == made.memory.sequences_at_full_length < 64


def test_a_window_makes_long_contexts_cheaper_and_short_ones_not() -> None:
    whole, window = (replace(on("h100", "fp8", "fp8"), window=window) for window in (None, 1024))
    limits = Limits(8, 4096, 4096, 4096)
    long, short = (forecast(made, limits, 8) for made in (whole, window))
    assert short.ttft[-1].seconds < long.ttft[-1].seconds
    assert short.itl[-1].seconds < long.itl[-1].seconds
    assert (short.ttft[0], short.ttft[1]) == (long.ttft[0], long.ttft[1])


def test_a_draft_model_is_said_not_to_be_in_the_estimates() -> None:
    made, limits = on("h100", "fp8", "fp8"), Limits(8, 4096, 4096, 4096)
    assert forecast(made, limits, 8, drafted=True).assumptions == (DRAFTED,)
    assert forecast(made, limits, 8, drafted=True).itl == forecast(made, limits, 8).itl


def test_a_plan_for_a_cpu_has_no_estimate() -> None:
    made = plan("device: cpu\nquantization: {weights: int4}")
    assert made.latency is None
    assert made.to_json()["latency"] is None


def test_estimates_are_plain_json() -> None:
    made = plan("device: rtx4090\nquantization: {weights: fp8}\nkv_cache: {dtype: fp8}")
    speed = json.loads(json.dumps(made.to_json()))["latency"]
    assert speed["kind"] == "our estimate, not a measurement"
    assert speed["ttft"][0]["floor_s"] < speed["ttft"][0]["seconds"]
    assert speed["ttft_band"]["worst"] > 0


def test_estimates_do_not_enter_any_key() -> None:
    made = plan("device: rtx4090\nquantization: {weights: fp8}")
    assert all("latency" not in made.slice(stage) for stage in ("quantize", "build", "package"))


def test_what_published_tables_cover_has_their_errors_and_the_rest_has_an_assumed_one() -> None:
    covered = band(on("h100", "fp8", "fp8"), "ttft_ms")
    assert covered.typical is not None
    assert covered.typical < covered.worst
    assert band(on("h100"), "ttft_ms") == covered
    for made in (on("rtx4090", "fp8", "fp8"), on("a100", "int4"), on("l40s"), on("t4", "int4")):
        assert band(made, "ttft_ms").typical is None
        assert band(made, "ttft_ms").worst > covered.worst
    assert band(on("a100", "int4"), "itl_ms").typical is not None
    assert band(on("rtx4090", "int4"), "itl_ms").typical is None


def test_assumptions_name_what_no_measurement_stands_behind() -> None:
    limits = Limits(4, 2048, 1024, 2048)
    told = forecast(on("rtx4090", "int4"), limits, 4).assumptions
    assert len(told) == 3
    assert any("RTX 4090" in one for one in told)
    assert any("fp16 peak on Ada is taken as its fp8" in one for one in told)
    assert any("unpacking int4" in one for one in told)


@pytest.mark.parametrize("weights", ["none", "int4", "int8"])
def test_a_4k_prompt_within_a_second_is_unreachable_on_a_t4_whatever_its_weights(weights: str) -> None:
    made = on("t4", weights)
    first = forecast(made, Limits(1, 4096, 4095, 4096), 1).ttft[-1]
    assert verdict(first, 1.0, band(made, "ttft_ms")) == "unreachable"


@pytest.mark.parametrize(
    ("limit_s", "says"), [(0.4, "unreachable"), (0.6, "missed"), (0.8, "open"), (1.4, "open"), (1.5, "met")]
)
def test_verdict_weighs_the_estimate_its_error_and_its_floor(limit_s: float, says: str) -> None:
    assert verdict(Estimate(tokens=1024, batch=1, seconds=1.0, floor_s=0.5), limit_s, Band(0.5, None, "")) == says
