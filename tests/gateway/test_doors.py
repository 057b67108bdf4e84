"""The gateway in front of a real Triton, asked by the official ``openai`` client; checked against transformers."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import unused_ports
from tests.e2e.parrot import SENTENCES
from tests.e2e.served import Served
from tests.e2e.test_triton_models import CAPITAL, GREEK, JAPAN, Reference
from tests.gateway.behind_gateway import Gateway, gateway, settings_for
from toolchain.gateway.settings import Upstream

pytestmark = pytest.mark.timeout(180)
COUNT = "Count with me: one"
LONG = {"max_tokens": 5500, "extra_body": {"min_tokens": 5400}}
"""Seconds of work: for requests that are to be interrupted."""


@pytest.fixture(scope="module")
def door(parrot: Path, served: Served) -> Iterator[Gateway]:
    with gateway(settings_for(parrot, served.http_port)) as found:
        until_ready(found)
        yield found


@pytest.fixture(scope="module")
def client(door: Gateway) -> openai.OpenAI:
    return openai.OpenAI(base_url=door.url, api_key="none is asked for", max_retries=0)


def until_ready(door: Gateway) -> None:
    deadline = time.monotonic() + 30
    while status(f"{door.root}/ready") != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def post(url: str, body: bytes, **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(url, data=body, headers={name.replace("_", "-"): v for name, v in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def said(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def test_the_models_are_listed_and_another_one_is_not_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["parrot"]
    assert client.models.retrieve("parrot").owned_by == "scalellm"
    for ask in (
        lambda: client.models.retrieve("gpt-5"),
        lambda: client.completions.create(model="gpt-5", prompt="x"),
        lambda: client.chat.completions.create(model="gpt-5", messages=said("x")),  # type: ignore[arg-type,list-item]
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("prompt", [CAPITAL, JAPAN, GREEK, COUNT])
def test_greedy_text_is_what_transformers_generates(client: openai.OpenAI, reference: Reference, prompt: str) -> None:
    expected = reference.text(prompt, 60)
    plain = client.completions.create(model="parrot", prompt=prompt, temperature=0, max_tokens=60)
    chat: Any = client.chat.completions.create(
        model="parrot",
        messages=said(prompt),
        temperature=0,
        max_completion_tokens=60,  # type: ignore[arg-type]
    )
    assert plain.choices[0].text == chat.choices[0].message.content == expected
    assert plain.choices[0].finish_reason == chat.choices[0].finish_reason == "stop"
    tokens = len(reference.tokenizer(prompt).input_ids)
    for usage in (plain.usage, chat.usage):
        assert usage.prompt_tokens == tokens
        assert usage.completion_tokens == len(reference.ids(prompt, 60)[0])
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_bos_is_there_once_whether_the_template_writes_it_or_not(
    parrot: Path, served: Served, reference: Reference
) -> None:
    expected = len(reference.tokenizer(CAPITAL).input_ids)
    for source in ("{{ messages[0].content }}", "{{ bos_token }}{{ messages[0].content }}"):
        asked = settings_for(parrot, served.http_port)
        model = replace(asked.model, template=replace(asked.model.template, source=source))
        with gateway(replace(asked, model=model)) as found:
            until_ready(found)
            chat = openai.OpenAI(base_url=found.url, api_key="x").chat.completions.create(
                model="parrot",
                messages=said(CAPITAL),
                max_tokens=1,
                temperature=0,  # type: ignore[arg-type]
            )
            assert chat.usage is not None
            assert chat.usage.prompt_tokens == expected


@pytest.mark.parametrize("prompt", [JAPAN, CAPITAL])
def test_a_stream_is_the_same_text_in_pieces_without_half_characters(
    client: openai.OpenAI, reference: Reference, prompt: str
) -> None:
    chunks = list(
        client.chat.completions.create(
            model="parrot", messages=said(prompt), temperature=0, max_tokens=60, stream=True,  # type: ignore[arg-type]
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert choices[0].delta.role == "assistant"
    texts = [choice.delta.content or "" for choice in choices]
    assert "".join(texts) == reference.text(prompt, 60)
    assert not any("\ufffd" in text for text in texts)
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["stop"]
    assert choices[-1].finish_reason == "stop"
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(reference.ids(prompt, 60)[0])
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_without_include_usage_no_chunk_has_it(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model="parrot", prompt=CAPITAL, max_tokens=5, temperature=0, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("stop", ["river", "s, and the r", ["nowhere", "is, and"], "Seine."])
def test_an_answer_ends_before_a_stop_text_wherever_tokens_begin(
    client: openai.OpenAI, reference: Reference, stop: Any
) -> None:
    whole = reference.text(CAPITAL, 60)
    words = [stop] if isinstance(stop, str) else stop
    expected = whole[: min(whole.find(word) for word in words if word in whole)]
    asked: dict[str, Any] = {"model": "parrot", "prompt": CAPITAL, "max_tokens": 60, "temperature": 0, "stop": stop}
    plain = client.completions.create(**asked).choices[0]
    assert (plain.text, plain.finish_reason) == (expected, "stop")
    choices = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
    assert "".join(choice.text for choice in choices) == expected
    assert choices[-1].finish_reason == "stop"


def test_max_tokens_ends_an_answer_by_length(client: openai.OpenAI, reference: Reference) -> None:
    answer = client.completions.create(model="parrot", prompt=CAPITAL, max_tokens=5, temperature=0)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text == reference.text(CAPITAL, 5)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5


def test_a_chat_without_max_tokens_goes_on_to_its_own_end(client: openai.OpenAI, reference: Reference) -> None:
    answer: Any = client.chat.completions.create(model="parrot", messages=said(COUNT), temperature=0)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == reference.text(COUNT, 60)
    assert answer.choices[0].finish_reason == "stop"


def test_n_answers_differ_by_seed_and_the_prompt_counts_once(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "parrot", "prompt": "qzx", "max_tokens": 12, "n": 4, "temperature": 2, "seed": 7}
    first, again = (client.completions.create(**asked) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert len(set(texts)) > 1
    assert [choice.text for choice in again.choices] == texts
    one = client.completions.create(**{**asked, "n": 1})
    assert one.choices[0].text == texts[0]
    assert first.usage is not None
    assert one.usage is not None
    assert first.usage.prompt_tokens == one.usage.prompt_tokens
    streamed = ["", "", "", ""]
    for chunk in client.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_several_prompts_in_one_request_are_each_answered_as_alone(client: openai.OpenAI, reference: Reference) -> None:
    prompts = [CAPITAL, COUNT, JAPAN]
    expected = [reference.text(prompt, 60) for prompt in prompts]
    asked: dict[str, Any] = {"model": "parrot", "prompt": prompts, "max_tokens": 60, "temperature": 0}
    answer = client.completions.create(**asked)
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(reference.tokenizer(prompt).input_ids) for prompt in prompts)
    streamed = ["", "", ""]
    for chunk in client.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == expected


def test_logprobs_are_those_of_transformers(client: openai.OpenAI, reference: Reference) -> None:
    ids = reference.ids(CAPITAL, 6)[0]
    prompt = reference.tokenizer(CAPITAL).input_ids
    with torch.no_grad():
        logits = reference.model(torch.tensor([prompt + ids])).logits[0]
    expected = torch.log_softmax(logits[len(prompt) - 1 : -1].float(), -1)[range(6), ids].tolist()
    asked: dict[str, Any] = {"model": "parrot", "temperature": 0, "max_tokens": 6}
    plain = client.completions.create(prompt=CAPITAL, logprobs=1, **asked).choices[0]
    chat = client.chat.completions.create(messages=said(CAPITAL), logprobs=True, **asked).choices[0]  # type: ignore[arg-type]
    assert plain.logprobs is not None
    assert chat.logprobs is not None
    assert chat.logprobs.content is not None
    assert plain.logprobs.token_logprobs == pytest.approx(expected, abs=2e-3)
    assert [token.logprob for token in chat.logprobs.content] == pytest.approx(expected, abs=2e-3)
    assert "".join(plain.logprobs.tokens or ()) == plain.text
    assert "".join(token.token for token in chat.logprobs.content) == chat.message.content
    assert plain.logprobs.text_offset is not None
    assert plain.text[plain.logprobs.text_offset[3] :].startswith((plain.logprobs.tokens or [])[3])


@pytest.mark.parametrize(
    ("asked", "param", "code"),
    [
        ({"presence_penalty": 1.0}, "presence_penalty", None),
        ({"logit_bias": {"300": 5}}, "logit_bias", None),
        ({"max_tokens": 100_000}, "max_tokens", "context_length_exceeded"),
        ({"prompt": "x" * 3000}, "prompt", "context_length_exceeded"),
        ({"response_format": {"type": "json_object"}}, "response_format", None),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"n": 33}, "n", None),
        ({"n": 20}, "n", None),
        ({"top_logprobs": 3, "logprobs": True}, "top_logprobs", None),
        ({"colour": "red"}, "colour", None),
    ],
)
def test_what_the_engine_or_the_gateway_cannot_do_is_refused_by_name(
    client: openai.OpenAI, asked: dict[str, Any], param: str, code: str | None
) -> None:
    prompt = asked.pop("prompt", CAPITAL)
    body = {"model": "parrot", "messages": said(prompt), "max_tokens": 5, **asked}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body=body, cast_to=object)
    assert caught.value.param == param
    assert caught.value.code == code
    assert caught.value.type == "invalid_request_error"
    assert "Traceback" not in str(caught.value)


def test_sixteen_streams_at_once_are_each_what_they_are_alone(door: Gateway, reference: Reference) -> None:
    prompts = [" ".join(SENTENCES[index % 4].split()[: 1 + index // 4]) for index in range(16)]

    async def ask(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(
            model="parrot", prompt=prompt, max_tokens=40, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=door.url, api_key="x", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, prompt) for prompt in prompts))

    assert asyncio.run(ask_all()) == [reference.text(prompt, 40) for prompt in prompts]


def test_a_stream_that_is_closed_frees_the_engine(served: Served, client: openai.OpenAI, door: Gateway) -> None:
    stream = client.completions.create(model="parrot", prompt=COUNT, stream=True, temperature=0, **LONG)  # type: ignore[call-overload]
    next(iter(stream))
    assert served.wait_for(lambda status: status["active"] == 1)
    cancelled = served.status()["cancelled"]
    stream.close()
    assert served.idle()["cancelled"] == cancelled + 1
    assert gone(door)


def test_a_client_that_goes_before_its_answer_frees_the_engine(
    served: Served, client: openai.OpenAI, door: Gateway
) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.7).completions.create(model="parrot", prompt=COUNT, temperature=0, **LONG)  # type: ignore[arg-type]
    served.idle()
    assert gone(door)


def gone(door: Gateway) -> bool:
    """Whether the last line of the log says that a client has gone."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if door.log and door.log[-1].get("ended") == "client gone":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("kind", ["application/json", "application/x-www-form-urlencoded", "text/plain"])
