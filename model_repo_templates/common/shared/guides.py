"""Guides: what an answer must be, in the tensors of TensorRT-LLM. Only whether a guide can be kept is looked at here;
an engine's compiler has the last word.

``json``: any JSON object or list, without a guide. ``json_schema``: JSON Schema. ``regex``: the whole answer matches.
``ebnf_grammar``: from the rule ``root``. Source: https://github.com/NVIDIA/TensorRT-LLM triton_backend
docs/guided_decoding.md (1.x), and what its compiler xgrammar (https://github.com/mlc-ai/xgrammar) leaves out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from tensors import RefusedError, strings

TYPE, GUIDE = "guided_decoding_guide_type", "guided_decoding_guide"
TYPES = ("json", "json_schema", "regex", "ebnf_grammar")
MOST_BYTES = 2**16
_ANY_JSON = '{"type": ["object", "array"]}'
_NOT_ENFORCED = frozenset(
    (
        "not",
        "if",
        "then",
        "else",
        "uniqueItems",
        "contains",
        "minContains",
        "maxContains",
        "multipleOf",
        "dependentRequired",
        "dependentSchemas",
        "dependencies",
        "unevaluatedProperties",
        "unevaluatedItems",
        "$dynamicRef",
        "$recursiveRef",
    )
)
"""Keywords that xgrammar passes over in silence, so that an answer could be against them."""
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_LITERAL_DOT = re.compile(r"\\\.|\[[^\]^\\\"][^\]\\\"]*\]")
"""A dot that is meant, and a class of plain letters."""
_PLAIN = "[ !#-[\\]-~\xa0-\u07ff\u0800-\ud7ff\ue000-\uffff]"
"""Every letter up to U+FFFF that JSON writes as itself. Beyond, the compiler lets through what is no letter."""
_RANGE = re.compile(r"([^\\])-([^\\])", re.DOTALL)
_MAY_NEED_ESCAPES = re.compile(r"""[."]|\[\^|\\[SDW\\xucbB]""")
_ESCAPED = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]")


def guide(inputs: dict[str, np.ndarray]) -> tuple[str, str] | None:
    """(``"json_schema"``, ``"regex"`` or ``"ebnf_grammar"``; its text); None where nothing is asked for.

    Raises RefusedError, naming the tensor.
    """
    kinds, texts = (strings(inputs.get(name)) for name in (TYPE, GUIDE))
    if not kinds and not texts:
        return None
    if len(kinds) != 1 or kinds[0] not in TYPES:
        raise RefusedError(f"{TYPE}: {', '.join(kinds)[:80] or 'is missing'}, must be one of {', '.join(TYPES)}")
    if kinds[0] == "json":
        return "json_schema", _ANY_JSON
    if len(texts) != 1:
        raise RefusedError(f"{GUIDE}: {kinds[0]} needs one text, not {len(texts)}")
    if len(texts[0].encode(errors="replace")) > MOST_BYTES:
        raise RefusedError(f"{GUIDE}: more than {MOST_BYTES} bytes")
    if kinds[0] == "json_schema":
        return kinds[0], _sound_schema(texts[0])
    if kinds[0] == "regex":
        _check_regex(texts[0])
    return kinds[0], texts[0]


def _sound_schema(text: str) -> str:
    """The schema, to which the compiler's answers are valid. RefusedError for what is no schema, and for keywords that
    an answer would not be held to."""
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise RefusedError(f"{GUIDE}: not JSON: {error}") from None
    except RecursionError:
        raise RefusedError(f"{GUIDE}: the schema is nested too deeply") from None
    try:
        found = [word for word in _keywords(schema) if word in _NOT_ENFORCED]
    except RecursionError:
        raise RefusedError(f"{GUIDE}: the schema is nested too deeply") from None
    if not isinstance(schema, dict):
        raise RefusedError(f"{GUIDE}: a JSON schema is an object")
    if found:
        raise RefusedError(f"{GUIDE}: {found[0]} is not supported: the engine's grammar cannot hold an answer to it")
    return json.dumps(schema)


def _keywords(schema: Any) -> Iterator[str]:
    """Keywords of a schema and of those in it. Names of properties and values that may be given are none."""
    if isinstance(schema, list):
        for one in schema:
            yield from _keywords(one)
    if not isinstance(schema, dict):
        return
    _mend_strings(schema)
    for word, value in schema.items():
        yield word
        reference = value if word == "$ref" else "#"
        if isinstance(reference, str) and not reference.startswith("#"):
            raise RefusedError(f"{GUIDE}: $ref {reference[:80]} leads out of the schema")
        if word == "allOf" and isinstance(value, list) and len(value) > 1:
            raise RefusedError(f"{GUIDE}: allOf of several schemas is not supported")
        if word in _SCHEMAS_BY_NAME and isinstance(value, dict):
            yield from _keywords(list(value.values()))
        elif word not in ("enum", "const", "default", "examples"):
            yield from _keywords(value)


def _mend_strings(schema: dict[str, Any]) -> None:
    """The compiler writes what a ``pattern`` matches between quotes as it is, and lets a string of a certain length
    have control characters. So lengths become a pattern of letters that need no escape, and a pattern that may match
    others is refused."""
    pattern, lengths = schema.get("pattern"), [schema.get(name) for name in ("minLength", "maxLength")]
    if isinstance(pattern, str) and _may_need_escapes(pattern):
        raise RefusedError(
            f"{GUIDE}: pattern {pattern[:80]} is not supported: it may match quotes or backslashes; name the letters "
            "that you want, as in [a-z ]"
        )
    wanted = schema.get("type") == "string" and not {"pattern", "format", "enum", "const"} & set(schema)
    if wanted and any(type(length) is int for length in lengths):
        least, most = (schema.pop(name, "") for name in ("minLength", "maxLength"))
        schema["pattern"] = f"^{_PLAIN}{{{least or 0},{most}}}$"


def _may_need_escapes(pattern: str) -> bool:
    spans = any(low <= quoted <= high for low, high in _RANGE.findall(pattern) for quoted in '"\\')
    return spans or _MAY_NEED_ESCAPES.search(_LITERAL_DOT.sub("x", pattern)) is not None


def _check_regex(text: str) -> None:
    """The compiler passes over anchors in the middle in silence, and keeps those at the ends by itself."""
    plain = _ESCAPED.sub("x", text)
    if "^" in plain[1:] or "$" in plain[:-1]:
        raise RefusedError(f"{GUIDE}: ^ and $ only at the ends: the whole answer matches anyway")
