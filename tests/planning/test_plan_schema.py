"""The published schema of ``scalellm plan --json``, and that what is printed is of it."""

from __future__ import annotations

import json

import pytest

from tests import golden
from toolchain.planning.plan_schema import FILE, ChoiceJson, PlanJson, schema

MODEL = "meta-llama/Llama-2-13b-chat-hf"


def test_the_published_schema_is_what_plan_prints(scalellm, root):
    published = (root / "docs" / FILE).read_text(encoding="utf-8")
    assert json.loads(published) == schema(), f"scalellm plan --schema > docs/{FILE}"
    assert scalellm("plan", "--schema").stdout == published


def test_the_schema_has_every_reference_that_it_makes():
    made = schema()
    named = {word.split('"')[0] for word in json.dumps(made).split("#/$defs/")[1:]}
    assert named <= set(made["$defs"])
    assert {"PlanJson", "ChoiceJson", "OptionJson"} <= named


@pytest.mark.parametrize("name", golden.recipes())
def test_the_plan_of_each_shipped_recipe_is_of_the_schema(name):
    made = {**golden.planned(name, None).to_json(), "build_peaks": []}
    PlanJson.model_validate_json(json.dumps(made))


def test_a_window_and_a_draft_are_in_the_schema(scalellm, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(f"model: {MODEL}\ndevice: h100\nkv_cache: {{window: 1024}}\n")
    told = PlanJson.model_validate_json(scalellm("plan", "--recipe", file, "--json").stdout)
    assert told.window == 1024


def test_a_comparison_is_of_the_schema(scalellm):
    argv = ["--device", "rtx4090,t4,cpu", "--services", "auto", "--slo", "ttft=1s", "--json"]
    told = ChoiceJson.model_validate_json(scalellm("plan", "--model", MODEL, *argv).stdout)
    assert {row.device for row in told.options} == {"rtx4090", "t4", "cpu"}  # type: ignore[attr-defined]
