"""Promises about one recipe for several devices: what is otherwise on one, and what auto becomes."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolchain import workspace
from toolchain.errors import RecipeError
from toolchain.family import published
from toolchain.planning.plan import make_plan
from toolchain.recipe import Recipe, load_recipe, parse_recipe
from toolchain.variant import for_device, settle

TEXT = """\
model: some/model
device: rtx4090
quantization: {weights: auto}
kv_cache: {dtype: auto}
limits: {max_batch_size: 8, max_seq_len: 4096}
per_device:
  t4:
    limits: {max_seq_len: 2048}
    services: 2
"""


def recipe(text: str = TEXT) -> Recipe:
    return parse_recipe(text, Path("many.yaml"))


def test_another_device_keeps_every_key_that_it_does_not_change() -> None:
    made = for_device(recipe(), "t4")
    assert (made.device, made.name, made.model, made.services) == ("t4", "many", "some/model", 2)
    assert (made.limits.max_batch_size, made.limits.max_seq_len) == (8, 2048)
    assert for_device(recipe(), "l4").limits.max_seq_len == 4096


def test_aliases_name_devices_and_the_file_is_remembered() -> None:
    made = for_device(recipe(), "RTX 4090")
    assert made.device == "rtx4090"
    assert (made.text, made.path) == (TEXT, Path("many.yaml"))


@pytest.mark.parametrize(
    ("device", "weights", "method", "kv"),
    [
        ("rtx4090", "fp8", "rtn", "fp8"),
        ("l4", "fp8", "rtn", "fp8"),
        ("h100", "fp8", "rtn", "fp8"),
        ("t4", "int4", "awq", "int8"),
        ("a100-80gb", "int4", "awq", "int8"),
        ("cpu", "int4", "awq", "int8"),
    ],
)
def test_auto_takes_fp8_where_the_device_has_it_and_int4_elsewhere(
    device: str, weights: str, method: str, kv: str
) -> None:
    made, chosen = settle(for_device(recipe(), device))
    assert (made.quantization.weights, made.quantization.method, made.kv_cache.dtype) == (weights, method, kv)
    assert [choice.value for choice in chosen] == [weights, kv]
    assert all(choice.reason.startswith("auto: ") for choice in chosen)


def test_auto_never_takes_an_int8_cache_for_llmapi_which_has_none() -> None:
    made, _ = settle(recipe(TEXT + "backend: tensorrt_llmapi\n").model_copy(update={"device": "a100-80gb"}))
    assert made.kv_cache.dtype == "fp16"


def test_a_recipe_without_auto_is_left_as_it_is() -> None:
    plain = recipe("model: some/model\ndevice: t4\n")
    assert settle(plain) == (plain, ())


def test_an_explicit_method_stays_with_auto() -> None:
    text = TEXT.replace("{weights: auto}", "{weights: auto, method: gptq}")
    assert settle(for_device(recipe(text), "t4"))[0].quantization.method == "gptq"


def test_a_change_that_contradicts_the_rest_is_refused_with_its_key() -> None:
    text = TEXT.replace("{max_seq_len: 2048}", "{max_input_len: 8192}")
    with pytest.raises(RecipeError, match=r"many.yaml: for the t4: limits.max_input_len: 8192 is more than"):
        for_device(recipe(text), "t4")


def test_unknown_devices_are_refused_where_they_stand() -> None:
    with pytest.raises(RecipeError, match="no such device") as caught:
        for_device(recipe(), "rtx9999")
    assert "rtx4090" in caught.value.hint
    with pytest.raises(RecipeError) as caught:
        recipe(TEXT.replace("  t4:", "  t44:"))
    assert any("t44" in problem.message for problem in caught.value.problems)


def test_the_section_for_a_cpu_is_left_out_on_a_gpu() -> None:
    text = "model: some/model\ndevice: cpu\ncpu: {threads: 2}\n"
    assert for_device(recipe(text), "t4").cpu.threads is None
    assert for_device(recipe(text), "cpu").cpu.threads == 2


def test_the_shipped_recipe_for_all_devices_fits_on_each_that_it_names() -> None:
    shipped = load_recipe("llama2-13b", search=[workspace.shipped("recipes")])
    config = published(shipped.model)
    assert config is not None
    plans = {name: make_plan(for_device(shipped, name), config) for name in ("rtx4090", "l4", "t4", "a100-80gb")}
    assert {name: (plan.weights.name, plan.kv.name) for name, plan in plans.items()} == {
        "rtx4090": ("fp8", "fp8"),
        "l4": ("fp8", "fp8"),
        "t4": ("int4", "int8"),
        "a100-80gb": ("int4", "int8"),
    }
    for plan in plans.values():
        assert plan.memory.fits
        assert any(decision.name == "quantization.weights" for decision in plan.decisions)
