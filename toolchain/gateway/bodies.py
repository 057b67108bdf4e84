"""What a request may say: OpenAI's fields, checked. What is not supported is refused by name, never dropped silently.

Source of fields and ranges: https://platform.openai.com/docs/api-reference (chat, completions), read 2026-11. Besides
them, ``top_k``, ``repetition_penalty`` and ``min_tokens``, which the engines have and which other servers call so too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from toolchain.gateway.failures import ApiError, invalid

_INT32 = 2**31 - 1
Whole = Annotated[int, Field(ge=1, le=_INT32)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
NONE = (None,)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": NONE,
    "best_of": (None, 1),
    "echo": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "metadata": (None, {}),
    "modalities": (None, ["text"]),
    "moderation": NONE,
    "parallel_tool_calls": (None, True, False),
    "prediction": NONE,
    "prompt_cache_key": NONE,
    "prompt_cache_retention": NONE,
    "reasoning_effort": (None, "none"),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": NONE,
    "web_search_options": NONE,
}
"""Fields of OpenAI's that we do not support -> the values with which they ask for nothing."""
_REASONS = dict.fromkeys(
    ("top_logprobs", "logprobs"), "the engine tells the log probability of the token that was taken, not of others"
)
"""Why a number is not taken that OpenAI takes."""


class Body(BaseModel):
    """A JSON object whose keys are all known."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Part(Body):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class Turn(Body):
    """One message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class JsonSchema(Body):
    name: str
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Structure(Body):
    """vLLM's field for what OpenAI has no word for; exactly one of them.

    Source: https://docs.vllm.ai/en/latest/features/structured_outputs.html (read 2026-11).
    """

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Asked(Body):
    """What chats and completions have in common."""

    model: str
    max_tokens: Whole | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = None
    user: str | None = None
    """Has no influence on an answer, at OpenAI neither."""
    safety_identifier: str | None = None
    top_k: Annotated[int, Field(ge=0, le=_INT32)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=_INT32)] | None = None
    response_format: ResponseFormat | None = None
    """OpenAI has it for chats only, vLLM for completions too."""
    structured_outputs: Structure | None = None

    @property
    def answers(self) -> int:
        return self.n or 1

    @property
    def limit(self) -> int | None:
        """Tokens of each answer, if the client says so."""
        return self.max_tokens

    @property
    def stop_words(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class ChatBody(Asked):
    messages: Annotated[list[Turn], Field(min_length=1)]
    max_completion_tokens: Whole | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    """The engines give the probability of the token that was taken, not of others."""

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)


class CompletionBody(Asked):
    prompt: str | list[str]
    logprobs: Annotated[int, Field(ge=0, le=1)] | None = None
    """0 or 1: of the token that was taken; the engines give no others."""

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None


class PredictBody(Body):
    """The classic body of FEDML's ``/predict``."""

    text: str
    model: str | None = None
    """FEDML has none; an adapter is named so."""
    stream: bool | None = None
    max_tokens: Whole | None = None
    max_new_tokens: Whole | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=_INT32)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    guided_decoding_guide_type: str | None = None
    """These two as in KServe's tensors."""
    guided_decoding_guide: str | None = None


AnyBody = TypeVar("AnyBody", bound=Body)


def parse_json(raw: bytes) -> dict[str, Any]:
    """A request's bytes -> its JSON object, whatever its Content-Type says. Raises ApiError (400)."""
    try:
        found = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
        if b"\\ud" in raw.lower():  # half of a surrogate pair is no text
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise invalid(f"the body is not valid Unicode: {error.reason}") from None  # type: ignore[attr-defined]
    except RecursionError:
        raise invalid("the body is nested too deeply") from None
    except ValueError as error:
        raise invalid(f"the body is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise invalid(f"the body must be a JSON object, not {_kind(found)}")
    return found


def read_body(kind: type[AnyBody], found: Mapping[str, Any]) -> AnyBody:
    """A JSON object -> a checked body. Raises ApiError (400) that names every field that is wrong."""
    values = dict(found)
    for name, neutral in NEUTRAL.items():
        if name in values and name not in kind.model_fields:
            value = values.pop(name)
            if not any(type(value) is type(one) and value == one for one in neutral):
                raise invalid(f"{name} is not supported by this server", name, "unsupported_parameter")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _first_of(error) from None


def _first_of(error: ValidationError) -> ApiError:
    """All that is wrong in one message; ``param`` is the first of it."""
    told: dict[str, str] = {}
    for one in error.errors(include_url=False, include_context=False, include_input=False):
        place = [str(part) for part in one["loc"] if not _is_branch(part)]
        name = ".".join(place)
        unknown = one["type"] == "extra_forbidden"
        reason = f": {_REASONS[name]}" if one["type"] == "less_than_equal" and name in _REASONS else ""
        told.setdefault(name, "unrecognized field" if unknown else one["msg"] + reason)
    code = "missing_required_parameter" if error.errors()[0]["type"] == "missing" else None
    message = "; ".join(f"{name}: {why}" for name, why in list(told.items())[:10])
    return invalid(message, next(iter(told)), code)


def _is_branch(part: object) -> bool:
    """pydantic puts the member of a union that it tried into the place."""
    return isinstance(part, str) and (part == "str" or part.startswith(("list[", "dict[", "constrained-")))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _kind(value: object) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null")
