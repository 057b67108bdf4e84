"""Promises about plans: what is decided, what is refused, and that every reason is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from toolchain.backends.openvino.runtime import STEP_TOKENS
from toolchain.errors import PlanError
from toolchain.family import LlamaConfig, RopeScaling, published
from toolchain.planning.decisions import CPU_STEP_TOKENS
from toolchain.planning.plan import Plan, make_plan
from toolchain.recipe import Recipe, parse_recipe
from toolchain.units import GIB


def _llama_13b() -> LlamaConfig:
    config = published("meta-llama/Llama-2-13b-chat-hf")
    assert config is not None
    return config


LLAMA_13B = _llama_13b()
SMALL = replace(LLAMA_13B, hidden_size=1024, intermediate_size=2048, num_layers=4, num_heads=8, num_kv_heads=4)


def recipe(text: str) -> Recipe:
    return parse_recipe(f"model: some/folder\n{text}", Path("mine.yaml"))


def plan(text: str, config: LlamaConfig = LLAMA_13B) -> Plan:
    return make_plan(recipe(text), config)


def refusal(text: str, config: LlamaConfig = LLAMA_13B) -> tuple[str, str]:
    with pytest.raises(PlanError) as caught:
        plan(text, config)
    return caught.value.message, caught.value.hint


def decided(made: Plan, name: str) -> object:
    return next(decision.value for decision in made.decisions if decision.name == name)


@pytest.mark.parametrize("card", ["rtx3090", "t4", "a10g", "a100-40gb", "a100-80gb"])
def test_plan_refuses_fp8_below_sm_89_and_names_int4(card: str) -> None:
    message, hint = refusal(f"device: {card}\nquantization: {{weights: fp8}}\nlimits: {{max_input_len: 256}}")
    assert "FP8, which begins with SM 8.9" in message
    assert "weights: int4" in hint


def test_plan_refuses_fp8_kv_below_sm_89() -> None:
    message, hint = refusal("device: a100\nkv_cache: {dtype: fp8}")
    assert message.startswith("mine: ")
    assert "kv_cache.dtype fp8: the A100 80GB (SM 8.0) has no FP8" in message
    assert "fp16 or int8" in hint


def test_plan_tells_every_reason_at_once() -> None:
    message, hint = refusal(
        "device: rtx3090\nbackend: openvino\nquantization: {weights: fp8}\nkv_cache: {dtype: fp32}\n"
        "limits: {max_seq_len: 9000}\nparallel: {tp: 3}\nservices: 3"
    )
    for part in ("backend openvino", "weights fp8", "dtype fp32", "max_seq_len 9000", "tp 3", "memory"):
        assert part in message, part
    assert message.count("\n  - ") == 6
    assert "Use tp: 1, 2, 4, 5, 8" in hint


def test_plan_allows_fp8_kv_with_int4_weights_and_turns_paged_context_attention_off() -> None:
    made = plan("device: rtx4090\nquantization: {weights: int4}\nkv_cache: {dtype: fp8}")
    assert not made.paged_context_fmha
    assert decided(made, "paged_context_fmha") is False
    both = plan("device: rtx4090\nquantization: {weights: fp8}\nkv_cache: {dtype: fp8}")
    assert both.paged_context_fmha


def test_plan_turns_paged_context_attention_off_for_int8_kv() -> None:
    assert not plan("device: a100\nquantization: {weights: int4}\nkv_cache: {dtype: int8}").paged_context_fmha


T4 = "device: t4\nquantization: {weights: int4}\nlimits: {max_batch_size: 4, max_seq_len: 2048, max_input_len: 1024}\n"


def test_plan_computes_a_bfloat16_model_in_float16_on_a_t4_and_warns() -> None:
    made = plan(T4, replace(LLAMA_13B, dtype="bfloat16"))
    assert made.dtype == "float16"
    assert any("65504" in warning for warning in made.warnings)
    reason = next(decision.reason for decision in made.decisions if decision.name == "dtype")
    assert "the engine computes in float16" in reason
    assert not any("convert" in text for text in (reason, *made.warnings))
    assert plan("device: l4\nquantization: {weights: fp8}", replace(LLAMA_13B, dtype="bfloat16")).dtype == "bfloat16"


def test_plan_pins_a_t4_to_its_last_release_without_fused_attention() -> None:
    made = plan(T4)
    assert made.release is not None
    assert made.release.version == "0.13.0"
    assert (made.context_fmha, made.paged_context_fmha) == (False, False)
    assert any(line.name == "attention workspace" for line in made.memory.lines)
    assert any("75-real" in warning for warning in made.warnings)


def test_plan_refuses_a_newer_release_on_a_t4() -> None:
    message, hint = refusal(T4 + "tensorrt_llm: 1.2.1")
    assert "1.2.1 does not support SM 75" in message
    assert "0.12.0, 0.13.0" in hint


def test_plan_refuses_long_prompts_on_a_t4_and_says_what_would_fit() -> None:
    message, hint = refusal("device: t4\nquantization: {weights: int4}\nlimits: {max_batch_size: 8}")
    assert "attention workspace" in message
    found = dict(part.split(": ") for part in hint.removeprefix("Any one of these would fit: ").split("; "))
    for key, value in found.items():
        limits = {"max_batch_size": "8", key: value.split(" (")[0]}
        plan("device: t4\nquantization: {weights: int4}\nlimits: " + json.dumps(limits).replace('"', ""))
    assert "max_input_len" in found


def test_without_fused_attention_a_step_holds_the_longest_prompt() -> None:
    made = plan(T4.replace("max_input_len: 1024", "max_input_len: 1024, max_num_tokens: 512"))
    assert made.limits.max_num_tokens == 1024


def test_plan_serves_an_rtx_5090_with_llmapi_and_builds_an_engine_where_that_is_asked_for() -> None:
    made = plan("device: RTX 5090\nquantization: {weights: fp8}")
    assert (made.backend, made.release and made.release.version) == ("tensorrt_llmapi", "1.2.1")
    reason = next(decision.reason for decision in made.decisions if decision.name == "backend")
    assert "goes on after 1.2.1" in reason
    engine = plan("device: rtx5090\nbackend: tensorrt_engine\nquantization: {weights: fp8}")
    assert (engine.backend, engine.release and engine.release.version) == ("tensorrt_engine", "1.2.1")


@pytest.mark.parametrize("backend", ["tensorrt_engine", "tensorrt_llmapi"])
def test_plan_refuses_int4_on_an_rtx_5090_with_either_backend(backend: str) -> None:
    message, hint = refusal(f"device: rtx5090\nbackend: {backend}\nquantization: {{weights: int4}}")
    assert "the RTX 5090 (SM 12.0) has no int4 kernels" in message
    assert "weights: fp8" in hint


def test_plan_refuses_a_release_that_does_not_list_the_quantization_on_the_sm() -> None:
    text = "device: rtx5090\nbackend: tensorrt_engine\nquantization: {weights: %s}\ntensorrt_llm: 0.19.0"
    message, hint = refusal(text % "int8")
    assert "0.19.0 does not list int8 on SM 120" in message
    assert "1.0.0, 1.0.3.2510, 1.1.0, 1.2.0, 1.2.1" in hint
    made = plan(text % "fp8")
    assert made.release is not None
    assert made.release.version == "0.19.0"


LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
W4A8 = "quantization: {weights: int4_fp8}\nlimits: {max_input_len: 1024, max_seq_len: 2048}\n"


def test_plan_refuses_a_release_that_does_not_read_the_checkpoint_and_names_those_that_do() -> None:
    """release-notes.md, 0.16.0: W4A8 of bfloat16 models on Ada (SM 89)."""
    model = replace(LLAMA_13B, dtype="bfloat16")
    message, hint = refusal(f"device: l4\ntensorrt_llm: 0.15.0\n{W4A8}", model)
    assert "TensorRT-LLM 0.15.0 does not read this model's checkpoint: W4A8 (int4_fp8) of a bfloat16 model" in message
    assert "read from 0.16.0 on" in message
    assert "runs on: 0.16.0, 0.17.0" in hint
    for text, config in (
        (f"device: l4\n{W4A8}", model),
        (f"device: l4\ntensorrt_llm: 0.16.0\n{W4A8}", model),
        (f"device: l4\ntensorrt_llm: 0.15.0\n{W4A8}", replace(model, dtype="float16")),
        (f"device: l4\ntensorrt_llm: 0.15.0\n{W4A8}", replace(model, dtype="float32")),
        (f"device: h100\ntensorrt_llm: 0.15.0\n{W4A8}", model),
        ("device: l4\ntensorrt_llm: 0.15.0\nquantization: {weights: fp8}\nlimits: {max_seq_len: 2048}", model),
    ):
        assert plan(text, config).release is not None


@pytest.mark.parametrize(
    ("pin", "config", "told"),
    [
        ("0.13.0", replace(SMALL, rope_scaling=LLAMA3), ""),
        ("0.13.0", replace(SMALL, rope_scaling=replace(LLAMA3, factor=32.0)), "as in Llama 3.2"),
        ("0.15.0", replace(SMALL, rope_scaling=replace(LLAMA3, factor=32.0)), ""),
        ("0.13.0", replace(SMALL, rope_scaling=RopeScaling("linear", 32.0)), ""),
        (
            "0.14.0",
            replace(SMALL, architecture="Qwen2ForCausalLM", tied_embeddings=True),
            "whose head is its embedding",
        ),
        ("0.14.0", replace(SMALL, architecture="Qwen2ForCausalLM"), ""),
        ("0.14.0", replace(SMALL, tied_embeddings=True), ""),
        ("0.12.0", replace(SMALL, head_dim=128), ""),
    ],
)
def test_plan_warns_where_nobody_knows_whether_the_release_reads_the_checkpoint(
    pin: str, config: LlamaConfig, told: str
) -> None:
    made = plan(f"device: a100\ntensorrt_llm: {pin}", config)
    found = [warning for warning in made.warnings if "is not confirmed" in warning]
    assert len(found) == bool(told)
    assert told in "".join(found)


def test_a_model_that_the_newest_release_reads_has_no_such_warning_with_llmapi_either() -> None:
    config = replace(SMALL, rope_scaling=replace(LLAMA3, factor=32.0))
    for text in ("device: l4", "device: l4\nbackend: tensorrt_llmapi"):
        assert not [warning for warning in plan(text, config).warnings if "is not confirmed" in warning]


@pytest.mark.parametrize(
    ("text", "config", "told"),
    [
        ("parallel: {tp: 5}", LLAMA_13B, "intermediate_size 13824 does not divide by tp 5"),
        (
            "quantization: {weights: int8}\nparallel: {tp: 8}",
            replace(LLAMA_13B, intermediate_size=13824 - 256),
            "mlp.fc is 1696 by 5120 on each of 8 ranks, and W8A16 needs multiples of 64 and 512",
        ),
        (
            "quantization: {weights: int4}",
            replace(LLAMA_13B, num_kv_heads=1, head_dim=48),
            "attention.qkv is 2016 by 5120 on each of 1 ranks, and W4A16_AWQ needs multiples of 128 and 128",
        ),
    ],
)
def test_plan_refuses_shapes_that_the_builder_does_not_take_before_anything_is_quantized(
    text: str, config: LlamaConfig, told: str
) -> None:
    message, _ = refusal(f"device: h100\n{text}", config)
    assert told in message


@pytest.mark.parametrize(("weights", "tp"), [("int4", 4), ("int8", 8), ("fp8", 8), ("none", 8), ("int4_fp8", 4)])
def test_plan_takes_llama_2_13b_over_as_many_ranks_as_its_shapes_allow(weights: str, tp: int) -> None:
    """13824 = 2^9 x 27: groups of 128 divide over 4 ranks, and a dimension of 64 over 8."""
    assert plan(f"device: h100\nquantization: {{weights: {weights}}}\nparallel: {{tp: {tp}}}").tp == tp


def test_plan_refuses_groups_of_128_of_llama_2_13b_over_eight_ranks() -> None:
    message, _ = refusal("device: h100\nquantization: {weights: int4}\nparallel: {tp: 8}")
    assert "13824 input features over tp 8" in message


def test_plan_says_that_the_builder_rounds_int8_weights_again_and_what_it_holds_meanwhile() -> None:
    """12,687,769,600 of Llama-2-13B's parameters are in its linear layers: 23.63 GiB at 16 bits."""
    text = "device: a100\nquantization: {weights: int8}\n"
    for more, held in (("", "23.63 GiB"), ("parallel: {tp: 2}\n", "11.82 GiB")):
        made = plan(text + more)
        assert decided(made, "int8 rows") == "rounded again by trtllm-build"
        told = next(warning for warning in made.warnings if "amax/128" in warning)
        assert f"{held} of 16-bit matrices for each rank" in told
        assert ("lack the largest code are rounded anew" in told) == ("tp" in more)
    for other in ("device: cpu\nquantization: {weights: int8}", "device: a100\nquantization: {weights: int8_sq}"):
        assert not [warning for warning in plan(other).warnings if "amax/128" in warning]


