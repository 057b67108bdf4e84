"""Promises about ``trtllm-build`` commands: exact by release, only flags that it knows, nothing it would refuse.

The expected values were written by hand from TensorRT-LLM's build.py and plugin.py, not from the table under test.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from toolchain import workspace
from toolchain.device import devices
from toolchain.errors import PlanError
from toolchain.family import LlamaConfig, published
from toolchain.planning.build_flags import Setting, arguments, command, conflicts, flags, settings
from toolchain.planning.memory import MemoryLine
from toolchain.planning.plan import Plan, make_plan
from toolchain.quantization import KV, WEIGHTS
from toolchain.recipe import available, load_recipe, parse_recipe
from toolchain.release import releases, usable
from toolchain.variant import settle

RELEASES = tuple(releases())
CHECKPOINT, ENGINE = Path("w/trt"), Path("w/engine")


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Options of commands/build.py after auto_parallel was removed from it (read 2026-11-22).
AFTER_1_0 = names("""
    checkpoint_dir model_config build_config model_cls_file model_cls_name output_dir max_batch_size max_input_len
    max_seq_len max_decoder_seq_len max_beam_width max_num_tokens opt_num_tokens max_encoder_input_len
    max_prompt_embedding_table_size max_multimodal_len kv_cache_type paged_kv_cache input_timing_cache
    output_timing_cache profiling_verbosity strip_plan weight_sparsity weight_streaming fast_build workers log_level
    enable_debug_output visualize_network dry_run monitor_memory logits_dtype gather_context_logits
    gather_generation_logits gather_all_token_logits lora_dir lora_ckpt_source lora_target_modules max_lora_rank
    speculative_decoding_mode max_draft_len
""")

# cli_plugin_args of plugin/plugin.py with pydantic fields (read 2026-11-22).
PLUGINS_AFTER_1_0 = names("""
    bert_attention_plugin gpt_attention_plugin gemm_plugin gemm_swiglu_plugin fp8_rowwise_gemm_plugin lora_plugin
    dora_plugin moe_plugin mamba_conv1d_plugin nccl_plugin low_latency_gemm_plugin low_latency_gemm_swiglu_plugin
    gemm_allreduce_plugin context_fmha bert_context_fmha_fp32_acc remove_input_padding tokens_per_block
    use_paged_context_fmha use_fp8_context_fmha fuse_fp4_quant multiple_profiles paged_state streamingllm
    norm_quant_fusion reduce_fusion user_buffer use_fused_mlp pp_reduce_scatter
