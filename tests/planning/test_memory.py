"""Promises about memory: the published figures of Llama-2-13B, and properties that no figure can show."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.backends.openvino.runtime import kv_bytes_per_token as openvino_kv_bytes_per_token
from toolchain.device import device
from toolchain.engine import Limits
from toolchain.family import ATTENTION_IN, LlamaConfig, expected_tensors, published
from toolchain.planning.memory import (
    WEIGHT_LINES,
    MemoryPlan,
    activation_bytes,
    attention_parameters,
    kv_bytes_per_token,
    linear_parameters,
    memory_plan,
    mlp_parameters,
    parameters,
    scale_bytes,
    unfused_attention_bytes,
    weight_bytes,
)
from toolchain.quantization import KV, WEIGHTS
from toolchain.quantizers.layout import Scheme, units
from toolchain.units import GIB, MIB


def _llama_13b() -> LlamaConfig:
    config = published("meta-llama/Llama-2-13b-chat-hf")
    assert config is not None
    return config


LLAMA_13B = _llama_13b()
SMALL = replace(
    LLAMA_13B,
    hidden_size=256,
    intermediate_size=512,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=1000,
    tied_embeddings=True,
)
QWEN2 = replace(SMALL, architecture="Qwen2ForCausalLM", vocab_size=323, biased=ATTENTION_IN)
LIMITS = Limits(max_batch_size=16, max_seq_len=4096, max_input_len=4096, max_num_tokens=4096)


def test_llama_13b_has_the_published_number_of_parameters() -> None:
    assert parameters(LLAMA_13B) == 13_015_864_320
    assert linear_parameters(LLAMA_13B) == 12_687_769_600


@pytest.mark.parametrize("config", [LLAMA_13B, SMALL, QWEN2], ids=["13B", "small, tied, GQA", "Qwen2"])
def test_parameters_are_the_sum_of_the_tensors(config: LlamaConfig) -> None:
    total = 0
    for shape in expected_tensors(config).values():
        count = 1
        for size in shape:
            count *= size
        total += count
    assert parameters(config) == total


def test_biases_are_counted_in_the_models_dtype_whatever_the_weights_are() -> None:
    plain = replace(QWEN2, biased=())
    biases = 3 * (256 + 2 * 128)
    assert parameters(QWEN2) - parameters(plain) == biases
    for name in WEIGHTS:
        assert weight_bytes(QWEN2, WEIGHTS[name]) - weight_bytes(plain, WEIGHTS[name]) == biases * 2
    lines = {line.name: line for line in memory_plan(QWEN2, WEIGHTS["int4"], KV["int8"], LIMITS, device("l4")).lines}
    assert lines["norms and biases"].bytes == (256 * 7 + biases) * 2


@pytest.mark.parametrize(
    ("weights", "gigabytes"),
    [("none", 26.03), ("fp8", 13.34), ("int4", 7.20), ("int4_fp8", 7.20)],
)
def test_engine_weights_of_llama_13b_take_the_published_bytes(weights: str, gigabytes: float) -> None:
    assert weight_bytes(LLAMA_13B, WEIGHTS[weights], bytes_per_scale=2) / 1e9 == pytest.approx(gigabytes, abs=0.005)


def test_our_checkpoint_has_fp32_scales_and_is_larger_than_the_engine_by_them() -> None:
    engine = weight_bytes(LLAMA_13B, WEIGHTS["int4"], bytes_per_scale=2)
    groups = 12_687_769_600 // 128
    assert weight_bytes(LLAMA_13B, WEIGHTS["int4"], bytes_per_scale=4) - engine == groups * 2
    assert scale_bytes(LLAMA_13B, WEIGHTS["fp8"], 128, bytes_per_scale=2) == 280 * 4
    assert scale_bytes(LLAMA_13B, WEIGHTS["int4"], 64, bytes_per_scale=4) == groups * 2 * 4
    assert scale_bytes(LLAMA_13B, WEIGHTS["int4_fp8"], 128, bytes_per_scale=4) == (groups + 280) * 4
    rows = 40 * (3 * 5120 + 5120 + 2 * 13824 + 5120)
    assert scale_bytes(LLAMA_13B, WEIGHTS["int8"], 128, bytes_per_scale=2) == rows * 4
    assert scale_bytes(LLAMA_13B, WEIGHTS["int8_sq"], 128, bytes_per_scale=4) == rows * 4
    fp8, int8 = (weight_bytes(LLAMA_13B, WEIGHTS[name]) for name in ("fp8", "int8"))
    assert int8 - fp8 == (rows - 280) * 4


@pytest.mark.parametrize("weights", ["fp8", "int4", "int8"])
def test_weights_of_llama_13b_are_the_sum_of_the_tensors_that_its_checkpoint_gets(weights: str) -> None:
    scheme = Scheme(weights, 128, "mse", "fp16")
    tensors = (tensor for unit in units(LLAMA_13B, lambda _name: "F16", scheme) for tensor in unit.tensors)
    assert weight_bytes(LLAMA_13B, WEIGHTS[weights]) == sum(tensor.nbytes for tensor in tensors)


def test_attention_and_mlp_are_lines_of_their_own() -> None:
    lines = {line.name: line.bytes for line in _plan("none", "fp16", "a100-80gb").lines}
    assert lines["attention weights"] == attention_parameters(LLAMA_13B) * 2 == 40 * 4 * 5120**2 * 2
    assert lines["MLP weights"] == mlp_parameters(LLAMA_13B) * 2 == 40 * 3 * 5120 * 13824 * 2
    assert lines["embedding"] == lines["head"] == 32000 * 5120 * 2
    tied = memory_plan(SMALL, WEIGHTS["none"], KV["fp16"], LIMITS, device("l4"))
    assert "head" not in {line.name for line in tied.lines}
    split = {line.name: line.bytes for line in _plan("none", "fp16", "a100-80gb", tp=2, pp=2).lines}
    assert split["embedding or head"] == 32000 * 5120 * 2
    assert split["attention weights"] + split["MLP weights"] == linear_parameters(LLAMA_13B) * 2 // 4


def test_the_weight_lines_are_the_bytes_of_the_weights() -> None:
    for weights in ("none", "fp8", "int4", "int8"):
        lines = _plan(weights, "fp16", "h200").lines
        held = sum(line.bytes for line in lines if line.name in WEIGHT_LINES)
        assert held == weight_bytes(LLAMA_13B, WEIGHTS[weights], bytes_per_scale=2)


def test_a_reserve_is_taken_once_from_the_device_and_leaves_less_for_the_cache() -> None:
    limits = Limits(32, 4096, 4096, 4096)
    free, kept = (_plan("fp8", "fp8", "rtx4090", limits, reserve_bytes=size) for size in (0, GIB))
    assert next(line for line in kept.lines if line.name == "reserve").bytes == GIB
    assert 0 < free.max_kv_tokens - kept.max_kv_tokens <= GIB // 409_600
    assert kept.fits
    three = _plan("int4", "int8", "a100-80gb", services=3, reserve_bytes=GIB)
    assert next(line for line in three.lines if line.name == "reserve").bytes == GIB
    assert three.free_bytes == 81920 * MIB - three.total > 0


def test_kv_is_told_per_token_and_per_sequence() -> None:
    made = _plan("fp8", "fp8", "rtx4090")
    assert made.kv_bytes_per_sequence == 4096 * made.kv_bytes_per_token == 4096 * 409_600
    how = next(line.how for line in made.lines if line.name == "KV cache")
    assert "409600 B" in how
    assert "a sequence of 4096 takes 1.56 GiB" in how


def test_kv_of_llama_13b_takes_the_published_bytes_per_token() -> None:
    assert kv_bytes_per_token(LLAMA_13B, KV["fp16"]) == 819_200
    assert kv_bytes_per_token(LLAMA_13B, KV["int8"]) == kv_bytes_per_token(LLAMA_13B, KV["fp8"]) == 409_600
    assert kv_bytes_per_token(LLAMA_13B, KV["fp16"]) * 4096 / GIB == pytest.approx(3.13, abs=0.01)


def test_kv_follows_the_kv_heads_and_the_split() -> None:
    assert kv_bytes_per_token(SMALL, KV["fp16"]) == 3 * 2 * 2 * 64 * 2
    assert kv_bytes_per_token(SMALL, KV["fp16"], tp=2) == 3 * 2 * 1 * 64 * 2
    assert kv_bytes_per_token(SMALL, KV["fp16"], tp=4) == 3 * 2 * 1 * 64 * 2  # fewer kv heads than ranks: replicated
    assert kv_bytes_per_token(LLAMA_13B, KV["int8"], pp=4) == 409_600 // 4


@pytest.mark.parametrize("config", [LLAMA_13B, SMALL], ids=["13B", "small"])
@pytest.mark.parametrize("kv", ["fp16", "fp32", "int8"])
def test_cache_of_a_cpu_is_counted_as_openvino_reports_it(config: LlamaConfig, kv: str) -> None:
    # the backend's own figure equals PipelineMetrics.cache_size_in_bytes of OpenVINO GenAI, see its own tests
    shapes = {"num_layers": config.num_layers, "num_kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
    assert kv_bytes_per_token(config, KV[kv], cpu=True) == openvino_kv_bytes_per_token(kv=kv, **shapes)


@pytest.mark.parametrize(("length", "gib"), [(512, 0.06), (1024, 0.23), (2048, 0.94), (4096, 3.75)])
def test_attention_without_fused_kernel_takes_the_published_workspace(length: int, gib: float) -> None:
    limits = Limits(max_batch_size=1, max_seq_len=4096, max_input_len=length, max_num_tokens=4096)
    assert unfused_attention_bytes(LLAMA_13B, limits) / GIB == pytest.approx(gib, abs=0.005)


def test_activations_are_the_widest_live_set() -> None:
    assert activation_bytes(LLAMA_13B, 4096) == 4096 * (2 * 5120 + 3 * 13824) * 2
    assert activation_bytes(LLAMA_13B, 4096, tp=2) == 4096 * (2 * 5120 + 3 * 13824 // 2) * 2


def _plan(weights: str, kv: str, name: str, limits: Limits = LIMITS, **more: Any) -> MemoryPlan:
    return memory_plan(LLAMA_13B, WEIGHTS[weights], KV[kv], limits, device(name), **more)


def test_llama_13b_in_16_bits_does_not_fit_on_a_24_gb_card_and_in_fp8_it_does() -> None:
    full = _plan("none", "fp16", "rtx4090")
    assert not full.fits
    assert full.missing_bytes > 0
    fp8 = _plan("fp8", "fp8", "rtx4090")
    assert fp8.fits
    assert fp8.missing_bytes == 0
    assert fp8.sequences_at_full_length in (5, 6)  # devices-and-score.md 5.7 counts 6 without a reserve


def test_three_services_in_16_bits_do_not_fit_on_an_a100_and_in_int4_they_do() -> None:
    assert not _plan("none", "fp16", "a100-80gb", services=3).fits
    int4 = _plan("int4", "int8", "a100-80gb", services=3)
    assert int4.fits
    assert int4.sequences_at_full_length in (10, 11)


def test_total_is_the_sum_of_the_lines_and_every_line_says_how() -> None:
    plan = _plan("int4", "int8", "a100-80gb", services=3)
    assert plan.total == sum(line.bytes for line in plan.lines)
    assert all(line.how and line.bytes > 0 for line in plan.lines)
    assert next(line for line in plan.lines if line.name == "KV cache").bytes == 3 * plan.max_kv_tokens * 409_600


def test_named_cache_size_is_kept_and_may_be_too_large() -> None:
    plan = _plan("fp8", "fp8", "rtx4090", kv_pool_bytes=4 * GIB)
    assert plan.max_kv_tokens == 4 * GIB // 409_600
    assert plan.fits
    assert not _plan("fp8", "fp8", "rtx4090", kv_pool_bytes=12 * GIB).fits
    assert not _plan("fp8", "fp8", "rtx4090", kv_tokens=4095).fits  # not one sequence


def test_cpu_counts_its_own_memory_only_when_told() -> None:
    limits = Limits(4, 4096, 4096, 512)
    unknown = _plan("int4", "int8", "cpu", limits)
    assert unknown.fits
    assert unknown.available is None
    assert not _plan("int4", "int8", "cpu", limits, host_memory_bytes=8 * GIB).fits
    assert _plan("int4", "int8", "cpu", limits, host_memory_bytes=16 * GIB).fits


CARDS = st.sampled_from(["t4", "l4", "rtx4090", "a100-40gb", "a100-80gb", "h200"])
SCHEMES = st.tuples(st.sampled_from(["none", "fp8", "int4", "int8"]), st.sampled_from(["fp16", "int8"]))


@settings(max_examples=60, deadline=None)
@given(CARDS, SCHEMES, st.integers(1, 32), st.integers(256, 4096), st.integers(1, 4))
def test_more_services_never_hold_more_tokens_each(
    card: str, schemes: tuple[str, str], batch: int, length: int, services: int
) -> None:
    limits = Limits(batch, length, length, min(4096, batch * length))
    one = _plan(*schemes, card, limits, services=services)
    more = _plan(*schemes, card, limits, services=services + 1)
    assert more.max_kv_tokens <= one.max_kv_tokens
    assert one.fits or not more.fits


@settings(max_examples=60, deadline=None)
@given(CARDS, SCHEMES, st.integers(1, 32), st.integers(256, 4096), st.integers(1, 64 * 1024))
def test_more_memory_never_fits_less(
    card: str, schemes: tuple[str, str], batch: int, length: int, extra_mib: int
) -> None:
    limits = Limits(batch, length, length, min(4096, batch * length))
    small = device(card)
    large = replace(small, memory_mib=(small.memory_mib or 0) + extra_mib)
    before, after = (
        memory_plan(LLAMA_13B, WEIGHTS[schemes[0]], KV[schemes[1]], limits, card) for card in (small, large)
    )
    assert after.max_kv_tokens >= before.max_kv_tokens
    assert after.fits or not before.fits
    assert before.fits == (before.total <= small.memory_mib * MIB)  # type: ignore[operator]


@settings(max_examples=60, deadline=None)
@given(CARDS, SCHEMES, st.integers(1, 32), st.integers(256, 4096), st.integers(0, 8 * 1024))
def test_more_reserve_never_fits_more(
    card: str, schemes: tuple[str, str], batch: int, length: int, reserve_mib: int
) -> None:
    limits = Limits(batch, length, length, min(4096, batch * length))
    without, kept = (_plan(*schemes, card, limits, reserve_bytes=size * MIB) for size in (0, reserve_mib))
    assert kept.max_kv_tokens <= without.max_kv_tokens
    assert without.fits or not kept.fits


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 16), st.integers(8, 128), st.sampled_from([1, 2, 4]), st.integers(1, 64))
def test_fp8_is_never_larger_than_16_bits_and_int4_never_than_fp8(layers: int, width: int, tp: int, batch: int) -> None:
    config = replace(SMALL, num_layers=layers, hidden_size=width * 128, intermediate_size=width * 256)
    limits = Limits(batch, 1024, 1024, 1024)
    totals = [
        memory_plan(config, WEIGHTS[name], KV["fp8"], limits, device("h200"), tp=tp, kv_tokens=1024).total
        for name in ("none", "fp8", "int4")
    ]
    assert totals == sorted(totals, reverse=True)


def test_fp8_weights_take_sixteen_bits_on_a_cpu_and_eight_on_a_gpu() -> None:
    def linears(name: str, weights: str = "fp8") -> int:
        made = memory_plan(LLAMA_13B, WEIGHTS[weights], KV["fp16"], LIMITS, device(name), host_memory_bytes=64 * GIB)
        return sum(line.bytes for line in made.lines if line.name in ("attention weights", "MLP weights"))

    assert linears("cpu", "int8") == linears("cpu", "int8_sq") == linear_parameters(LLAMA_13B)

    assert linears("l4") == linear_parameters(LLAMA_13B)
    assert linears("cpu") == 2 * linear_parameters(LLAMA_13B)