def test_predict_takes_json_whatever_its_content_type(door: Gateway, reference: Reference, kind: str) -> None:
    code, headers, body = post(door.predict_url, json.dumps({"text": CAPITAL}).encode(), Content_Type=kind)
    assert (code, headers["content-type"]) == (200, "application/json")
    assert json.loads(body) == {"generated_text": reference.text(CAPITAL, 60)}


def test_predict_streams_pieces_of_the_same_text(door: Gateway, reference: Reference) -> None:
    code, headers, body = post(door.predict_url, json.dumps({"text": JAPAN, "stream": True}).encode())
    assert code == 200
    assert headers["content-type"].startswith("text/event-stream")
    *lines, last = [line[6:] for line in body.decode().split("\n\n") if line]
    assert last == "[DONE]"
    assert "".join(json.loads(line)["generated_text"] for line in lines) == reference.text(JAPAN, 60)


@pytest.mark.parametrize("accept", ["application/json", "*/*", "application/json, text/plain", "text/event-stream"])
def test_predict_answers_json_to_those_who_accept_it(door: Gateway, accept: str) -> None:
    _code, headers, body = post(door.predict_url, b'{"text": "Hi", "max_tokens": 3}', Accept=accept)
    assert headers["content-type"] == "application/json"
    assert json.loads(body).keys() == {"generated_text"}


