"""Promises about guided decoding: one key for both engines, refused where a release or the recipe excludes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.planning.test_kv_window import LLAMA_13B
from toolchain.errors import PlanError
from toolchain.planning.plan import Plan, make_plan
from toolchain.recipe import parse_recipe


def plan(rest: str) -> Plan:
    recipe = parse_recipe(f"model: m\nguided_decoding: xgrammar\n{rest}", Path("mine.yaml"))
    return make_plan(recipe, LLAMA_13B, draft=LLAMA_13B, host_memory_bytes=2**36)


@pytest.mark.parametrize("rest", ["device: cpu", "device: a100", 'device: a100\ntensorrt_llm: "0.19.0"'])
def test_the_plan_says_what_keeps_answers_to_a_grammar(rest: str) -> None:
    (decision,) = [one for one in plan(rest).decisions if one.name == "guided_decoding"]
    assert decision.value == "xgrammar"


@pytest.mark.parametrize(
    ("rest", "told"),
    [
        ('device: a100\ntensorrt_llm: "0.18.2"', r"0\.18\.2 takes no guides; 0\.19\.0 is the first"),
        ("device: a100\nbackend: tensorrt_llmapi", "PyTorch runtime"),
        ("device: a100\nspeculative: {draft: d}", "guided_decoding with speculative"),
    ],
)
def test_what_cannot_keep_to_a_grammar_is_refused_in_words(rest: str, told: str) -> None:
    with pytest.raises(PlanError, match=told):
        plan(rest)
