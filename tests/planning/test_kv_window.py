"""Promises about KV sparsification: what a window leaves in the cache, what it excludes, and who refuses it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from toolchain.errors import PlanError
from toolchain.family import LlamaConfig, published
from toolchain.planning.build_flags import command, conflicts, settings
from toolchain.planning.kv_window import KvWindow
from toolchain.planning.plan import Plan, make_plan
from toolchain.recipe import parse_recipe


def _llama_13b() -> LlamaConfig:
    config = published("meta-llama/Llama-2-13b-chat-hf")
    assert config is not None
    return config


LLAMA_13B = _llama_13b()
RING, ROW = "0.17.0", "1.2.1"
"""A release that overwrites what leaves the window, and one that writes the cache in a row."""


def plan(cache: str, release: str = RING, rest: str = "device: a100", config: LlamaConfig = LLAMA_13B) -> Plan:
    pin = f"tensorrt_llm: {release!r}\n" if release else ""
    return make_plan(parse_recipe(f"model: m\n{pin}kv_cache: {{{cache}}}\n{rest}", Path("mine.yaml")), config)


def refusal(cache: str, release: str = RING, rest: str = "device: a100", config: LlamaConfig = LLAMA_13B) -> str:
    with pytest.raises(PlanError) as caught:
        plan(cache, release, rest, config)
    return f"{caught.value.message}\n{caught.value.hint}"


@pytest.mark.parametrize(
    ("window", "kept"),
    [
        (KvWindow(1024, 0, ring=True), 1024),
        (KvWindow(1000, 0, ring=True), 1024),
        (KvWindow(1024, 4, ring=True), 1088),  # 4 sinks and a gap of 60 make a block of their own
        (KvWindow(1024, 64, ring=True), 1024),
        (KvWindow(1024, 65, ring=True), 1088 + 64 - 64),
        (KvWindow(1024, 0, ring=False), 4096),
    ],
)
def test_sequence_keeps_the_blocks_of_its_window(window: KvWindow, kept: int) -> None:
    # by hand from kvCacheManager.cpp: gap = -sinks mod 64, blocks = ceil((window + gap) / 64)
    assert window.kept(4096) == kept


def test_window_of_a_quarter_lets_four_times_as_many_sequences_into_the_same_cache() -> None:
    size = "size: 4GiB"
    whole, windowed = plan(size).memory, plan(f"{size}, window: 1024").memory
    assert whole.max_kv_tokens == windowed.max_kv_tokens
    assert (whole.sequences_at_full_length, windowed.sequences_at_full_length) == (1, 5)


def test_window_lowers_what_the_cache_takes_where_memory_is_not_the_limit() -> None:
    rest = "device: a100\nlimits: {max_batch_size: 4}"
    assert plan("window: 1024", rest=rest).max_kv_tokens == 4 * 1024
    assert plan("dtype: fp16", rest=rest).max_kv_tokens == 4 * 4096


def test_cache_of_one_window_is_enough_for_a_long_sequence() -> None:
    assert plan("window: 1024, max_tokens: 1024", rest="device: a100\nlimits: {max_seq_len: 4096}").memory.fits
    assert "holds 960 tokens, not one sequence of 1024" in refusal("window: 1024, max_tokens: 960")


def test_releases_that_write_the_cache_in_a_row_are_counted_whole_with_a_warning() -> None:
    made = plan("window: 1024", ROW, "device: a100\nlimits: {max_batch_size: 4}")
    assert made.max_kv_tokens == 4 * 4096
    assert any("whole sequences are counted" in warning for warning in made.warnings)
    assert not any("whole sequences" in warning for warning in plan("window: 1024").warnings)


def test_window_ends_kv_reuse_and_says_so() -> None:
    made = plan("window: 1024")
    assert made.paged_context_fmha
    assert not made.kv_reuse
    assert plan("dtype: fp16").kv_reuse
    assert {d.name: d.value for d in made.decisions}["kv_reuse"] is False


def test_window_alone_asks_nothing_of_the_builder() -> None:
    assert settings(plan("window: 1024")) == settings(plan("dtype: fp16"))


@pytest.mark.parametrize("release", ["0.12.0", "0.17.0", "0.21.0", "1.0.0"])
def test_sinks_are_built_in_and_turn_paged_context_attention_off(release: str) -> None:
    made = plan("window: 1024, sinks: 4", release)
    words = command(made, Path("in"), Path("out"))
    assert words[words.index("--streamingllm") + 1] == "enable"
    assert words[words.index("--use_paged_context_fmha") + 1] == "disable"
    assert not made.kv_reuse


def test_builder_is_not_asked_for_sinks_with_paged_context_attention() -> None:
    made = plan("window: 1024, sinks: 4")
    wanted = {**settings(made), "use_paged_context_fmha": True}
    assert any("turns it off for streamingllm" in reason for reason in conflicts(made, wanted))


@pytest.mark.parametrize("release", ["1.1.0", "1.2.1", ""])
def test_sinks_are_refused_where_the_builder_refuses_them_and_a_release_that_takes_them_is_named(release: str) -> None:
    said = refusal("window: 1024, sinks: 4", release)
    assert "refuses to build attention sinks" in said
    assert 'pin tensorrt_llm: "1.0.3.2510" or older' in said


def test_sinks_are_for_llama_only() -> None:
    qwen = replace(LLAMA_13B, architecture="Qwen2ForCausalLM")
    assert "for Llama only, not Qwen2ForCausalLM" in refusal("window: 1024, sinks: 4", config=qwen)


@pytest.mark.parametrize("asked", ["window: 1024", "window: 1024, sinks: 4"])
def test_pytorch_runtime_has_no_window(asked: str) -> None:
    assert "issue 11244" in refusal(asked, ROW, "device: a100\nbackend: tensorrt_llmapi")


CPU = "device: cpu\nlimits: {max_batch_size: 4, max_input_len: 500}"


def test_openvino_keeps_sinks_in_blocks_and_counts_the_whole_prompt() -> None:
    made = plan("window: 256, sinks: 4", "", CPU)
    assert made.window is not None
    assert (made.window.start, made.window.recent, made.window.tokens) == (32, 192, 256)
    assert made.max_kv_tokens == 4 * 512  # 500 tokens and one in blocks of 32
    assert not made.kv_reuse
    assert made.limits.max_num_tokens == 256  # a prompt may come in pieces: nothing is evicted from it
    [told] = [one for one in made.decisions if one.name == "kv_window"]
    assert "attended to whole" in told.reason
    assert "highest attention scores" in told.reason
    assert any("not the window of a TensorRT-LLM engine" in warning for warning in made.warnings)


def test_openvino_window_of_short_prompts_takes_a_block_more_than_itself() -> None:
    rest = "device: cpu\nlimits: {max_batch_size: 4, max_input_len: 100}"
    assert plan("window: 256, sinks: 33", "", rest).max_kv_tokens == 4 * 320  # 288, in the plan's blocks of 64


@pytest.mark.parametrize(
    ("asked", "why", "hint"),
    [
        ("window: 256", "always keeps a first block of 32 tokens", "Use sinks: 4"),
        ("window: 250, sinks: 4", "evicts whole blocks of 32", "Use window: 256"),
        ("window: 64, sinks: 4", "one for the sinks", "Use window: 96"),
        ("window: 4096, sinks: 4", "hides nothing", "smaller window"),
    ],
)
def test_openvino_refuses_the_windows_that_its_eviction_lacks(asked: str, why: str, hint: str) -> None:
    said = refusal(asked, "", "device: cpu")
    assert why in said
    assert hint in said


def test_window_that_hides_nothing_is_refused() -> None:
    assert "hides nothing: no sequence is longer than 4096" in refusal("window: 4096")


def test_window_and_sinks_are_part_of_the_engines_key_only_where_there_are_any() -> None:
    assert {"window", "sinks", "draft_tokens"}.isdisjoint(plan("dtype: fp16").slice("build"))
    made = plan("window: 1024, sinks: 4").slice("build")
    assert (made["window"], made["sinks"]) == (1024, 4)
