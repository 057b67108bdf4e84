"""Promises about the recipes that ship with scalellm: each passes its own plan, and does what its name says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from toolchain import workspace
from toolchain.family import LlamaConfig, published
from toolchain.planning.plan import Plan, make_plan
from toolchain.recipe import SCHEMA_FILE, available, load_recipe, schema

FOLDER = workspace.shipped("recipes")
NAMES = sorted(available([FOLDER]))
MODEL = "meta-llama/Llama-2-13b-chat-hf"


def config_of(model: str) -> LlamaConfig:
    """The published config of the shipped recipes' model; the demo's Llama is of the same family with small shapes."""
    known = published(MODEL)
    assert known is not None
    if model == MODEL:
        return known
    shapes = {"hidden_size": 256, "intermediate_size": 512, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2}
    return replace(known, **shapes, head_dim=64, vocab_size=2048, max_position_embeddings=2048)  # type: ignore[arg-type]


def planned(name: str) -> Plan:
    recipe = load_recipe(name, search=[FOLDER])
    return make_plan(recipe, config_of(recipe.model))


def test_these_recipes_ship() -> None:
    assert set(NAMES) == {"rtx4090", "l4", "t4", "a100", "a100-x3", "h100", "cpu", "tiny", "llama2-13b"}


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipe_passes_its_own_plan(name: str) -> None:
    plan = planned(name)
    assert plan.memory.fits
    assert plan.memory.sequences_at_full_length >= 1
    assert plan.recipe.name == name
    assert plan.recipe.description


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipe_points_editors_to_the_schema_and_explains_itself(name: str) -> None:
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == f"# yaml-language-server: $schema={SCHEMA_FILE}"
    assert sum(line.startswith("# ") for line in lines) >= 3
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    ("name", "device", "weights", "kv", "backend", "release"),
    [
        ("rtx4090", "rtx4090", "fp8", "fp8", "tensorrt_engine", "1.2.1"),
        ("l4", "l4", "fp8", "fp8", "tensorrt_engine", "1.2.1"),
        ("t4", "t4", "int4", "int8", "tensorrt_engine", "0.13.0"),
        ("a100", "a100-80gb", "int4", "int8", "tensorrt_engine", "1.2.1"),
        ("a100-x3", "a100-80gb", "int4", "int8", "tensorrt_engine", "1.2.1"),
        ("h100", "h100", "fp8", "fp8", "tensorrt_engine", "1.2.1"),
        ("cpu", "cpu", "int4", "int8", "openvino", None),
        ("tiny", "cpu", "int4", "int8", "openvino", None),
    ],
)
def test_shipped_recipe_is_planned_as_its_name_says(
    name: str, device: str, weights: str, kv: str, backend: str, release: str | None
) -> None:
    plan = planned(name)
    found = (plan.device.name, plan.weights.name, plan.kv.name, plan.backend)
    assert found == (device, weights, kv, backend)
    assert (plan.release.version if plan.release else None) == release


@pytest.mark.parametrize(
    ("name", "method", "calibrates"),
    [
        ("t4", "awq", True),
        ("a100", "awq", True),
        ("a100-x3", "awq", True),
        ("cpu", "awq", True),
        ("tiny", "rtn", False),
        ("rtx4090", "rtn", True),
        ("l4", "rtn", True),
        ("h100", "rtn", True),
    ],
)
def test_shipped_recipe_is_calibrated_where_that_helps(name: str, method: str, calibrates: bool) -> None:
    plan = planned(name)
    assert plan.recipe.quantization.method == method
    assert plan.calibrates is calibrates
    assert plan.recipe.calibration.data == "builtin"


def test_t4_recipe_computes_in_float16_without_fused_attention() -> None:
    plan = planned("t4")
    assert plan.dtype == "float16"
    assert not plan.context_fmha
    assert plan.limits.max_num_tokens >= plan.limits.max_input_len


def test_three_services_share_one_a100_with_a_cache_each() -> None:
    plan = planned("a100-x3")
    assert plan.services == 3
    cache = next(line for line in plan.memory.lines if line.name == "KV cache")
    assert cache.bytes == 3 * plan.max_kv_tokens * plan.memory.kv_bytes_per_token


def test_published_schema_is_the_one_that_recipes_are_checked_against() -> None:
    text = (FOLDER / SCHEMA_FILE).read_text()
    assert text == json.dumps(schema(), indent=2) + "\n", (
        f"recipe.py changed: write it again with: scalellm recipes schema > {Path('recipes') / SCHEMA_FILE}"
    )