def test_predict_answers_others_with_a_file(door: Gateway, reference: Reference) -> None:
    body = json.dumps({"text": JAPAN}).encode()
    code, headers, text = post(door.predict_url, body, Accept="application/octet-stream")
    assert code == 200
    assert "attachment" in headers["content-disposition"]
    assert text.decode() == reference.text(JAPAN, 60)


def test_predict_to_an_empty_text_says_that_it_is_empty(door: Gateway) -> None:
    code, _headers, body = post(door.predict_url, b'{"text": ""}')
    assert code == 200
    assert "empty" in json.loads(body)["generated_text"]
    code, headers, body = post(door.predict_url, b'{"text": " ", "stream": true}')
    assert (code, headers["content-type"].split(";")[0]) == (200, "text/event-stream")
    first, end = body.decode().split("\n\n", 1)
    assert "empty" in json.loads(first.removeprefix("data: "))["generated_text"]
    assert end.strip() == "data: [DONE]"


def test_predict_in_the_old_form_is_a_python_repr_in_a_json_text(
    parrot: Path, served: Served, reference: Reference
) -> None:
    with gateway(settings_for(parrot, served.http_port, fedml_compat="repr")) as old:
        until_ready(old)
        _code, _headers, body = post(old.predict_url, json.dumps({"text": CAPITAL}).encode())
    text = reference.text(CAPITAL, 60)
    assert body == f"\"{{'generated_text': '{text}'}}\"".encode()