@pytest.mark.parametrize("pin", ["1.3.0", "1.4.0"])
def test_plan_says_that_1_3_has_no_engine_path_and_offers_llmapi(pin: str) -> None:
    message, hint = refusal(f"device: l4\nquantization: {{weights: fp8}}\ntensorrt_llm: {pin}")
    assert "1.3 and later have no engine path" in message
    assert "15907" in message
    assert "1.2.1" in hint
    assert "backend: tensorrt_llmapi" in hint


def test_plan_takes_no_release_whose_image_is_not_confirmed_for_llmapi_either() -> None:
    text = "device: l4\nbackend: tensorrt_llmapi\nquantization: {weights: fp8}\ntensorrt_llm: 1.3.0"
    message, hint = refusal(text)
    assert "no stable release and image of it is confirmed" in message
    assert "1.2.1" in hint


def test_plan_does_not_offer_a_t4_the_runtime_that_it_cannot_run() -> None:
    message, hint = refusal(T4 + "tensorrt_llm: 1.3.0")
    assert "no engine path" in message
    assert "llmapi" not in hint


FP8_BOTH = "quantization: {weights: fp8}\nkv_cache: {dtype: fp8}\n"


@pytest.mark.parametrize(
    ("device", "release", "paged"),
    [("l4", "0.12.0", False), ("l4", "0.13.0", True), ("h100", "0.12.0", True), ("rtx5090", "1.2.1", False)],
)
def test_plan_turns_paged_context_attention_on_over_fp8_kv_only_where_fp8_attention_is_confirmed(
    device: str, release: str, paged: bool
) -> None:
    made = plan(f"device: {device}\nbackend: tensorrt_engine\ntensorrt_llm: {release}\n{FP8_BOTH}")
    assert made.paged_context_fmha is paged
    reason = next(decision.reason for decision in made.decisions if decision.name == "paged_context_fmha")
    assert ("force FP8 attention" in reason) is not paged


