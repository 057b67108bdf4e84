"""Promises about latency: floors by hand, directions that must hold, and the errors against published measurements."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain import workspace
from toolchain.device import device, devices
from toolchain.family import LlamaConfig, published
from toolchain.planning.latency import (
    Deployment,
    attention_flops,
    compute_format,
    decode,
    decode_floor_s,
    factors,
    in_flight_ceiling,
    in_flight_tokens_per_s,
    interconnect,
    prefill,
    prefill_floor_s,
    static_tokens_per_s,
    unpacks,
)
from toolchain.quantization import KV, WEIGHTS
from toolchain.release import order, releases

SCRIPTS = Path(__file__).parents[2] / "scripts"


def model(name: str) -> LlamaConfig:
    config = published(name)
    assert config is not None
    return config


LLAMA_13B = model("meta-llama/Llama-2-13b-hf")
LLAMA_70B = model("meta-llama/Llama-2-70b-hf")


def on(name: str, weights: str = "none", kv: str = "fp16", **changes: Any) -> Deployment:
    made = Deployment(LLAMA_13B, WEIGHTS[weights], KV[kv], device(name), interconnect=interconnect(device(name).name))
    return replace(made, **changes)


@pytest.mark.parametrize(
    ("name", "weights", "tokens", "milliseconds"),
    [
        # 2 x 12.69e9 x n + 40 x 2 x n^2 x 5120 over the dense peak of the data sheet, computed apart from this code
        ("a100", "none", 512, 42),
        ("a100", "none", 2048, 172),
        ("a100", "int4", 4096, 355),
        ("rtx4090", "fp8", 2048, 163),
        ("rtx4090", "none", 1024, 160),
        ("l4", "fp8", 1536, 165),
        ("t4", "none", 1024, 406),
        ("t4", "int4", 4096, 1705),
    ],
)
def test_floor_of_a_13b_prompt_is_its_flops_over_the_peak(
    name: str, weights: str, tokens: int, milliseconds: float
) -> None:
    assert prefill_floor_s(on(name, weights), tokens) * 1e3 == pytest.approx(milliseconds, rel=0.01)


def test_floor_of_one_token_is_the_bytes_over_the_bandwidth() -> None:
    weights = (12_687_769_600 + 32000 * 5120) * 2
    cache = 1000 * 819_200
    assert decode_floor_s(on("a100"), 1, 1000) == pytest.approx((weights + cache) / 2039e9)


def test_weights_of_four_bits_make_the_first_token_slower_and_the_next_ones_faster() -> None:
    for name in ("a100", "rtx4090", "t4", "l4"):
        assert prefill(on(name, "int4"), 2048).total_s > prefill(on(name), 2048).total_s
        assert decode(on(name, "int4"), 1, 1024).total_s < decode(on(name), 1, 1024).total_s


@pytest.mark.parametrize(
    ("weights", "computes_in", "unpacked"),
    [
        ("none", "fp16", False),
        ("int8", "fp16", True),
        ("int4", "fp16", True),
        ("fp8", "fp8", False),
        ("int8_sq", "int8", False),
        ("int4_fp8", "fp8", True),
    ],
)
def test_gemms_compute_in_the_format_of_the_inputs(weights: str, computes_in: str, unpacked: bool) -> None:
    assert compute_format(WEIGHTS[weights]) == computes_in
    assert unpacks(WEIGHTS[weights]) is unpacked


def test_unfused_attention_writes_scores_of_the_prompts_length_squared() -> None:
    fused, unfused = (on("t4", "int4", fused_attention=fused) for fused in (True, False))
    assert prefill(unfused, 512).total_s > prefill(fused, 512).total_s
    extra = [prefill(unfused, n).total_s - prefill(fused, n).total_s for n in (512, 1024)]
    assert extra[1] == pytest.approx(4 * extra[0])


def test_attention_in_a_window_counts_the_pairs_that_it_sees() -> None:
    tokens, window = 50, 8
    pairs = sum(min(place, window) for place in range(tokens))
    per_pair = 4 * LLAMA_13B.num_layers * LLAMA_13B.q_size
    assert attention_flops(LLAMA_13B, tokens, window) / per_pair == pytest.approx(pairs, abs=window)
    assert attention_flops(LLAMA_13B, tokens, 64) == attention_flops(LLAMA_13B, tokens) == per_pair * tokens**2 / 2


def test_more_gpus_by_tensor_parallelism_help_over_nvlink_and_pipelines_do_not_help_a_first_token() -> None:
    made = [on("h100", "fp8", "fp8", config=LLAMA_70B, tp=tp) for tp in (1, 2, 4, 8)]
    times = [prefill(one, 2048).total_s for one in made]
    assert times == sorted(times, reverse=True)
    assert times[0] / times[3] < 8
    assert prefill(on("h100", pp=2), 2048) == prefill(on("h100"), 2048)
    assert in_flight_tokens_per_s(on("h100", pp=2), 64, 512, 512) > in_flight_tokens_per_s(on("h100"), 64, 512, 512)


GPUS = [name for name, one in devices().items() if not one.is_cpu]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(GPUS),
    weights=st.sampled_from(["none", "int8", "int4"]),
    tokens=st.integers(1, 8192),
    batch=st.integers(1, 256),
)
def test_no_estimate_is_below_its_floor_and_more_work_never_takes_less(
    name: str, weights: str, tokens: int, batch: int
) -> None:
    made = on(name, weights)
    assert prefill(made, tokens).total_s >= prefill_floor_s(made, tokens)
    assert prefill(made, tokens + 1).total_s > prefill(made, tokens).total_s
    assert decode(made, batch, tokens).total_s >= decode_floor_s(made, batch, tokens)
    assert decode(made, batch + 1, tokens).total_s > decode(made, batch, tokens).total_s
    assert in_flight_tokens_per_s(made, batch, tokens, 64) <= in_flight_ceiling(made, batch, tokens, 64)
    assert in_flight_tokens_per_s(made, batch + 1, tokens, 64) > in_flight_tokens_per_s(made, batch, tokens, 64)


def test_a_run_of_whole_waves_is_as_fast_as_the_steady_state_and_a_wave_of_leftovers_costs() -> None:
    made = on("h100", "fp8", "fp8")
    steady = in_flight_tokens_per_s(made, 64, 512, 512)
    whole = in_flight_tokens_per_s(made, 64, 512, 512, requests=640)
    left_over = in_flight_tokens_per_s(made, 64, 512, 512, requests=641)
    assert whole == pytest.approx(steady)
    assert left_over < whole
    # the last wave is a batch of its own: fewer requests than places are no more than that many in flight
    assert in_flight_tokens_per_s(made, 64, 512, 512, requests=8) == pytest.approx(
        in_flight_tokens_per_s(made, 8, 512, 512)
    )


def test_a_static_batch_is_its_prefill_and_its_steps() -> None:
    made = on("a100")
    steps = 99 * decode(made, 8, 1000 + 50).total_s
    expected = 8 * 100 / (prefill(made, 1000, 8).total_s + steps)
    assert static_tokens_per_s(made, 8, 1000, 100) == pytest.approx(expected)


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_has_factors_for_every_format_that_its_weights_can_have(name: str) -> None:
    target = device(name)
    for weights in WEIGHTS.values():
        if weights.needs <= target.dtypes:
            assert prefill(on(name, weights.name), 128).total_s > 0
    assert decode(on(name, tp=2), 1, 128).link_s > 0


# Against what others measured.


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("fit_latency")
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def held_out(script: Any) -> Any:
    return [row for row in script.rows(script.VALIDATION) if row.table["engine"] == script.ENGINE]


def is_supported(row: Any) -> bool:
    """Whether the value is of a release that we plan for, by its number."""
    return order(row.table["release"]) >= min(map(order, releases()))


def errors(script: Any, rows: Any, *metrics: str) -> tuple[int, float, float]:
    """(number, median, worst) of some metrics."""
    found: tuple[int, float, float] = script.summary(
        script.error(row, factors()) for row in rows if row.metric in metrics
    )
    return found


def test_fitted_and_held_out_tables_are_parted_by_the_written_rule(script: Any) -> None:
    fitted = {(row.table["release"], row.table["model"]) for row in script.rows(script.FIT)}
    assert fitted == {
        ("0.9.0", "meta-llama/Llama-2-7b-hf"),
        ("0.9.0", "meta-llama/Llama-2-70b-hf"),
        ("0.17.0", "mistralai/Mistral-7B-v0.3"),
    }
    held_out = {(row.table["release"], row.table["model"]) for row in script.rows(script.VALIDATION)}
    assert not fitted & held_out


def test_every_published_value_has_its_source_and_date(script: Any) -> None:
    for row in script.rows(script.FIT) + script.rows(script.VALIDATION):
        assert row.table["source"]
        assert row.table["date"]
        assert row.measured > 0


def test_a_prediction_of_ttft_and_itl_is_within_15_percent_mostly_and_35_at_worst(script: Any, held_out: Any) -> None:
    for metric, least in (("ttft_ms", 40), ("itl_ms", 6)):
        count, median, worst = errors(script, held_out, metric)
        assert count >= least
        assert median <= 0.15
        assert worst <= 0.35


def test_throughput_in_flight_is_within_15_percent_mostly_and_35_at_worst(script: Any, held_out: Any) -> None:
    count, median, worst = errors(script, held_out, "in_flight_tokens_per_s")
    assert count >= 180
    assert median <= 0.15
    assert worst <= 0.35


def test_every_held_out_value_of_a_release_that_we_support_is_within_35_percent(script: Any, held_out: Any) -> None:
    supported = [row for row in held_out if is_supported(row)]
    assert len(supported) > 190
    assert max(script.error(row, factors()) for row in supported) <= 0.35


def test_static_batches_miss_only_where_kv_heads_were_not_shared(script: Any, held_out: Any) -> None:
    # Static batches are of releases that we do not support. What is reached is held so that it gets no worse: before
    # 0.10 attention of models with fewer KV heads read the cache as if they had them all, except where a flag was set
    # (TensorRT-LLM docs/source/performance.md of 0.8: TRTLLM_ENABLE_XQA), and no fitted row shows that kernel.
    static = [row for row in held_out if row.metric == "static_tokens_per_s"]
    assert not [row for row in static if is_supported(row)]
    _, median, worst = errors(script, static, "static_tokens_per_s")
    assert median <= 0.15
    assert worst <= 0.92
    missed = [row.deployment.config for row in static if script.error(row, factors()) > 0.35]
    assert all(config.num_kv_heads < config.num_heads for config in missed)


def test_limits_of_a_benchmarked_engine_are_those_that_trtllm_bench_computes(script: Any) -> None:
    # By hand from tensorrt_llm/bench/build/tuning.py @04cba882. Llama-3.1-70B in FP8 on an H100: 95 % of 85.5 GB less
    # 70.6 GB hold 39 sequences of 2176 tokens at 160 KiB: least batch, least tokens. Llama-3.1-8B on an H200: 8081 of
    # 256 tokens at 64 KiB: most batch, and twice as many tokens in a step.
    made = on("h100", "fp8", "fp8", config=model("meta-llama/Llama-3.1-70B"))
    limits = script.bench_limits(made, 128, 2048)
    assert (limits.max_batch_size, limits.max_num_tokens, limits.max_seq_len) == (64, 2048, 2176)
    made = on("h200", "fp8", "fp8", config=model("meta-llama/Llama-3.1-8B"))
    limits = script.bench_limits(made, 128, 128)
    assert (limits.max_batch_size, limits.max_num_tokens) == (4096, 8192)


def test_the_errors_that_a_plan_states_are_those_of_the_held_out_tables(script: Any, held_out: Any) -> None:
    for metric, stated in workspace.facts("latency")["errors"].items():
        count, median, worst = errors(script, held_out, metric)
        assert stated["rows"] == count
        assert stated["median"] == pytest.approx(median, abs=5e-4)
        assert stated["worst"] == pytest.approx(worst, abs=5e-4)


def test_what_confirms_an_assumed_factor_is_among_the_held_out_values(script: Any, held_out: Any) -> None:
    rows = [row for row in held_out if row.table["release"] == "0.14.0"]
    assert {(row.deployment.device.arch, row.deployment.weights.name) for row in rows} == {("Hopper", "none")}
    count, _, worst = errors(script, rows, "ttft_ms", "itl_ms")
    assert (count, worst <= 0.10) == (8, True)
    assert ("Hopper", "fp16") not in factors().assumed
    assert ("Hopper", "int8") in factors().assumed


def test_other_engines_on_consumer_cards_are_within_the_error_that_is_assumed_there(script: Any) -> None:
    rows = [row for row in script.rows(script.VALIDATION) if row.table["gpu"] in ("rtx4090", "rtx3090")]
    assert len(rows) > 20
    assert errors(script, rows, "ttft_ms", "itl_ms")[2] <= workspace.facts("latency")["unmeasured"]["worst"]


def test_the_factors_are_what_fitting_gives(script: Any) -> None:
    found, spread = script.fit(script.rows(script.FIT))
    for (name, value), stated in zip(script.values(found).items(), script.values(factors()).values(), strict=True):
        assert stated == pytest.approx(value, rel=5e-3), name
    at_bound = {name for name, one in zip(script.values(found), spread, strict=True) if math.isnan(one)}
    assert at_bound == {"memory Ampere", "memory Hopper", "memory Turing"}


def test_a_fit_finds_the_factors_that_made_the_measurements(script: Any) -> None:
    known = replace(factors(), prefill_layer_s=50e-6, dequantization=1.3)
    made = [replace(row, measured=row.predict(known)) for row in script.rows(script.FIT)]
    found, _ = script.fit(made)
    assert found.prefill_layer_s == pytest.approx(50e-6, rel=0.02)
    assert found.dequantization == pytest.approx(1.3, rel=0.02)
