"""What an answer must be: OpenAI's ``response_format`` and vLLM's ``structured_outputs`` -> TensorRT-LLM's guides.

Whether a schema or a regex can be kept, the engine says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from toolchain.gateway.bodies import Asked, ResponseFormat, Structure
from toolchain.gateway.failures import invalid

TYPE, GUIDE = "guided_decoding_guide_type", "guided_decoding_guide"
_OBJECT = json.dumps({"type": "object"})
"""Any object: ``json`` of TensorRT-LLM would allow a list too."""
_SPECIAL = re.compile(r"([\\^$.|?*+()\[\]{}/])")


def guide_of(body: Asked) -> dict[str, Any]:
    """The request's guide as tensors; empty without one. Raises ApiError where there are two."""
    wanted: list[tuple[str, str]] = []
    if body.response_format:
        wanted += _of_format(body.response_format)
    if body.structured_outputs:
        wanted += _of_structure(body.structured_outputs)
        if len(wanted) != 1:
            fields = ", ".join(field.alias or name for name, field in Structure.model_fields.items())
            raise invalid(f"structured_outputs: exactly one of {fields}, and no response_format", "structured_outputs")
    return {TYPE: wanted[0][0], GUIDE: wanted[0][1]} if wanted else {}


def _of_format(asked: ResponseFormat) -> Iterator[tuple[str, str]]:
    if asked.type == "json_object":
        yield "json_schema", _OBJECT
    elif asked.type == "json_schema":
        if asked.json_schema is None:
            raise invalid("response_format.json_schema: is missing", "response_format")
        yield "json_schema", json.dumps(asked.json_schema.schema_)


def _of_structure(asked: Structure) -> Iterator[tuple[str, str]]:
    if asked.json_ is not None:
        yield "json_schema", asked.json_ if isinstance(asked.json_, str) else json.dumps(asked.json_)
    if asked.regex is not None:
        yield "regex", asked.regex
    if asked.choice is not None:
        yield "regex", "|".join(f"({_SPECIAL.sub(_escaped, choice)})" for choice in asked.choice)
    if asked.grammar is not None:
        yield "ebnf_grammar", asked.grammar
    if asked.json_object:
        yield "json_schema", _OBJECT


def _escaped(found: re.Match[str]) -> str:
    return "\\" + found[0]