def test_plan_refuses_int8_kv_with_llmapi() -> None:
    message, hint = refusal("device: h100\nbackend: tensorrt_llmapi\nkv_cache: {dtype: int8}")
    assert "llmapi has no such cache" in message
    assert "fp16 or fp8" in hint


def test_plan_refuses_openvino_on_a_gpu_and_an_engine_on_a_cpu() -> None:
    assert "openvino does not run on the H100" in refusal("device: h100\nbackend: openvino")[0]
    assert "tensorrt_engine does not run on the CPU" in refusal("device: cpu\nbackend: tensorrt_engine")[0]
    assert "no TensorRT-LLM runs on the CPU" in refusal("device: cpu\ntensorrt_llm: 1.2.1")[0]


def test_plan_takes_fp32_kv_on_a_cpu_only() -> None:
    assert plan("device: cpu\nkv_cache: {dtype: fp32}").kv.name == "fp32"
    assert "32-bit KV cache" in refusal("device: l4\nquantization: {weights: fp8}\nkv_cache: {dtype: fp32}")[0]


def test_plan_refuses_groups_that_do_not_divide_and_offers_those_that_do() -> None:
    config = replace(SMALL, intermediate_size=2048 + 64)
    message, hint = refusal("device: l4\nquantization: {weights: int4}", config)
    assert "mlp.down_proj's 2112 input features" in message
    assert hint == "Use group_size: 64"
    assert plan("device: l4\nquantization: {weights: int4, group_size: 64}", config).group_size == 64


