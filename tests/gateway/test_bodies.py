"""Promises about what a request may say, and what becomes of it, without any server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain.chat import ChatTemplate
from toolchain.gateway.asking import of_chat, of_completion, of_predict
from toolchain.gateway.bodies import NEUTRAL, ChatBody, CompletionBody, PredictBody, parse_json, read_body
from toolchain.gateway.failures import ApiError, BusyError, UpstreamError, of_triton
from toolchain.gateway.settings import Limits, Model

MODEL = Model(
    "parrot", 0, ChatTemplate("{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
)
CHAT = {"model": "parrot", "messages": [{"role": "user", "content": "Hi"}]}


def chat_inputs(**fields: Any) -> dict[str, Any]:
    return dict(asyncio.run(of_chat(read_body(ChatBody, {**CHAT, **fields}), MODEL, Limits())).inputs)


def refusal(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        chat_inputs(**fields)
    assert caught.value.status == 400
    return caught.value


def refused(ask: Callable[[], Any]) -> ApiError | None:
    try:
        ask()
    except ApiError as error:
        return error
    return None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(JSON, st.sampled_from([ChatBody, CompletionBody, PredictBody]))
def test_any_json_is_a_body_or_a_refusal(value: Any, kind: Any) -> None:
    error = refused(lambda: read_body(kind, parse_json(json.dumps(value).encode())))
    assert error is None or (error.status == 400 and error.message)


@given(st.binary())
def test_any_bytes_are_an_object_or_a_refusal(raw: bytes) -> None:
    error = refused(lambda: parse_json(raw))
    assert error is None or error.status == 400


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[1]",
        b"null",
        b'{"a": NaN}',
        b'{"a": "\\ud800"}',
        b"{" * 10,
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_json(raw)
    assert caught.value.status == 400


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_an_unsupported_field_is_refused_by_name_unless_it_asks_for_nothing(name: str) -> None:
    for neutral in NEUTRAL[name]:
        chat_inputs(**{name: neutral})
    error = refusal(**{name: "something"})
    assert error.param == name
    assert name in error.message


def test_an_unknown_field_is_refused_by_name() -> None:
    assert refusal(temperatur_=1).param == "temperatur_"


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", 2.1), ("temperature", "1"), ("top_p", -0.1), ("n", 0), ("max_tokens", 0), ("max_tokens", 1.5),
     ("max_tokens", True), ("presence_penalty", 3), ("stop", [1]), ("stop", ""), ("stop", ["a"] * 17), ("seed", "x"),
     ("top_logprobs", 2), ("messages", []), ("messages", [{"role": "tool", "content": "x"}]), ("n", 33),
     ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
     ("response_format", {"type": "json_schema"}), ("stream_options", {"include_usage": 1}), ("logit_bias", {"1": 5})],
)  # fmt: skip
def test_a_wrong_value_is_refused_with_the_fields_name(field: str, value: Any) -> None:
    error = refusal(**{field: value})
    assert str(error.param).split(".")[0] == field


def test_more_log_probabilities_than_the_engine_tells_are_refused_with_the_reason() -> None:
    assert "of the token that was taken" in refusal(logprobs=True, top_logprobs=2).message
    with pytest.raises(ApiError, match="of the token that was taken") as caught:
        read_body(CompletionBody, {"model": "m", "prompt": "x", "logprobs": 5})
    assert caught.value.param == "logprobs"


def test_all_that_is_wrong_is_told_at_once() -> None:
    error = refusal(temperature=9, n=-1, colour="red")
    assert all(name in error.message for name in ("temperature", "n:", "colour"))


def test_openai_s_default_is_sampling_with_a_new_seed_each_time() -> None:
    first, second = chat_inputs(), chat_inputs()
    assert (first["temperature"], first["top_p"]) == (1.0, 1.0)
    assert first["seed"] != second["seed"]
    assert "top_k" not in first


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"top_p": 0}, {"top_k": 1}, {"temperature": 0, "top_p": 0.5}])
def test_temperature_zero_is_greedy_and_needs_no_seed(fields: dict[str, Any]) -> None:
    found = chat_inputs(**fields)
    assert found["top_k"] == 1
    assert not {"seed", "temperature", "top_p"} & found.keys()


@pytest.mark.parametrize("seed", [0, -1, 2**63, -(2**70), 10**30])
def test_any_whole_number_is_a_seed_that_triton_takes(seed: int) -> None:
    assert 0 <= chat_inputs(seed=seed)["seed"] < 2**62
    assert chat_inputs(seed=seed)["seed"] == chat_inputs(seed=seed)["seed"]


def test_what_is_not_asked_for_is_not_sent() -> None:
    quiet = chat_inputs(presence_penalty=0, frequency_penalty=0.0, logit_bias={}, n=1, stop=[], repetition_penalty=1)
    assert quiet.keys() == chat_inputs().keys()
    loud = chat_inputs(presence_penalty=0.5, n=2, min_tokens=3, max_completion_tokens=7, max_tokens=9)
    expected = {
        "presence_penalty": 0.5, "num_return_sequences": 2, "min_tokens": 3, "max_tokens": 7,
    }  # fmt: skip
    assert loud | expected == loud


def test_a_conversation_is_written_by_the_models_template_once() -> None:
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
    ]
    assert chat_inputs(messages=messages)["text_input"] == "[system]Be kind.[user]ab[assistant]c"


def test_several_prompts_are_several_requests() -> None:
    body = read_body(CompletionBody, {"model": "parrot", "prompt": ["a", "b"], "n": 2})
    found = of_completion(body, MODEL, Limits())
    assert [request.prompt for request in found] == ["a", "b"]
    assert [request.inputs["max_tokens"] for request in found] == [16, 16]


@pytest.mark.parametrize(("own", "prompt"), [(True, "[user]Hello"), (False, "Hello")])
def test_predict_uses_a_chat_template_only_where_the_model_has_one_and_is_greedy(own: bool, prompt: str) -> None:
    model = MODEL if own else Model("parrot", 0, ChatTemplate(None, {"bos_token": "<s>"}))
    found = asyncio.run(of_predict(read_body(PredictBody, {"text": "Hello"}), model, Limits()))
    assert found.prompt == prompt
    assert found.inputs["top_k"] == 1


@pytest.mark.parametrize(
    ("status", "text", "kind", "param"),
    [
        (400, "max_tokens: must be at least 1", 400, "max_tokens"),
        (400, "in ensemble 'e', Failed to process the request(s) for model instance 'x', message: top_k: no", 400,
         "top_k"),
        (400, "request_output_len (client input max_tokens): 5 and 9, and this engine takes at most 6 together", 400,
         "max_tokens"),
        (400, "embedding_bias: not here (client input embedding_bias_words)", 400, "logit_bias"),
        (500, "Unable to parse 'data': attempt to access JSON non-unsigned-integer as unsigned-integer", 400, None),
        (400, "KeyError: 'x'\n\nAt:\n  /models/secret/model.py(33): execute\n", 502, None),
    ],
)  # fmt: skip
def test_triton_s_words_become_an_error_by_their_cause(status: int, text: str, kind: int, param: str | None) -> None:
    error = of_triton(status, text)
    assert isinstance(error, ApiError)
    assert (error.status, error.param) == (kind, param)
    assert "/models" not in error.message
    assert "ensemble" not in error.message


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("9 requests are running or waiting, and this server takes 9: try again later", BusyError),
        ("Stub process 'tensorrt_llm_bls_0_0' is not healthy.", UpstreamError),
        ("the engine process was ended by SIGKILL; the server must be restarted", UpstreamError),
        ("Request for unknown model: 'tensorrt_llm_bls' is not found", UpstreamError),
    ],
)
def test_a_triton_that_is_full_or_dead_is_no_mistake_of_the_client(text: str, kind: type[Exception]) -> None:
    assert type(of_triton(400, text)) is kind
