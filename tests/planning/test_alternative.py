"""Promises about what is offered where a recipe is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from toolchain.errors import PlanError
from toolchain.family import LlamaConfig, published
from toolchain.planning.alternative import alternative, told
from toolchain.planning.load import Load
from toolchain.planning.option import Asked
from toolchain.planning.plan import make_plan
from toolchain.recipe import parse_recipe


def config(size: str) -> LlamaConfig:
    found = published(f"meta-llama/Llama-2-{size}-chat-hf")
    assert found is not None
    return found


def asked(text: str, size: str = "13b") -> Asked:
    return Asked(parse_recipe(f"model: some/folder\n{text}", Path("mine.yaml")), config(size), Load(1024, 256))


@pytest.mark.parametrize(
    "text",
    [
        "device: rtx4090",
        "device: a100\nquantization: {weights: fp8}\nkv_cache: {dtype: fp8}",
        "device: t4\nquantization: {weights: int8_sq}\nlimits: {max_input_len: 1024}",
        "device: l4\nlimits: {max_batch_size: 512}",
    ],
)
def test_what_is_offered_for_a_refused_recipe_really_works_and_stays_on_its_device(text: str) -> None:
    made = asked(text)
    with pytest.raises(PlanError):
        make_plan(made.recipe, made.config)
    found = alternative(made)
    assert found is not None
    assert found.device == made.recipe.device
    assert found.plan is not None
    assert make_plan(found.plan.recipe, made.config).memory.fits
    line = told(found, made.recipe)
    assert f"weights: {found.weights}, kv_cache dtype: {found.kv}" in line
    assert f"{found.sequences} x 4096 tokens" in line
    assert "by our estimate" in line


def test_the_nearest_bits_are_offered_first() -> None:
    found = alternative(asked("device: rtx4090"))
    assert found is not None
    assert found.plan is not None
    assert found.plan.weights.bits == 8
    found = alternative(asked("device: a100\nquantization: {weights: int4}\nkv_cache: {dtype: fp8}"))
    assert found is not None
    assert (found.weights, found.kv) == ("int4", "fp16")


def test_another_device_is_offered_where_nothing_fits_on_this_one() -> None:
    made = asked("device: l4\nquantization: {weights: int4}", "70b")
    found = alternative(made)
    assert found is not None
    assert (found.device, found.weights) == ("a100-40gb", "int4")
    assert "device: a100-40gb" in told(found, made.recipe)


def test_nothing_is_offered_where_a_pin_is_what_nothing_runs() -> None:
    assert alternative(asked("device: l4\nparallel: {tp: 3}")) is None


def test_plan_offers_it_behind_the_rules_own_hints(scalellm, tmp_path):  # type: ignore[no-untyped-def]
    file = tmp_path / "mine.yaml"
    file.write_text("model: meta-llama/Llama-2-13b-chat-hf\ndevice: a100\nquantization: {weights: fp8}\n")
    done = scalellm("plan", "--recipe", file)
    assert done.returncode == 3
    assert "Use weights: int4" in done.stderr
    assert "Nearest that works: weights: int8_sq" in done.stderr
