"""What ``/openapi.json`` says of bodies, answers and errors, drawn from the very types that read and write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from openai.types import Completion, Model
from openai.types.chat import ChatCompletion

from toolchain.gateway.metrics import CONTENT_TYPE

Responses = dict[int | str, dict[str, Any]]
"""Of one path, by status, as FastAPI takes them."""


def body_of(kind: type[Any], names: Sequence[str]) -> dict[str, Any]:
    """The request's schema: the body itself is read by us, whatever its Content-Type says."""
    schema = kind.model_json_schema()
    if "model" in schema["properties"]:
        schema["properties"]["model"]["enum"] = [*names, *(() if "model" in schema["required"] else (None,))]
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(schema)}}}}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema without references, since each path has a schema of its own."""
    definitions = schema.pop("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, list):
            return [resolve(one) for one in node]
        if not isinstance(node, dict):
            return node
        reference = node.get("$ref", "")
        if reference.startswith("#/$defs/"):
            return resolve(definitions[reference.removeprefix("#/$defs/")])
        return {name: resolve(value) for name, value in node.items()}

    return dict(resolve(schema))


def _given(schemas: dict[str, Any], text: str = "The answer.") -> Responses:
    """Status 200, by media type."""
    return {200: {"description": text, "content": {kind: {"schema": schema} for kind, schema in schemas.items()}}}


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_EVENTS = {"description": "Server-sent events, each with its text in `data`; the last one is [DONE]."}
_MODEL = _inlined(Model.model_json_schema())
_MODELS = {
    "type": "object",
    "required": ["object", "data"],
    "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": _MODEL}},
}
_GENERATED = {"type": "object", "required": ["generated_text"], "properties": {"generated_text": {"type": "string"}}}

FAILURES: Responses = {
    status: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
    for status, text in {
        400: "The request is wrong, or asks for what is not supported.",
        401: "No valid API key.",
        403: "Asked by a page of another site.",
        404: "No such model.",
        408: "The body came too slowly.",
        413: "The body is too large.",
        429: "Too many requests.",
        502: "The engine's server failed at this request.",
        503: "No engine is there to answer.",
        504: "The request took too long.",
    }.items()
}
KEYED: Responses = {status: FAILURES[status] for status in (401, 429)}
"""Of what only asks for a key."""
CHAT = {
    **FAILURES,
    **_given({"application/json": _inlined(ChatCompletion.model_json_schema()), "text/event-stream": _EVENTS}),
}
COMPLETION = {
    **FAILURES,
    **_given({"application/json": _inlined(Completion.model_json_schema()), "text/event-stream": _EVENTS}),
}
PREDICT = {
    **FAILURES,
    **_given(
        {
            "application/json": {"anyOf": [_GENERATED, {"type": "string"}]},
            "text/event-stream": _EVENTS,
            "text/plain": {"type": "string"},
        }
    ),
}
"""A text where ``--fedml-compat repr`` asks for one, a file for an ``Accept`` that wants no JSON."""
MODELS = {**KEYED, **_given({"application/json": _MODELS})}
MODEL = {**KEYED, 404: FAILURES[404], **_given({"application/json": _MODEL})}
METRICS = {**KEYED, **_given({CONTENT_TYPE: {"type": "string"}}, "Prometheus' text format.")}
