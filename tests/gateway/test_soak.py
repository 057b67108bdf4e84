"""What scripts/soak.py calls a fault."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
WHOLE = [
    {"choices": [{"text": "a b", "finish_reason": None}]},
    {"choices": [{"text": "", "finish_reason": "length"}]},
    {"choices": [], "usage": {"completion_tokens": 2}},
]
ASKED = {"prompt": "x", "max_tokens": 2}


@pytest.fixture(scope="module")
def soak() -> Iterator[Any]:
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("soak")
    sys.path.remove(str(SCRIPTS))


@pytest.mark.parametrize(
    ("events", "found"),
    [
        ([*WHOLE, "[DONE]"], None),
        (WHOLE, "without its end"),
        ([*WHOLE[:2], "[DONE]"], "2 tokens were asked for"),
        ([*WHOLE[:1], WHOLE[2], "[DONE]"], "2 tokens were asked for"),
        ([WHOLE[0], {"error": {"message": "gone"}}, "[DONE]"], "failed"),
    ],
)
def test_an_answer_that_is_not_whole_is_found(soak: Any, events: list[Any], found: str | None) -> None:
    lines = [event if isinstance(event, str) else json.dumps(event) for event in events]
    fault = soak.lacking(ASKED, lines, soak.Tally())
    assert (fault is None) if found is None else found in fault


def test_what_is_left_open_and_what_grows_is_found(soak: Any) -> None:
    before = {"gateway": {"files": 10, "threads": 4, "connections": 1}}
    assert soak.left_over(before, before) == []
    after = {"gateway": {"files": 10, "threads": 40, "connections": 9}}
    assert soak.left_over(before, after) == ["gateway: 9 connections, 1 before"]
    assert soak.leaks({"growth": 30.0, "second_quarter": 200.0})
    assert not soak.leaks({"growth": 7.0, "second_quarter": 100.0})
