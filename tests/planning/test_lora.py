"""Promises about adapters beside a model: one key for both engines, refused where something excludes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.planning.test_kv_window import LLAMA_13B
from toolchain.errors import PlanError, RecipeError
from toolchain.planning.build_flags import command
from toolchain.planning.plan import Plan, make_plan
from toolchain.recipe import parse_recipe

ONE = "lora: [{name: a, path: x/a}]"
INT4 = "quantization: {weights: int4}"


def plan(rest: str, lora: str = ONE) -> Plan:
    recipe = parse_recipe(f"model: m\n{lora}\n{rest}", Path("mine.yaml"))
    return make_plan(recipe, LLAMA_13B, draft=LLAMA_13B, host_memory_bytes=2**36)


@pytest.mark.parametrize("rest", [f"device: cpu\n{INT4}", "device: a100-80gb", f"device: a100-80gb\n{INT4}"])
def test_the_plan_names_the_adapters(rest: str) -> None:
    (decision,) = [one for one in plan(rest).decisions if one.name == "lora"]
    assert decision.value == "a"


def test_an_engine_takes_any_adapter_of_its_model() -> None:
    argv = command(plan('device: a100-80gb\ntensorrt_llm: "1.2.1"'), Path("C"), Path("E"))
    start = argv.index("--lora_target_modules")
    assert argv[start + 1 : start + 8] == (
        "attn_q", "attn_k", "attn_v", "attn_dense", "mlp_h_to_4h", "mlp_gate", "mlp_4h_to_h",
    )  # fmt: skip
    assert argv[start + 8].startswith("--")
    assert argv[argv.index("--lora_plugin") + 1] == "float16"
    assert argv[argv.index("--max_lora_rank") + 1] == "64"
    assert "--lora_plugin" not in command(plan("device: a100-80gb", "description: none"), Path("C"), Path("E"))


@pytest.mark.parametrize(
    ("rest", "told"),
    [
        ('device: a100-80gb\ntensorrt_llm: "0.18.2"', r"0\.18\.2 reads no adapters from a folder; 0\.19\.0 is"),
        ("device: a100-80gb\nbackend: tensorrt_llmapi", "PyTorch runtime"),
        ("device: a100-80gb\nspeculative: {draft: d}", "lora with speculative"),
        ("device: cpu\nquantization: {weights: int4, method: awq}", "lora with method awq"),
        ("device: h100\nquantization: {weights: int8_sq}", "lora with weights int8_sq"),
    ],
)
def test_what_excludes_adapters_is_refused_in_words(rest: str, told: str) -> None:
    with pytest.raises(PlanError, match=told):
        plan(rest)


@pytest.mark.parametrize(
    ("lora", "told"),
    [
        ("lora: [{name: a, path: x}, {name: a, path: y}]", "two adapters are called a"),
        ("lora: [{name: a}]", "path"),
        ("lora: [{name: a b, path: x}]", "name"),
        ("lora: [{name: a, path: x, rank: 4}]", "rank"),
    ],
)
def test_a_wrong_list_of_adapters_is_refused_with_its_place(lora: str, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan("device: cpu", lora)
    assert told in "\n".join(str(problem) for problem in caught.value.problems)