def test_plan_takes_groups_of_32_on_a_cpu_and_never_offers_them_for_tensorrt() -> None:
    assert plan("device: cpu\nquantization: {weights: int4, group_size: 32}").group_size == 32
    for backend in ("tensorrt_engine", "tensorrt_llmapi"):
        asked = f"device: h100\nbackend: {backend}\nquantization: {{weights: int4, group_size: 32}}"
        message, hint = refusal(asked)
        assert "quantization.group_size 32: TensorRT-LLM" in message
        assert "Use group_size: 128 or 64" in hint
    narrow = replace(SMALL, intermediate_size=2048 + 32)
    assert "group_size" not in refusal("device: l4\nquantization: {weights: int4}", narrow)[1]
    assert refusal("device: cpu\nquantization: {weights: int4}", narrow)[1] == "Use group_size: 32"


def test_plan_counts_groups_per_rank_where_the_input_is_split() -> None:
    # 13824 / 8 = 1728 = 13.5 groups of 128 (TensorRT-LLM quantization/layers.py)
    message, _ = refusal("device: a100\nquantization: {weights: int4}\nparallel: {tp: 8}")
    assert "13824 input features over tp 8" in message
    assert plan("device: a100\nquantization: {weights: int4}\nparallel: {tp: 4}").tp == 4