def test_predict_also_takes_openai_s_bodies(door: Gateway, reference: Reference) -> None:
    body = {"messages": said(CAPITAL), "temperature": 0, "max_tokens": 60}
    _code, _headers, chat = post(door.predict_url, json.dumps(body).encode())
    assert json.loads(chat)["choices"][0]["message"]["content"] == reference.text(CAPITAL, 60)
    at_their_paths = {
        "/chat/completions": (body, lambda choice: choice["message"]["content"]),
        "/completions": ({"prompt": CAPITAL, "temperature": 0, "max_tokens": 60}, lambda choice: choice["text"]),
    }
    for path, (asked, text_of) in at_their_paths.items():
        code, _headers, found = post(door.predict_url.replace("/predict", path), json.dumps(asked).encode())
        assert (code, text_of(json.loads(found)["choices"][0])) == (200, reference.text(CAPITAL, 60))


def test_predict_is_ready_with_200_and_loading_with_202(door: Gateway, parrot: Path) -> None:
    ready = door.predict_url.replace("/predict", "/ready")
    with urllib.request.urlopen(ready) as answer:
        assert (answer.status, json.load(answer)) == (200, {"status": "Success"})
    with gateway(settings_for(parrot, 1)) as lonely:
        assert status(lonely.predict_url.replace("/predict", "/ready")) == 202
        assert status(f"{lonely.root}/ready") == 503
        assert status(f"{lonely.root}/health") == 200


@pytest.mark.parametrize(("path", "code"), [("/v1/nothing", 404), ("/v1/chat/completions", 405), ("/docs", 404)])
def test_other_paths_and_methods_get_an_error_object(door: Gateway, path: str, code: int) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(door.root + path)
    assert caught.value.code == code
    assert json.load(caught.value)["error"]["message"]


def test_every_request_has_an_id_and_a_line_in_the_log_without_its_text(door: Gateway) -> None:
    body = json.dumps({"model": "parrot", "prompt": "my secret is 4711", "max_tokens": 3, "min_tokens": 3}).encode()
    url = f"{door.url}/completions"
    _code, headers, _body = post(url, body, X_Request_Id="mine-1")
    assert headers["x-request-id"] == "mine-1"
    line = door.log[-1]
    assert (line["id"], line["route"], line["status"]) == ("mine-1", "completions", 200)
    assert line["completion_tokens"] == 3
    assert {"ttft_ms", "ms", "prompt_tokens", "finish"} <= line.keys()
    _code, headers, _body = post(url, body, X_Request_Id="bad id " + "x" * 500)
    assert headers["x-request-id"].startswith("req_")
    assert "4711" not in json.dumps(door.log)