""")

AT_0_16 = AFTER_1_0 | {"auto_parallel", "gpus_per_node", "cluster_key"}
"""commands/build.py @008b2b8d, which has monitor_memory (0.15 and later) and still auto_parallel (until about 1.0)."""


def _llama_13b() -> LlamaConfig:
    config = published("meta-llama/Llama-2-13b-chat-hf")
    assert config is not None
    return config


LLAMA_13B = _llama_13b()
SMALL = replace(LLAMA_13B, hidden_size=1024, intermediate_size=2048, num_layers=4, num_heads=8, num_kv_heads=4)


def plan_of(text: str, release: str | None = None, config: LlamaConfig = LLAMA_13B) -> Plan:
    pin = f"\ntensorrt_llm: {release}" if release else ""
    return make_plan(parse_recipe(f"model: some/folder\n{text}{pin}", Path("mine.yaml")), config)


def shipped(name: str, release: str) -> Plan:
    recipe = load_recipe(name, search=[workspace.shipped("recipes")])
    return make_plan(recipe.model_copy(update={"tensorrt_llm": release}), LLAMA_13B)


def argv(plan: Plan) -> tuple[str, ...]:
    return command(plan, CHECKPOINT, ENGINE)


def passed(words: tuple[str, ...]) -> dict[str, str]:
    """Flag -> value of an argv in which every flag has one."""
    assert len(words[1:]) % 2 == 0
    return dict(zip((word.removeprefix("--") for word in words[1::2]), words[2::2], strict=True))


HEAD = "trtllm-build --checkpoint_dir w/trt --output_dir w/engine --workers 1 "
CARD = "--max_batch_size 16 --max_input_len 4096 --max_seq_len 4096 --max_num_tokens 4096 --max_beam_width 1 "
T4_CARD = "--max_batch_size 4 --max_input_len 1024 --max_seq_len 2048 --max_num_tokens 1024 --max_beam_width 1 "
A100_CARD = CARD.replace("16", "32")
BLOCKS = "--tokens_per_block 64 --remove_input_padding enable "
FP8_OFF = "--gpt_attention_plugin auto --gemm_plugin disable --context_fmha enable --use_paged_context_fmha disable "
FP8_ON = FP8_OFF.replace("use_paged_context_fmha disable", "use_paged_context_fmha enable")
INT4 = "--gpt_attention_plugin auto --gemm_plugin auto --context_fmha enable --use_paged_context_fmha disable "
TURING = "--gpt_attention_plugin float16 --gemm_plugin float16 --context_fmha disable --use_paged_context_fmha disable "
PAGED, PAGED_0_12 = "--kv_cache_type paged ", "--paged_kv_cache enable "
OFF, ON = "--use_fp8_context_fmha disable", "--use_fp8_context_fmha enable"

GOLDEN = {
    # FP8 attention of prompts on SM 8.9 is confirmed from 0.13 on, kv_cache_type came with 0.13.
    ("rtx4090", "0.12.0"): HEAD + CARD + PAGED_0_12 + BLOCKS + FP8_OFF + OFF,
    **{
        ("rtx4090", release): HEAD + CARD + PAGED + BLOCKS + FP8_ON + ON
        for release in RELEASES[RELEASES.index("0.13.0") :]
    },
    # FP8 attention of prompts on SM 9.0 is in every release of the table.
    ("h100", "0.12.0"): (
        HEAD
        + CARD.replace("16", "64").replace("num_tokens 4096", "num_tokens 8192")
        + PAGED_0_12
        + BLOCKS
        + FP8_ON
        + ON
    ),
    # Turing: float16, no fused attention, short prompts.
    ("t4", "0.12.0"): HEAD + T4_CARD + PAGED_0_12 + BLOCKS + TURING + OFF,
    ("t4", "0.13.0"): HEAD + T4_CARD + PAGED + BLOCKS + TURING + OFF,
    # INT8 KV excludes paged context attention, whatever the builder's default.
    ("a100", "0.12.0"): HEAD + A100_CARD + PAGED_0_12 + BLOCKS + INT4 + OFF,
    ("a100", "0.17.0"): HEAD + A100_CARD + PAGED + BLOCKS + INT4 + OFF,
    ("a100", "1.2.1"): HEAD + A100_CARD + PAGED + BLOCKS + INT4 + OFF,
}


@pytest.mark.parametrize(("recipe", "release"), list(GOLDEN))
def test_shipped_recipe_becomes_exactly_this_command(recipe: str, release: str) -> None:
    assert argv(shipped(recipe, release)) == tuple(shlex.split(GOLDEN[recipe, release]))


def gpu_recipes() -> Iterator[tuple[str, str]]:
    folder = workspace.shipped("recipes")
    for name in available([folder]):
        recipe, _ = settle(load_recipe(name, search=[folder]))
        device = devices()[recipe.device]
        if device.sm is not None:
            needs = WEIGHTS[recipe.quantization.weights].needs | KV[recipe.kv_cache.dtype].needs
            for release in usable(device.sm, recipe.backend or device.backends[0], needs):
                yield name, release.version


@pytest.mark.parametrize(("name", "release"), list(gpu_recipes()))
def test_every_gpu_recipe_passes_only_flags_and_values_that_the_release_knows(name: str, release: str) -> None:
    known = flags(release)
    for flag, value in passed(argv(shipped(name, release))).items():
        assert flag in known
        assert value in known[flag].choices or known[flag].value in ("int", "path"), f"{flag} {value}"


def test_every_plan_for_an_engine_becomes_a_command_without_conflicts() -> None:
    """Devices x weights x caches x releases; what a plan refuses has no command."""
    made = 0
    for device, weights, kv, release in product(devices().values(), WEIGHTS, ("fp16", "int8", "fp8"), RELEASES):
        if device.sm is None or device.sm not in releases()[release].sms:
            continue
        text = f"device: {device.name}\nbackend: tensorrt_engine\nquantization: {{weights: {weights}}}\n"
        try:
            plan = plan_of(f"{text}kv_cache: {{dtype: {kv}}}\nlimits: {{max_seq_len: 512}}", release, SMALL)
        except PlanError:
            continue
        words = passed(argv(plan))
        assert set(words) <= set(flags(release)), (device.name, weights, kv, release)
        assert not list(conflicts(plan, settings(plan)))
        made += 1
    assert made > 500


@pytest.mark.parametrize("release", ["1.1.0", "1.2.0", "1.2.1"])
def test_the_table_of_the_last_releases_holds_nothing_that_nvidias_source_has_not(release: str) -> None:
    assert set(flags(release)) <= AFTER_1_0 | PLUGINS_AFTER_1_0


def test_the_table_of_0_16_holds_no_option_that_nvidias_source_has_not() -> None:
    assert set(flags("0.16.0")) - PLUGINS_AFTER_1_0 <= AT_0_16


@pytest.mark.parametrize(
    ("flag", "first", "last"),
    [
        ("kv_cache_type", "0.13.0", None),
        ("paged_kv_cache", "0.12.0", None),
        ("builder_force_num_profiles", "0.12.0", "0.14.0"),
        ("builder_opt", "0.12.0", "0.13.0"),
        ("user_buffer", "0.16.0", None),
        ("monitor_memory", "0.15.0", None),
        ("low_latency_gemm_plugin", "0.13.0", None),
        ("low_latency_gemm_swiglu_plugin", "0.15.0", None),
        ("pp_reduce_scatter", "0.15.0", None),
        ("auto_parallel", "0.12.0", "1.0.0"),
        ("enable_xqa", "0.12.0", "0.15.0"),
        ("max_seq_len", "0.12.0", None),
    ],
)
def test_flag_is_known_from_its_first_release_to_its_last(flag: str, first: str, last: str | None) -> None:
    span = RELEASES[RELEASES.index(first) : RELEASES.index(last or RELEASES[-1]) + 1]
    assert tuple(version for version in RELEASES if flag in flags(version)) == span


@pytest.mark.parametrize("flag", ["max_output_len", "tp_size", "strongly_typed", "weight_only_precision"])
def test_flags_of_older_releases_are_known_nowhere_and_refused_with_their_end(flag: str) -> None:
    for version in RELEASES:
        assert flag not in flags(version)
    with pytest.raises(PlanError, match=f"0.12.0 has no --{flag}: gone since 0.1"):
        arguments({flag: 1}, "0.12.0")


def test_flag_of_a_later_release_is_refused_and_no_argv_made() -> None:
    with pytest.raises(PlanError, match=r"TensorRT-LLM 0\.12\.0 has no --kv_cache_type"):
        arguments({"kv_cache_type": "paged"}, "0.12.0")


def test_value_that_a_release_does_not_take_is_refused_with_those_that_it_takes() -> None:
    assert arguments({"gemm_plugin": "nvfp4"}, "1.2.1") == ("--gemm_plugin", "nvfp4")
    with pytest.raises(PlanError, match="takes no 'nvfp4'") as caught:
        arguments({"gemm_plugin": "nvfp4"}, "0.12.0")
    assert "bfloat16" in caught.value.hint
    with pytest.raises(PlanError, match="whole number"):
        arguments({"max_batch_size": "many"}, "1.2.1")


def test_fused_mlp_is_a_switch_in_0_12_and_a_word_afterwards() -> None:
    assert arguments({"use_fused_mlp": True}, "0.12.0") == ("--use_fused_mlp",)
    assert arguments({"use_fused_mlp": False}, "0.12.0") == ()
    assert arguments({"use_fused_mlp": True}, "0.13.0") == ("--use_fused_mlp", "enable")
    assert arguments({"use_fused_mlp": False}, "1.2.1") == ("--use_fused_mlp", "disable")
    with pytest.raises(PlanError, match="is a switch"):
        arguments({"use_fused_mlp": "enable"}, "0.12.0")


def test_separate_fp8_scales_are_not_rounded_again_by_the_fused_mlp() -> None:
    text = "device: l4\nquantization: {weights: fp8, fp8_scales: separate}\nlimits: {max_batch_size: 4}"
    assert passed(argv(plan_of(text, "1.2.1")))["use_fused_mlp"] == "disable"
    assert "--use_fused_mlp" not in argv(plan_of(text, "0.12.0"))  # off there, unless it is asked for
    assert "--use_fused_mlp" not in argv(plan_of(text.replace("separate", "shared"), "1.2.1"))


def test_whatever_changed_its_default_is_said_so_that_the_engine_is_the_same() -> None:
    changed = {
        name
        for name in flags("0.12.0")
        if len({flags(version)[name].default for version in RELEASES if name in flags(version)}) > 1
    }
    assert changed == {
        *("max_batch_size", "tokens_per_block", "use_paged_context_fmha", "use_fp8_context_fmha"),
        "use_fused_mlp",
    }
    for version in RELEASES:
        assert changed - {"use_fused_mlp"} <= set(settings(shipped("rtx4090", version)))


FP8 = "device: h100\nquantization: {weights: fp8}\nkv_cache: {dtype: fp8}"
T4 = (
    "device: t4\nquantization: {weights: int4}\nkv_cache: {dtype: int8}\n"
    "limits: {max_batch_size: 4, max_seq_len: 2048, max_input_len: 1024}"
)


def found(plan: Plan, **changed: Setting) -> str:
    """The one conflict of a plan whose flags were changed."""
    listed = list(conflicts(plan, {**settings(plan), **changed}))
    assert len(listed) == 1, listed
    return listed[0]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("device: a100\nquantization: {weights: int4}\nkv_cache: {dtype: int8}", "INT8 KV excludes it"),
        ("device: a100\nkv_cache: {dtype: int8}", "INT8 KV excludes it"),
        ("device: l4\nquantization: {weights: int4}\nkv_cache: {dtype: fp8}", "with FP8 weights only"),
        ("device: l4\nquantization: {weights: int4_fp8}\nkv_cache: {dtype: fp8}", "with FP8 weights only"),
        (T4, "needs context_fmha"),
    ],
)
def test_paged_context_attention_is_off_where_the_builder_refuses_it_and_checked(text: str, why: str) -> None:
    plan = plan_of(text)
    words = passed(argv(plan))
    assert (words["use_paged_context_fmha"], words["use_fp8_context_fmha"]) == ("disable", "disable")
    assert why in found(plan, use_paged_context_fmha=True)
    with pytest.raises(PlanError, match="would not build what the plan says") as caught:
        argv(replace(plan, paged_context_fmha=True))
    assert why in caught.value.message


def test_paged_context_attention_over_fp8_says_that_fp8_attention_is_on() -> None:
    plan = plan_of(FP8)
    assert passed(argv(plan))["use_fp8_context_fmha"] == "enable"
    assert "the builder turns it on" in found(plan, use_fp8_context_fmha=False)


def test_fp8_attention_without_fp8_weights_is_told_to_do_nothing() -> None:
    assert "does nothing with int4 weights" in found(
        plan_of("device: l4\nquantization: {weights: int4}"), use_fp8_context_fmha=True
    )


def test_a_t4_gets_float16_no_fused_attention_and_bounded_prompts() -> None:
    plan = plan_of(T4, config=replace(LLAMA_13B, dtype="bfloat16"))
    words = passed(argv(plan))
    assert (words["context_fmha"], words["gpt_attention_plugin"], words["gemm_plugin"]) == (
        "disable",
        "float16",
        "float16",
    )
    assert int(words["max_input_len"]) == 1024
    assert int(words["max_num_tokens"]) >= 1024


def test_what_a_t4_cannot_do_is_told_before_anything_runs() -> None:
    plan = plan_of(T4)
    assert "aborts on SM 75" in found(plan, context_fmha=True)
    assert "refuses it on SM 75" in found(plan, gpt_attention_plugin="bfloat16")
    assert "raises it to max_input_len 1024" in found(plan, max_num_tokens=512)


def test_a_t4_plan_that_does_not_count_the_workspace_is_refused() -> None:
    plan = plan_of(T4)
    lines = tuple(line for line in plan.memory.lines if line.name != "attention workspace")
    assert len(lines) == len(plan.memory.lines) - 1
    assert all(isinstance(line, MemoryLine) for line in lines)
    with pytest.raises(PlanError, match="leaves out the workspace of prompts of 1024 tokens"):
        argv(replace(plan, memory=replace(plan.memory, lines=lines)))


def test_limits_that_the_builder_would_change_in_silence_are_refused() -> None:
    plan = plan_of(FP8 + "\nlimits: {max_batch_size: 2, max_seq_len: 1024}")
    assert "clips it to max_seq_len 1024" in found(plan, max_input_len=2048)
    assert "lowers it to max_batch_size x max_seq_len, 2048" in found(plan, max_num_tokens=4096)
    assert "clips it" in found(replace(plan, limits=replace(plan.limits, max_input_len=2048)))


def test_fusions_without_what_they_need_are_refused() -> None:
    one, two = plan_of(FP8), plan_of(FP8 + "\nparallel: {tp: 2}")
    assert "needs use_fused_mlp" in found(one, gemm_swiglu_plugin="fp8", use_fused_mlp=False)
    assert not list(conflicts(one, {**settings(one), "gemm_swiglu_plugin": "fp8"}))  # on by default since 0.13
    assert "needs use_fused_mlp" in found(plan_of(FP8, "0.12.0"), gemm_swiglu_plugin="fp8")  # off by default there
    assert "turns it off with tp 1 and pp 1" in found(one, reduce_fusion=True)
    assert not list(conflicts(two, {**settings(two), "reduce_fusion": True, "user_buffer": True}))
    assert "turns it off with tp 2 and pp 2" in found(plan_of(FP8 + "\nparallel: {tp: 2, pp: 2}"), reduce_fusion=True)
    assert "needs reduce_fusion" in found(two, user_buffer=True)


def test_every_rank_is_built_by_a_worker_of_its_own() -> None:
    assert passed(argv(plan_of(FP8 + "\nparallel: {tp: 2, pp: 2}")))["workers"] == "4"


def test_all_conflicts_are_told_at_once() -> None:
    plan = plan_of("device: a100\nquantization: {weights: int4}\nkv_cache: {dtype: int8}")
    wrong = replace(plan, paged_context_fmha=True, limits=replace(plan.limits, max_input_len=9000))
    with pytest.raises(PlanError) as caught:
        argv(wrong)
    assert caught.value.message.count("\n  - ") == 2
    assert "scalellm plan" in caught.value.hint


@pytest.mark.parametrize("text", ["device: cpu", "device: h100\nbackend: tensorrt_llmapi"])
def test_other_backends_have_no_builder(text: str) -> None:
    with pytest.raises(PlanError, match="builds without trtllm-build"):
        argv(plan_of(text))


def test_a_release_without_a_row_has_no_flags() -> None:
    with pytest.raises(PlanError, match=r"1\.3\.0 has no trtllm-build") as caught:
        flags("1.3.0")
    assert "1.2.1" in caught.value.hint


def test_what_is_not_confirmed_is_marked() -> None:
    """Between 0.17.dev and 0.20 nobody read the defaults; the flags that are passed do not depend on them."""
    for name in ("tokens_per_block", "use_paged_context_fmha", "use_fp8_context_fmha"):
        marked = {version for version in RELEASES if "default" in flags(version)[name].unconfirmed}
        assert marked == {"0.18.0", "0.18.2", "0.19.0"}
    passed_to = {name for version in RELEASES for name in settings(shipped("rtx4090", version))}
    for version in RELEASES:
        for name in passed_to & set(flags(version)):
            assert flags(version)[name].unconfirmed <= {"default"}, f"{name} {version}"