def test_plan_refuses_splits_that_do_not_come_out_even() -> None:
    assert "3 does not divide the model's 40 heads" in refusal("device: h100\nparallel: {tp: 3}")[0]
    assert "3 does not divide the model's 40 layers" in refusal("device: h100\nparallel: {pp: 3}")[0]
    assert "a CPU service is not split" in refusal("device: cpu\nparallel: {tp: 2}")[0]


def test_splitting_over_two_cards_makes_16_bits_fit() -> None:
    assert "memory" in refusal("device: rtx4090")[0]
    assert plan("device: rtx4090\nparallel: {tp: 2}").memory.fits
    assert plan("device: rtx4090\nparallel: {pp: 2}").memory.fits


def test_plan_says_by_how_much_it_does_not_fit_and_every_offer_fits() -> None:
    message, hint = refusal("device: rtx4090")
    assert "MiB more than the RTX 4090 has, 24564 MiB" in message
    assert "MLP weights: 15.82 GiB" in message
    assert "weights: fp8" in hint
    assert "weights: int4" in hint
    for weights in ("fp8", "int4"):
        assert plan(f"device: rtx4090\nquantization: {{weights: {weights}}}").memory.fits
    assert "services: 2" in refusal("device: a100\nservices: 4")[1]


def test_what_would_fit_stands_with_the_sequences_that_it_holds() -> None:
    message, hint = refusal("device: rtx4090\nlimits: {max_num_tokens: 4096}")
    assert message.startswith("mine: this recipe cannot run: memory: unquantized weights and fp16 KV need ")
    (fp8,) = (part for part in hint.split("; ") if part.startswith(("weights: fp8", "Any one of these would fit: w")))
    made = plan("device: rtx4090\nquantization: {weights: fp8}\nlimits: {max_num_tokens: 4096}")
    count = made.memory.sequences_at_full_length
    assert fp8.endswith(f"({count} sequences of 4096 tokens)")


def test_two_changes_are_offered_where_no_single_one_fits() -> None:
    text = "device: t4\nlimits: {max_batch_size: 4, max_seq_len: 4096, max_input_len: 512, max_num_tokens: 2048}\n"
    _, hint = refusal(text + "services: 2")
    assert hint.startswith("Nothing that a recipe can change")
    _, hint = refusal("device: t4\nlimits: {max_batch_size: 4, max_seq_len: 4096, max_num_tokens: 4096}")
    offers = hint.removeprefix("Any one of these would fit: ").split("; ")
    assert offers
    for offer in offers:
        weights, second = offer.split(" (")[0].removeprefix("weights: ").split(" with ")
        key, value = second.split(": ")
        limits = {"max_batch_size": 4, "max_seq_len": 4096, "max_num_tokens": 4096, key: value}
        said = ", ".join(f"{name}: {number}" for name, number in limits.items() if name.startswith("max_"))
        kv = value if key == "kv_cache dtype" else "fp16"
        text = f"device: t4\nquantization: {{weights: {weights}}}\nkv_cache: {{dtype: {kv}}}\nlimits: {{{said}}}"
        assert plan(text).memory.fits


def test_reserve_of_a_recipe_is_kept_free_and_named_where_nothing_else_helps() -> None:
    text = "device: rtx4090\nquantization: {weights: fp8}\nkv_cache: {dtype: fp8}\nlimits: {max_batch_size: 16}\n"
    assert plan(text + "reserve: 600MiB").max_kv_tokens < plan(text).max_kv_tokens
    assert "no reserve (" in refusal(text + "reserve: 10GiB")[1]


def test_plan_checks_a_cpu_against_the_memory_that_it_is_told() -> None:
    mine = recipe("device: cpu\nquantization: {weights: int4}")
    assert make_plan(mine, LLAMA_13B, host_memory_bytes=32 * GIB).memory.available == 32 * GIB
    with pytest.raises(PlanError, match="more than the CPU has"):
        make_plan(mine, LLAMA_13B, host_memory_bytes=8 * GIB)


def test_plan_refuses_a_cache_that_holds_no_full_sequence() -> None:
    message, _ = refusal("device: h100\nkv_cache: {size: 1GiB}")
    assert "kv_cache.size holds 1310 tokens, not one sequence of 4096" in message


def test_length_defaults_to_what_the_model_knows_with_linear_scaling_counted() -> None:
    assert plan("device: h100").limits.max_seq_len == 4096
    stretched = replace(LLAMA_13B, rope_scaling=RopeScaling("linear", 2.0))
    assert plan("device: h100", stretched).limits.max_seq_len == 8192
    llama3 = replace(SMALL, max_position_embeddings=131072, rope_scaling=RopeScaling("llama3", 8.0))
    assert plan("device: h100", llama3).limits.max_seq_len == 131072


