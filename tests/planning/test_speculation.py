"""Promises about speculative decoding in a plan: what it needs, what it costs, and what the draft is made from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from toolchain import workspace
from toolchain.backends import openvino, tensorrt_engine
from toolchain.errors import PlanError
from toolchain.family import LlamaConfig, published
from toolchain.planning.build_flags import command, conflicts, settings
from toolchain.planning.plan import Plan, make_plan
from toolchain.planning.speculation import draft_recipe
from toolchain.recipe import load_recipe, parse_recipe
from toolchain.release import releases


def _published(name: str) -> LlamaConfig:
    config = published(name)
    assert config is not None
    return config


LLAMA_13B = _published("meta-llama/Llama-2-13b-chat-hf")
TINYLLAMA = _published("TinyLlama/TinyLlama-1.1B-Chat-v1.0")
"""22 layers, 2048 wide, 4 kv heads of 64, 2048 positions."""
TINY = replace(TINYLLAMA, max_position_embeddings=4096)
SPECULATIVE = "speculative: {draft: some/draft, tokens: 5}\n"


def plan(text: str, draft: LlamaConfig | None = TINY, config: LlamaConfig = LLAMA_13B) -> Plan:
    return make_plan(parse_recipe(f"model: m\n{SPECULATIVE}{text}", Path("mine.yaml")), config, draft=draft)


def refusal(text: str, draft: LlamaConfig = TINY) -> str:
    with pytest.raises(PlanError) as caught:
        plan(text, draft)
    return f"{caught.value.message}\n{caught.value.hint}"


ENGINES = [release.version for release in releases().values() if release.engine]


@pytest.mark.parametrize("release", ENGINES)
def test_every_release_builds_the_model_for_external_draft_tokens(release: str) -> None:
    made = plan(f"device: a100\ntensorrt_llm: {release!r}")
    words = command(made, Path("in"), Path("out"))
    assert words[words.index("--speculative_decoding_mode") + 1] == "draft_tokens_external"
    assert words[words.index("--max_draft_len") + 1] == "5"
    assert words[words.index("--use_paged_context_fmha") + 1] == "enable"
    assert words[words.index("--max_seq_len") + 1] == "4096"  # the builder adds the draft's tokens itself
    assert made.engine_max_seq_len == 4101


def test_recipe_without_a_draft_asks_nothing_new_of_the_builder() -> None:
    made = make_plan(parse_recipe("model: m\ndevice: a100", Path("mine.yaml")), LLAMA_13B)
    assert {"speculative_decoding_mode", "max_draft_len"}.isdisjoint(settings(made))
    assert made.engine_max_seq_len == 4096
    assert "draft_tokens" not in made.slice("build")


def test_drafted_tokens_are_part_of_the_engines_key() -> None:
    assert plan("device: a100").slice("build")["draft_tokens"] == 5


def test_t4_is_refused_for_want_of_fused_attention() -> None:
    assert "does not exist on this GPU" in refusal(
        "device: t4\nquantization: {weights: int4}\nlimits: {max_seq_len: 512}"
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("device: a100\nkv_cache: {dtype: int8}", "INT8 KV excludes it"),
        ("device: l4\nquantization: {weights: int4}\nkv_cache: {dtype: fp8}", "with FP8 weights only"),
        ("device: a100\ntensorrt_llm: '0.17.0'\nkv_cache: {window: 1024}", "kv_cache.window excludes KV reuse"),
        ("device: a100\nparallel: {pp: 2}", "lists tensor parallelism only"),
    ],
)
def test_what_excludes_kv_reuse_excludes_speculation(text: str, why: str) -> None:
    said = refusal(text)
    assert why in said
    assert "Leave out" in said or "kv_cache dtype: fp16" in said


def test_pytorch_runtime_refuses_it_by_name() -> None:
    assert "backend: tensorrt_engine" in refusal("device: a100\nbackend: tensorrt_llmapi")


CPU = "device: cpu\nlimits: {max_batch_size: 2, max_input_len: 700}\n"
LOOKUP = "speculative: {lookup: 3, tokens: 5}\n"


def lookup(text: str) -> Plan:
    return make_plan(parse_recipe(f"model: m\n{LOOKUP}{text}", Path("mine.yaml")), LLAMA_13B)


def test_cpu_engine_gets_a_draft_whose_prompts_are_never_cut() -> None:
    made = plan(CPU)
    assert made.limits.max_num_tokens == 700 + 5 + 1
    told = openvino.runtime(made)
    assert told["draft"] == {"tokens": 5}
    assert (told["scheduler"]["dynamic_split_fuse"], told["scheduler"]["max_num_batched_tokens"]) == (False, 706)
    assert (made.kv_reuse, told["scheduler"]["enable_prefix_caching"]) == (True, True)
    lines = {line.name for line in made.memory.lines}
    assert {"draft: attention weights", "draft: KV cache"} <= lines
    assert "draft: process and libraries" not in lines
    assert made.memory.max_kv_tokens == 2 * 4160  # 4101 tokens in blocks of 64


def test_cpu_engine_looks_up_without_a_draft_and_without_a_prefix_cache() -> None:
    made = lookup("device: cpu\nlimits: {max_batch_size: 64}")
    told = openvino.runtime(made)
    assert told["lookup"] == {"tokens": 5, "ngram": 3}
    assert (told["scheduler"]["dynamic_split_fuse"], told["scheduler"]["enable_prefix_caching"]) == (True, False)
    assert made.limits.max_num_tokens == 64 * 6  # a step checks all drafts
    assert made.slice("build")["lookup"] == 3
    assert not any(line.name.startswith("draft: ") for line in made.memory.lines)


@pytest.mark.parametrize(
    ("text", "why", "hint"),
    [
        ("device: a100", "no release of Triton's tensorrtllm backend looks tokens up", "draft: FOLDER"),
        ("device: a100\nbackend: tensorrt_llmapi", "a sampler without the penalties", "backend: tensorrt_engine"),
    ],
)
def test_gpu_backends_refuse_lookup_with_what_they_have_instead(text: str, why: str, hint: str) -> None:
    with pytest.raises(PlanError) as caught:
        lookup(text)
    assert why in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("text", "told"), [("", True), ("cpu: {precision: f32}", False), ("kv_cache: {dtype: fp32}", False)]
)
def test_near_ties_are_warned_about_where_arithmetic_may_be_bf16(text: str, told: bool) -> None:
    assert any("nearly as likely" in warning for warning in plan(CPU + text).warnings) is told


def test_cpu_engine_refuses_drafts_with_a_window() -> None:
    assert "so the text would change" in refusal(CPU + "kv_cache: {window: 256, sinks: 4}")


def test_int8_cache_and_several_services_are_no_hindrance_on_a_cpu() -> None:
    made = plan(CPU + "kv_cache: {dtype: int8}\nservices: 2")
    assert made.memory.services == 2


def test_draft_on_a_gpu_needs_the_prefix_cache() -> None:
    assert "kv_cache.reuse is false" in refusal("device: a100\nkv_cache: {reuse: false}")


def test_prefix_cache_can_be_turned_off_and_a_prompt_still_comes_in_pieces() -> None:
    recipe = "model: m\nkv_cache: {reuse: false}\ndevice: "
    gpu, cpu = (make_plan(parse_recipe(recipe + name, Path("mine.yaml")), LLAMA_13B) for name in ("a100", "cpu"))
    told = tensorrt_engine.runtime(gpu)
    assert (told["enable_kv_cache_reuse"], told["enable_chunked_context"]) == (False, True)
    assert openvino.runtime(cpu)["scheduler"]["enable_prefix_caching"] is False
    assert cpu.slice("build")["kv_reuse"] is False
    assert any((one.name, one.reason) == ("kv_reuse", "named by the recipe") for one in cpu.decisions)


def test_draft_with_ids_that_the_model_lacks_is_refused() -> None:
    said = refusal("device: a100", replace(TINY, vocab_size=32064))
    assert "has 32064 token ids, the model 32000" in said


def test_draft_with_fewer_ids_is_taken_with_a_warning() -> None:
    made = plan("device: a100", replace(TINY, vocab_size=31000))
    assert any("tokenizers are compared" in warning for warning in made.warnings)


def test_draft_that_is_no_smaller_than_the_model_is_warned_about() -> None:
    assert any("not smaller" in warning for warning in plan("device: a100", LLAMA_13B).warnings)
    assert not any("not smaller" in warning for warning in plan("device: a100").warnings)


def test_draft_with_fewer_positions_drafts_up_to_them_and_no_further() -> None:
    made = plan("device: a100", TINYLLAMA)
    assert made.limits.max_seq_len == 4096
    assert made.speculation is not None
    assert made.speculation.max_seq_len == 2048


def test_memory_counts_the_draft_and_its_cache_as_lines_of_their_own() -> None:
    text = "device: a100\nlimits: {max_batch_size: 2}"
    alone = make_plan(parse_recipe(f"model: m\n{text}", Path("mine.yaml")), LLAMA_13B).memory
    both = plan(text).memory
    lines = {line.name: line.bytes for line in both.lines}
    assert lines["draft: attention weights"] == 22 * (2 * 2048**2 + 2 * 256 * 2048) * 2
    assert lines["draft: MLP weights"] == 22 * 3 * 5632 * 2048 * 2
    assert lines["draft: KV cache"] == both.max_kv_tokens * 22 * 4 * 2 * 64 * 2
    assert "draft: CUDA context" not in lines  # one process
    assert both.total > alone.total
    assert sum(line.bytes for line in both.lines) == both.total
    assert both.max_kv_tokens == 2 * 4160  # 4101 tokens in blocks of 64


def test_cache_size_of_a_recipe_is_shared_with_the_draft() -> None:
    made = plan("device: a100\nkv_cache: {size: 8GiB}").memory
    lines = {line.name: line.bytes for line in made.lines}
    assert 0 <= 8 * 2**30 - lines["KV cache"] - lines["draft: KV cache"] < 819_200 + 22_528


def test_draft_that_does_not_fit_is_refused_by_the_memory_plan() -> None:
    large = replace(TINY, num_layers=80, hidden_size=4096, intermediate_size=11008, head_dim=128)
    assert "memory: fp8 weights and fp16 KV need" in refusal("device: l4\nquantization: {weights: fp8}", large)


def test_step_holds_the_whole_sequence_because_each_step_sends_it() -> None:
    long = replace(LLAMA_13B, max_position_embeddings=16384)
    text = "device: h100\nquantization: {weights: fp8}\nlimits: {max_batch_size: 2"
    assert plan(text + "}", config=long).limits.max_num_tokens == 16384
    with pytest.raises(PlanError, match="max_num_tokens 4096: speculative sends the whole sequence"):
        plan(text + ", max_num_tokens: 4096}", config=long)


def test_step_that_the_builder_would_make_longer_is_told_before() -> None:
    made = plan("device: a100\nlimits: {max_batch_size: 8}")
    wanted = {**settings(made), "max_draft_len": 2000}
    assert any("raises it to max_batch_size x (max_draft_len + 1), 16008" in one for one in conflicts(made, wanted))


def test_model_is_not_built_for_drafts_without_kv_reuse() -> None:
    made = plan("device: a100")
    assert any(
        "needs use_paged_context_fmha" in one
        for one in conflicts(made, {**settings(made), "use_paged_context_fmha": False})
    )


def test_plan_without_the_drafts_config_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="some/draft"):
        plan("device: a100", None)


def test_draft_is_quantized_and_limited_like_the_model_and_built_by_the_same_release() -> None:
    made = plan("device: rtx4090\nquantization: {weights: fp8}\nkv_cache: {dtype: fp8}\nlimits: {max_batch_size: 2}")
    assert made.speculation
    assert made.release
    own = draft_recipe(
        made.recipe, made.speculation, made.limits, kv_tokens=made.max_kv_tokens, release=made.release.version
    )
    draft = make_plan(own, TINY)
    assert (own.name, own.model, own.speculative) == ("draft", "some/draft", None)
    assert (draft.weights, draft.kv, draft.release, draft.limits) == (made.weights, made.kv, made.release, made.limits)
    assert draft.max_kv_tokens == made.max_kv_tokens
    assert draft.kv_reuse
    assert "--speculative_decoding_mode" not in command(draft, Path("in"), Path("out"))
    lines = {line.name: line.bytes for line in made.memory.lines}
    for line in draft.memory.lines:
        assert line.name == "CUDA context" or lines[f"draft: {line.name}"] == line.bytes


def test_shipped_recipe_of_the_4090_takes_a_draft_model() -> None:
    recipe = load_recipe("rtx4090", search=[workspace.shipped("recipes")])
    text = recipe.text + "\nspeculative: {draft: TinyLlama/TinyLlama-1.1B-Chat-v1.0}\n"
    made = make_plan(parse_recipe(text, Path("mine.yaml")), LLAMA_13B, draft=TINYLLAMA)
    assert made.speculation
    assert made.speculation.tokens == 4
    assert made.memory.fits