def test_metrics_are_the_gateways_own_and_tritons(parrot: Path, served: Served) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    asked = settings_for(parrot, served.http_port)
    upstream = Upstream(asked.upstreams[0].http_url, f"http://127.0.0.1:{served.metrics_port}/metrics")
    with gateway(replace(asked, upstreams=(upstream, Upstream("http://127.0.0.1:1")))) as found:
        until_ready(found)
        client = openai.OpenAI(base_url=found.url, api_key="x")
        for _ in range(3):
            list(client.completions.create(model="parrot", prompt=CAPITAL, max_tokens=9, temperature=0, stream=True))
        with urllib.request.urlopen(f"{found.root}/metrics") as answer:
            text = answer.read().decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    values = {(one.name, *one.labels.values()): one.value for family in families.values() for one in family.samples}
    own = "scalellm_gateway_"
    assert values[f"{own}requests_total", "completions", "200"] == 3
    assert values[f"{own}completion_tokens_total",] == 27
    assert values[f"{own}ttft_seconds_count",] == 3
    assert values[f"{own}itl_seconds_count",] > 0
    assert values[f"{own}running",] == values[f"{own}waiting",] == 0
    assert values[f"{own}triton_up", upstream.http_url] == 1
    assert values[f"{own}triton_up", "http://127.0.0.1:1"] == 0
    assert any(sample.labels["triton"] == upstream.http_url for sample in families["nv_inference_count"].samples)


def test_openapi_describes_what_is_there(door: Gateway) -> None:
    with urllib.request.urlopen(f"{door.root}/openapi.json") as answer:
        schema = json.load(answer)
    body = schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"messages", "model", "temperature"} <= body["properties"].keys()
    assert body["properties"]["model"]["enum"] == ["parrot"]
    assert "$ref" not in json.dumps(schema["paths"]["/v1/chat/completions"])


PATHS = ("/v1/chat/completions", "/v1/completions", "/predict")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.fixed_dictionaries(
    {"model": st.just("parrot")},
    optional={
        "messages": st.lists(
            st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": st.text()}),
            max_size=3,
        ),
        "prompt": st.text() | st.lists(st.text(), max_size=3),
        "text": st.text(),
        "max_tokens": st.integers(-1, 8),
        "temperature": st.floats(0, 2) | JSON,
        "top_p": st.floats(0, 1) | JSON,
        "n": st.integers(0, 4),
        "stop": st.text() | st.lists(st.text(), max_size=4) | JSON,
        "seed": st.integers() | JSON,
        "stream": st.booleans(),
        "logprobs": st.booleans() | st.integers(0, 2),
        "frequency_penalty": st.floats(-2, 2),
        "logit_bias": st.dictionaries(st.integers(-1, 400).map(str), st.floats(-100, 100), max_size=2),
        "response_format": JSON,
        "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}) | JSON,
    },
)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(PATHS), FIELDS | JSON)
def test_any_json_body_gives_an_answer_or_an_error_object(narrow: Gateway, path: str, value: Any) -> None:
    url = narrow.predict_url if path == "/predict" else narrow.root + path
    code, _headers, body = post(url, json.dumps(value).encode())
    assert code == 200 or 400 <= code < 500, body
    if code != 200:
        error = json.loads(body)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["message"]
    assert not [line for line in narrow.log if line["event"] == "bug"]


@pytest.fixture(scope="module")
def narrow(parrot: Path, served: Served) -> Iterator[Gateway]:
    """With short answers."""
    asked = settings_for(parrot, served.http_port)
    limits = replace(asked.limits, predict_tokens=8)
    with gateway(replace(asked, model=replace(asked.model, max_seq_len=40), limits=limits)) as found:
        until_ready(found)
        yield found


def test_both_doors_share_a_port_where_they_are_told_to(parrot: Path, served: Served, reference: Reference) -> None:
    port = unused_ports(1)[0]
    with gateway(settings_for(parrot, served.http_port), port=port, predict_port=port) as found:
        until_ready(found)
        assert found.predict_url == f"{found.root}/predict"
        code, _, body = post(found.predict_url, json.dumps({"text": CAPITAL, "temperature": 0}).encode())
        assert (code, json.loads(body)["generated_text"]) == (200, reference.text(CAPITAL, 60))
        client = openai.OpenAI(base_url=found.url, api_key="x")
        plain = client.completions.create(model="parrot", prompt=CAPITAL, temperature=0, max_tokens=60)
        assert plain.choices[0].text == reference.text(CAPITAL, 60)
        with urllib.request.urlopen(f"{found.root}/ready") as answer:
            assert json.load(answer) == {"status": "Success"}  # FEDML's
        with urllib.request.urlopen(f"{found.root}/openapi.json") as answer:
            assert {"/predict", "/ready", "/metrics", "/v1/models"} <= json.load(answer)["paths"].keys()