def test_a_step_never_holds_more_than_all_sequences_can() -> None:
    made = plan("device: h100\nlimits: {max_batch_size: 1, max_seq_len: 512}")
    assert made.limits.max_num_tokens == 512
    assert plan("device: h100").limits.max_num_tokens == 8192


def test_a_step_on_a_cpu_is_as_short_as_its_backend_makes_it() -> None:
    assert CPU_STEP_TOKENS == STEP_TOKENS
    assert plan("device: cpu\nquantization: {weights: int4}").limits.max_num_tokens == CPU_STEP_TOKENS
    for asked, made in ((64, 64), (2048, CPU_STEP_TOKENS)):
        assert plan(f"device: cpu\nlimits: {{max_num_tokens: {asked}}}").limits.max_num_tokens == made


def test_plan_refuses_bf16_arithmetic_with_an_fp32_cache() -> None:
    text = "device: cpu\nkv_cache: {dtype: fp32}\ncpu: {precision: %s}"
    assert "cpu.precision bf16" in refusal(text % "bf16")[0]
    assert decided(plan(text % "auto"), "precision") == "f32"


def test_plan_rounds_activations_of_integer_weights_alone_and_only_on_a_cpu() -> None:
    text = "device: %s\nquantization: {weights: %s}\ncpu: {activations: int8}"
    made = plan(text % ("cpu", "int4, group_size: 64"))
    assert (decided(made, "activations"), made.activation_group) == ("int8", 64)
    assert plan(text % ("cpu", "int8")).activation_group == 128
    assert plan("device: cpu\nquantization: {weights: int4}").activation_group == 0
    assert "not of fp8" in refusal(text % ("cpu", "fp8"))[0]


FP8 = "device: rtx4090\nquantization: {weights: fp8}\n"
AWQ = "device: cpu\nquantization: {weights: int4, method: awq}\n"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (AWQ, "method awq needs each linear layer's inputs"),
        ("device: l4\nquantization: {weights: int4, method: gptq}", "method gptq needs the second moments"),
        (FP8, "fp8 weights needs the largest input of each linear layer"),
        (
            "device: a100\nquantization: {weights: int4}\nkv_cache: {dtype: int8}",
            "int8 KV needs the largest key and value",
        ),
        ("device: h100\nkv_cache: {dtype: fp8}", "fp8 KV needs the largest key and value"),
        ("device: RTX 5090\nquantization: {weights: fp8}", "fp8 weights needs"),
        ("device: a100\nquantization: {weights: int8_sq}", "int8_sq weights needs the largest input of each channel"),
        ("device: cpu\nquantization: {weights: int8_sq}", "int8_sq weights needs the largest input of each channel"),
        ("device: l4\nquantization: {weights: int4_fp8}", "int4_fp8 weights needs each linear layer's inputs"),
        ("device: cpu\nquantization: {weights: int4_fp8}", "int4_fp8 weights needs each linear layer's inputs"),
        ("device: a100\nquantization: {weights: int8}\nkv_cache: {dtype: int8}", "int8 KV needs the largest key"),
    ],
)
def test_plan_calibrates_where_a_method_or_a_static_scale_needs_it_and_says_why(text: str, why: str) -> None:
    made = plan(text)
    assert made.calibrates
    reason = next(decision.reason for decision in made.decisions if decision.name == "calibration")
    assert why in reason
    assert "64 rows of 256 tokens" in reason
    assert decided(made, "calibration") == "builtin"
    assert not any("calibrated" in warning for warning in made.warnings)


@pytest.mark.parametrize(
    "text",
    [
        "device: cpu\nquantization: {weights: int4}\nkv_cache: {dtype: int8}",
        "device: cpu\nquantization: {weights: fp8}",
        "device: l4\nquantization: {weights: int4}",
        "device: t4\nquantization: {weights: int8}\nlimits: {max_seq_len: 512, max_batch_size: 1}",
        "device: cpu\nquantization: {weights: int8}",
        "device: h100",
    ],
)
def test_plan_calibrates_nothing_where_scales_are_made_while_running_or_not_needed(text: str) -> None:
    made = plan(text)
    assert not made.calibrates
    assert decided(made, "calibration") is None
    assert set(made.slice("quantize")) == {"weights", "group_size", "scales", "kv"}


