"""Which guides are taken, and what becomes of a schema; no engine is asked."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from guides import guide
from tensors import RefusedError


def asked(kind: str | None, text: str | None = None) -> tuple[str, str] | None:
    told = {"guided_decoding_guide_type": kind, "guided_decoding_guide": text}
    return guide({name: np.array([[one.encode()]], object) for name, one in told.items() if one is not None})


def schema(found: dict[str, Any]) -> dict[str, Any]:
    result = asked("json_schema", json.dumps(found))
    assert result is not None
    return dict(json.loads(result[1]))


def test_nothing_is_asked_for_by_empty_tensors() -> None:
    assert asked(None) is None
    assert asked("", "") is None


@pytest.mark.parametrize(("kind", "text"), [("json", None), ("json", "whatever")])
def test_json_needs_no_guide(kind: str, text: str | None) -> None:
    found = asked(kind, text)
    assert found is not None
    assert json.loads(found[1]) == {"type": ["object", "array"]}


@pytest.mark.parametrize(("kind", "text"), [(None, "{}"), ("regex", None), ("yaml", "a"), ("json_schema", "true")])
def test_half_a_guide_is_refused(kind: str | None, text: str | None) -> None:
    with pytest.raises(RefusedError, match="guided_decoding_guide"):
        asked(kind, text)


def test_names_of_properties_and_values_are_no_keywords() -> None:
    told = {"properties": {"not": {"enum": ["if", {"contains": 1}]}, "multipleOf": {"const": {"uniqueItems": 1}}}}
    assert schema(told) == told


@pytest.mark.parametrize(
    "told",
    [
        {"items": {"uniqueItems": True}},
        {"$defs": {"a": {"anyOf": [{"if": {}}]}}},
        {"allOf": [{"type": "string"}, {"maxLength": 2}]},
        {"prefixItems": [{"multipleOf": 2}]},
        {"additionalProperties": {"not": {}}},
    ],
)
def test_what_an_answer_would_not_be_held_to_is_refused_wherever_it_stands(told: dict[str, Any]) -> None:
    with pytest.raises(RefusedError, match="not supported"):
        schema(told)


def test_a_schema_that_is_too_deep_is_refused() -> None:
    with pytest.raises(RefusedError, match="too deep"):
        asked("json_schema", '{"items":' * 3000 + "{}" + "}" * 3000)


def test_lengths_of_strings_become_letters_that_need_no_escape() -> None:
    pattern = schema({"type": "string", "minLength": 2, "maxLength": 5})["pattern"]
    assert all(re.search(pattern, text) for text in ("ab", "日本の[]", "Ω x!"))
    assert not any(re.search(pattern, text) for text in ("a", "abcdef", 'a"b', "a\\b", "a\tb", "a\x7f"))
    assert schema({"type": "string", "maxLength": 5, "enum": ["a"]})["maxLength"] == 5


@pytest.mark.parametrize("pattern", ["^[0-9]{3}$", r"a\.b", "[a-z. ]+", r"\d+-\w", "x|y"])
def test_a_pattern_of_plain_letters_stays(pattern: str) -> None:
    assert schema({"type": "string", "pattern": pattern})["pattern"] == pattern


@pytest.mark.parametrize("pattern", [".*", "[^a]", 'x"', r"\S", "[ -~]", "[A-z]", r"a\\b", r"\x22"])
def test_a_pattern_that_may_match_quotes_is_refused(pattern: str) -> None:
    with pytest.raises(RefusedError, match="may match quotes"):
        schema({"type": "string", "pattern": pattern})


@pytest.mark.parametrize("text", ["a^b", "a$b", "x|^y", "(a$)"])
def test_anchors_in_the_middle_are_refused(text: str) -> None:
    with pytest.raises(RefusedError, match="only at the ends"):
        asked("regex", text)


@pytest.mark.parametrize("text", ["^ab$", r"[$^]+\^\$x", "a"])
def test_other_dollars_are_letters(text: str) -> None:
    assert asked("regex", text) == ("regex", text)