def test_plan_warns_where_the_recipes_calibration_does_nothing() -> None:
    assert plan(f"{FP8}calibration: {{samples: 8}}").warnings == ()
    for text in (
        "device: h100\ncalibration: {samples: 8}",
        "device: l4\nquantization: {weights: int4, propagate: clean}",
    ):
        assert any("nothing here is calibrated" in warning for warning in plan(text).warnings)


def test_plan_still_warns_of_int8_kv_on_gpus() -> None:
    made = plan("device: a100\nquantization: {weights: int4}\nkv_cache: {dtype: int8}")
    assert any("INT8 KV is a common cause of bad text" in warning for warning in made.warnings)


def test_plan_refuses_samples_that_are_longer_than_the_model_knows() -> None:
    message, hint = refusal(AWQ + "calibration: {tokens: 5000}")
    assert "calibration.tokens 5000: the model knows 4096 positions" in message
    assert hint == "Use tokens: 4096"


def test_checkpoint_of_a_calibrated_recipe_depends_on_how_it_is_calibrated() -> None:
    assert plan(AWQ + "calibration: {samples: 8}").slice("quantize") == {
        "weights": "int4",
        "group_size": 128,
        "scales": "mse",
        "kv": "fp16",
        "method": "awq",
        "clip": False,
        "fp8_scales": None,
        "propagate": "clean",
        "calibration": {"data": "builtin", "samples": 8, "tokens": 256, "chat_template": True},
    }
    fp8 = plan(FP8).slice("quantize")
    assert (fp8["method"], fp8["clip"], fp8["fp8_scales"]) == (None, None, "shared")


def test_separate_fp8_scales_change_the_checkpoint_also_where_nothing_is_calibrated() -> None:
    text = "device: cpu\nquantization: {weights: fp8%s}"
    shared, separate = (plan(text % extra).slice("quantize") for extra in ("", ", fp8_scales: separate"))
    assert separate == {**shared, "fp8_scales": "separate"}
    assert decided(plan(text % ", fp8_scales: separate"), "fp8_scales") == "separate"


def test_checkpoint_depends_on_smoothquants_alpha() -> None:
    text = "device: a100\nquantization: {weights: int8_sq%s}"
    half, more = (plan(text % extra).slice("quantize") for extra in ("", ", smoothquant_alpha: 0.8"))
    assert half["smoothquant_alpha"] == 0.5
    assert more == {**half, "smoothquant_alpha": 0.8}
    assert (half["method"], half["group_size"]) == (None, None)
    assert decided(plan(text % ""), "smoothquant_alpha") == 0.5


@pytest.mark.parametrize("weights", ["int8_sq", "int4_fp8"])
def test_plan_says_that_a_cpu_does_not_round_activations(weights: str) -> None:
    made = plan(f"device: cpu\nquantization: {{weights: {weights}}}")
    assert decided(made, "activations") == "16 or 32 bits"
    assert any(f"{weights} also rounds the inputs" in warning for warning in made.warnings)
    there = plan(f"device: l4\nquantization: {{weights: {weights}}}")
    assert decided(there, "activations") == {"int8_sq": "int8", "int4_fp8": "fp8"}[weights]
    assert not any("rounds the inputs" in warning for warning in there.warnings)


def test_plan_refuses_what_a_device_or_a_backend_does_not_multiply() -> None:
    limits = "\nlimits: {max_seq_len: 512, max_batch_size: 1}"
    assert "SM 8.0" in refusal("device: t4\nquantization: {weights: int8_sq}" + limits)[0]
    assert "FP8, which begins with SM 8.9" in refusal("device: a100\nquantization: {weights: int4_fp8}")[0]
    llmapi = "device: l4\nbackend: tensorrt_llmapi\nquantization: {weights: %s}"
    for weights in ("int8", "int8_sq"):
        assert f"TensorRT-LLM llmapi takes no {weights} weights" in refusal(llmapi % weights)[0]
    assert plan(llmapi % "int4_fp8").weights.quant_algo == "W4A8_AWQ"


def test_plan_warns_of_int8_kernels_on_a_t4() -> None:
    made = plan("device: t4\nquantization: {weights: int8}\nlimits: {max_seq_len: 512, max_batch_size: 1}")
    assert any("their int8 kernels give errors or garbage on it" in warning for warning in made.warnings)


def test_plan_offers_no_finer_groups_where_there_are_none() -> None:
    config = replace(LLAMA_13B, intermediate_size=13824 + 64)
    message, hint = refusal("device: l4\nquantization: {weights: int4_fp8}", config)
    assert "group_size 128 does not divide" in message
    assert "group_size" not in hint


def test_plan_has_no_warning_for_a_cpu() -> None:
    made = plan("device: cpu\nquantization: {weights: int4}\nkv_cache: {dtype: int8}")
    assert made.warnings == ()
    assert made.release is None
    assert made.backend == "openvino"


def test_every_decision_has_a_reason_and_the_rules_have_a_source() -> None:
    made = plan(T4 + "kv_cache: {dtype: int8}")
    names = [decision.name for decision in made.decisions]
    assert len(names) == len(set(names))
    assert all(decision.reason for decision in made.decisions)
    sourced = {decision.name for decision in made.decisions if decision.source}
    assert {"tensorrt_llm", "weights", "kv_cache", "context_fmha", "paged_context_fmha", "max_kv_tokens"} <= sourced


def test_plan_is_plain_json() -> None:
    made = plan("device: rtx4090\nquantization: {weights: fp8}\nkv_cache: {dtype: fp8}")
    again = json.loads(json.dumps(made.to_json()))
    assert again["limits"]["max_seq_len"] == 4096
    assert again["release"] == "1.2.1"
    assert again["memory"]["fits"] is True
    assert again["prices"][0]["source"]


BASE = "device: rtx4090\nquantization: {weights: int4}\nlimits: {max_seq_len: 2048}\n"


@pytest.mark.parametrize(
    ("change", "stale"),
    [
        ("serve: {http_port: 9000}", set()),
        ("description: another one", set()),
        ("limits: {max_seq_len: 1024}", {"build"}),
        ("kv_cache: {max_tokens: 4096}", {"build"}),
        ("kv_cache: {dtype: fp8}", {"quantize", "build"}),
        ("quantization: {weights: int4, scales: modelopt}", {"quantize"}),
        ("quantization: {weights: int4, group_size: 64}", {"quantize", "build"}),
        ("tensorrt_llm: 1.1.0", {"build"}),
        ("quantization: {weights: int4, method: awq}", {"quantize"}),
        ("calibration: {samples: 32}", set()),
        ("services: 1", set()),
    ],
)
def test_only_the_stages_whose_own_inputs_change_become_stale(change: str, stale: set[str]) -> None:
    key = change.split(":")[0]
    before = plan(BASE)
    after = plan("".join(line + "\n" for line in BASE.splitlines() if not line.startswith(key)) + change)
    stages = {"quantize", "build", "package"}
    # a smaller group takes memory from the cache, so its tokens may change too
    ignore = {"max_kv_tokens"} if key == "quantization" else set()
    changed = {
        stage
        for stage in stages
        if any(
            before.slice(stage).get(name) != value for name, value in after.slice(stage).items() if name not in ignore
        )
    }
    assert changed == stale


def test_more_services_with_the_same_cache_need_a_new_repository_only() -> None:
    one, two = (plan(f"{BASE}kv_cache: {{max_tokens: 2048}}\nservices: {services}") for services in (1, 2))
    assert one.slice("package") != two.slice("package")
    for stage in ("quantize", "build"):
        assert one.slice(stage) == two.slice(stage)


def test_checkpoint_keeps_the_models_dtype_whatever_the_engine_computes_in() -> None:
    model = replace(LLAMA_13B, dtype="bfloat16")
    in_16, in_b16 = plan(T4, model), plan(T4.replace("device: t4", "device: l4"), model)
    assert (in_16.dtype, in_b16.dtype) == ("float16", "bfloat16")
    assert in_16.slice("build")["dtype"] == "float16"
    assert in_16.slice("quantize") == in_b16.slice("quantize")
    assert set(in_16.slice("quantize")) == {"weights", "group_size", "scales", "kv"}


def test_package_names_the_recipe_and_the_services_and_leaves_the_rest_to_the_engines_key() -> None:
    assert plan(BASE).slice("package") == {"recipe": "mine", "services": 1}


def test_a_cpus_cache_format_does_not_touch_the_checkpoint() -> None:
    one, other = (
        plan(f"device: cpu\nquantization: {{weights: int4}}\nkv_cache: {{dtype: {d}}}") for d in ("int8", "fp16")
    )
    assert one.slice("quantize") == other.slice("quantize")
    assert one.slice("build") != other.slice("build")


def test_slices_are_plain_json_and_unknown_stages_are_refused() -> None:
    made = plan(BASE)
    for stage in ("quantize", "build", "package"):
        assert json.loads(json.dumps(made.slice(stage))) == made.slice(stage)
    with pytest.raises(ValueError, match="no stage"):
        made.slice("serve")
