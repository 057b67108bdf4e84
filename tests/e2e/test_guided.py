"""Guided answers and LoRA adapters at every door of a real Triton, checked by jsonschema, re and transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from tests.e2e.parrot import write_parrot
from tests.e2e.served import Served, ServerError
from tests.e2e.test_triton_models import CAPITAL, JAPAN, Reference, make_engine, serving
from tests.gateway.behind_gateway import Gateway, gateway, settings_for
from tests.gateway.test_doors import post, until_ready
from tests.lora import merged, write_adapter
from toolchain.adapters import open_adapter
from toolchain.checkpoint import Checkpoint

pytestmark = pytest.mark.timeout(180)
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "big": {"type": "boolean"},
        "size": {"enum": ["small", "großΩ", "日本"]},
        "at": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["city", "big", "size", "at"],
    "additionalProperties": False,
}
REGEX = r"(\d{3}-[a-f]{2,4}|é+日)!"
GRAMMAR = 'root ::= "yes " number | "no"\nnumber ::= [1-9] [0-9]{0,3}'
SAMPLED = {"temperature": 2.0, "top_p": 1.0, "repetition_penalty": 1.5}
"""A parrot that was never taught JSON would put spaces between its words for ever."""
ADAPTERS = ("small", "queer")
GUIDES = {
    "json": "",
    "json_schema": json.dumps(SCHEMA),
    "regex": REGEX,
    "ebnf_grammar": GRAMMAR,
}


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parrot(tmp_path_factory.mktemp("parrot"))


@pytest.fixture(scope="module")
def reference(parrot: Path) -> Reference:
    return Reference(parrot)


@pytest.fixture(scope="module")
def adapters(parrot: Path, reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    small = write_adapter(folder / "small", reference.model, size=0.25, seed=1)
    return [small, write_adapter(folder / "queer", reference.model, size=0.3, seed=2, targets=("q_proj", "down_proj"))]


@pytest.fixture(scope="module")
def served(parrot: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    config = Checkpoint.open(parrot).config
    found = [open_adapter(folder.name, folder, config) for folder in adapters]
    engine = make_engine(parrot, tmp_path_factory.mktemp("made") / "engine", guided=True, adapters=found)
    with serving(engine, tmp_path_factory.mktemp("served")) as running:
        yield running


@pytest.fixture(scope="module")
def door(parrot: Path, served: Served) -> Iterator[Gateway]:
    settings = settings_for(parrot, served.http_port)
    with gateway(replace(settings, model=replace(settings.model, adapters=ADAPTERS))) as found:
        until_ready(found)
        yield found


@pytest.fixture(scope="module")
def client(door: Gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=door.url, api_key="none", max_retries=0) as found:
        yield found


def fits(kind: str, text: str) -> bool:
    """Whether the answer is what the guide asks for, by libraries that did not make it."""
    if kind == "json":
        return isinstance(json.loads(text), (dict, list))
    if kind == "json_schema":
        jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(text))
        return True
    return re.fullmatch(REGEX if kind == "regex" else r"yes [1-9][0-9]{0,3}|no", text) is not None


def asked(kind: str, **more: Any) -> dict[str, Any]:
    guide = {"guided_decoding_guide": GUIDES[kind]} if GUIDES[kind] else {}
    told = {"text_input": CAPITAL, "max_tokens": 400, "guided_decoding_guide_type": kind, **SAMPLED}
    return {**told, "return_num_output_tokens": True, **guide, **more}


@pytest.mark.parametrize("kind", ["json_schema", "regex", "ebnf_grammar"])
def test_kserve_answers_keep_to_the_guide(served: Served, kind: str) -> None:
    for seed in range(3):
        request = asked(kind, seed=seed)
        answer = served.generate("tensorrt_llm_bls", **request)
        assert answer["finish_reason"] == "stop"
        text = str(answer["text_output"])
        assert fits(kind, text), text
        assert "".join(served.pieces("tensorrt_llm_bls", **request)) == text
        del request["return_num_output_tokens"]
        assert served.text("ensemble", **request) == text
        results = served.grpc("tensorrt_llm_bls", stream=True, **request)
        assert "".join(result.as_numpy("text_output")[0].decode() for result in results) == text


def test_any_json_is_json(served: Served) -> None:
    ended = 0
    for seed in range(8):
        answer = served.generate("tensorrt_llm_bls", **asked("json", seed=seed))
        if answer["finish_reason"] == "stop":
            assert fits("json", str(answer["text_output"]))
            ended += 1
    assert ended


def test_the_openai_door_keeps_to_schemas_regexes_choices_and_grammars(client: openai.OpenAI) -> None:
    told: dict[str, Any] = {"model": "parrot", "messages": [{"role": "user", "content": CAPITAL}], "max_tokens": 400}
    json_told = {**told, "seed": 5, "temperature": 2.0, "extra_body": {"repetition_penalty": 1.5}}
    format_: Any = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA}}
    several = client.chat.completions.create(**json_told, n=3, response_format=format_)
    assert len({choice.message.content for choice in several.choices}) > 1
    for choice in several.choices:
        assert choice.finish_reason == "stop"
        assert fits("json_schema", choice.message.content or "")
    parts = client.chat.completions.create(**json_told, stream=True, response_format=format_)
    streamed = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert streamed == several.choices[0].message.content
    for structure, pattern in (
        ({"regex": REGEX}, REGEX),
        ({"choice": ["a.b", "c|d", "(e"]}, r"a\.b|c\|d|\(e"),
        ({"grammar": GRAMMAR}, r"yes [1-9][0-9]{0,3}|no"),
    ):
        for temperature in (0, 1):
            extra = {"structured_outputs": structure}
            chat = client.chat.completions.create(**told, seed=1, temperature=temperature, extra_body=extra)
            assert re.fullmatch(pattern, chat.choices[0].message.content or "")
            plain = client.completions.create(model="parrot", prompt=CAPITAL, max_tokens=50, extra_body=extra)
            assert re.fullmatch(pattern, plain.choices[0].text)
    some = client.chat.completions.create(**{**json_told, "max_tokens": 900}, response_format={"type": "json_object"})
    if some.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(some.choices[0].message.content or ""), dict)


def test_predict_knows_the_same_guides(door: Gateway) -> None:
    body = {"text": CAPITAL, "max_tokens": 50, "guided_decoding_guide_type": "regex", "guided_decoding_guide": REGEX}
    code, _headers, answer = post(door.predict_url, json.dumps(body).encode())
    assert code == 200
    assert fits("regex", json.loads(answer)["generated_text"])


def test_a_stop_text_ends_a_guided_answer_too(served: Served) -> None:
    whole = served.text("tensorrt_llm_bls", **asked("regex", seed=1))
    assert "!" in whole
    cut = served.text("tensorrt_llm_bls", **asked("regex", seed=1, stop_words=[whole[2:4]]))
    assert whole.startswith(cut)
    assert len(cut) <= 2


@pytest.mark.parametrize(
    ("kind", "guide", "reason"),
    [
        ("json_schema", '{"type": ', "not JSON"),
        ("json_schema", '{"type": "foo"}', "Unsupported type"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json_schema", '{"properties": {"a": {"not": {}}}}', "not is not supported"),
        ("json_schema", '{"$ref": "https://x.org/y"}', "leads out of the schema"),
        ("json_schema", '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}', "no text"),
        ("json_schema", '{"type": "string", "pattern": "[ -~]*"}', "pattern .* is not supported"),
        ("regex", "(a", "parenthesis"),
        ("regex", r"(?=a)b", "Lookahead"),
        ("regex", "a^b", "only at the ends"),
        ("ebnf_grammar", "root ::= nothing", "not defined"),
        ("yaml", "a: 1", "must be one of"),
        ("regex", "a" * 70000, "bytes"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_its_reason_and_the_engine_lives(
    served: Served, client: openai.OpenAI, kind: str, guide: str, reason: str
) -> None:
    pid = served.idle()["engine_pid"]
    asked_for = {"guided_decoding_guide_type": kind, "guided_decoding_guide": guide}
    request = {"text_input": CAPITAL, "max_tokens": 50, **asked_for}
    for model in ("ensemble", "tensorrt_llm_bls"):
        with pytest.raises(ServerError, match=f"400 .*guided_decoding_guide.*{reason}"):
            served.generate(model, **request)
    field = {"json_schema": "json", "regex": "regex", "ebnf_grammar": "grammar"}.get(kind)
    if field:
        extra = {"structured_outputs": {field: guide}}
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="parrot", prompt=CAPITAL, max_tokens=5, extra_body=extra)
        assert caught.value.param == "response_format"
        assert re.search(reason, str(caught.value))
    assert fits("regex", served.text("tensorrt_llm_bls", **asked("regex")))
    assert served.idle()["engine_pid"] == pid


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"beam_width": 2, "temperature": 1.0, "top_p": 0.0, "repetition_penalty": 1.0}, "beam_width"),
        ({"end_id": -1}, "end_id"),
        ({"min_tokens": 3}, "min_tokens"),
    ],
)
def test_what_excludes_a_guide_is_refused_by_name(served: Served, more: dict[str, Any], named: str) -> None:
    with pytest.raises(ServerError, match=f"400 .*{named}"):
        served.generate("tensorrt_llm_bls", **asked("regex", **more))


def test_guided_and_free_requests_do_not_disturb_each_other(served: Served) -> None:
    free = served.text("tensorrt_llm_bls", text_input=CAPITAL, max_tokens=40)

    def ask(index: int) -> str:
        if index % 2:
            return served.text("tensorrt_llm_bls", text_input=CAPITAL, max_tokens=40)
        kind = ("regex", "json_schema", "ebnf_grammar")[index % 3]
        text = served.text("tensorrt_llm_bls", **asked(kind, seed=index))
        assert fits(kind, text)
        return free

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(24))) == [free] * 24


def test_a_guided_stream_that_is_cancelled_frees_the_engine(served: Served) -> None:
    before = served.idle()["cancelled"]
    endless = {"text_input": CAPITAL, "max_tokens": 5500, "guided_decoding_guide_type": "regex"}
    with served.streaming("tensorrt_llm_bls", guided_decoding_guide="[a-z]{5400}", **endless) as events:
        next(events)
        served.wait_for(lambda status: status["running"] == 1)
    served.wait_for(lambda status: status["running"] == 0 and status["cancelled"] == before + 1)


@pytest.fixture(scope="module")
def texts(reference: Reference, adapters: list[Path]) -> dict[str, list[str]]:
    """What transformers says to each prompt: without an adapter, with the first, with the second."""
    plain = reference.model
    found: dict[str, list[str]] = {}
    for prompt in (CAPITAL, JAPAN):
        found[prompt] = []
        for folder in (None, *adapters):
            reference.model = merged(plain, folder) if folder else plain
            found[prompt].append(reference.text(prompt, 24))
    reference.model = plain
    return found


def test_adapters_and_the_model_alone_share_a_batch_over_kserve(served: Served, texts: dict[str, list[str]]) -> None:
    assert len(set(texts[CAPITAL])) == 3

    def ask(index: int) -> tuple[str, str]:
        prompt, number = (CAPITAL, JAPAN)[index % 2], index % 3
        request = {"text_input": prompt, "max_tokens": 24, "lora_task_id": number}
        if index % 4 == 3:
            results = served.grpc("tensorrt_llm_bls", stream=True, **request)
            text = "".join(result.as_numpy("text_output")[0].decode() for result in results)
        else:
            text = served.text(("ensemble", "tensorrt_llm_bls")[index % 4 // 2], **request)
        return text, texts[prompt][number]

    with ThreadPoolExecutor(12) as pool:
        for text, expected in pool.map(ask, range(24)):
            assert text.strip() == expected.strip()


def test_an_adapter_is_a_model_of_its_own_to_openais_clients(
    door: Gateway, client: openai.OpenAI, texts: dict[str, list[str]]
) -> None:
    names = ["parrot", "parrot:small", "parrot:queer"]
    assert [model.id for model in client.models.list()] == names
    assert client.models.retrieve(names[2]).id == names[2]
    for name, expected in zip(names, texts[CAPITAL], strict=True):
        plain = client.completions.create(model=name, prompt=CAPITAL, max_tokens=24, temperature=0)
        assert (plain.choices[0].text.strip(), plain.model) == (expected.strip(), name)
        body = {"text": CAPITAL, "max_tokens": 24, "model": name}
        answer = json.loads(post(door.predict_url, json.dumps(body).encode())[2])
        assert answer["generated_text"].strip() == expected.strip()
    for wrong in ("parrot:", "small", "parrot:other"):
        with pytest.raises(openai.NotFoundError, match="does not exist here"):
            client.completions.create(model=wrong, prompt=CAPITAL, max_tokens=2)


def test_an_adapters_answers_keep_to_guides_too(served: Served) -> None:
    for number in (1, 2):
        assert fits("regex", served.text("tensorrt_llm_bls", **asked("regex", lora_task_id=number)))
        assert fits("json_schema", served.text("tensorrt_llm_bls", **asked("json_schema", lora_task_id=number)))


def test_an_adapter_that_is_not_there_is_refused_by_name(served: Served) -> None:
    with pytest.raises(ServerError, match=r"400 .*lora_task_id: 3, this engine has the adapters 1 to 2"):
        served.generate("tensorrt_llm_bls", text_input=CAPITAL, max_tokens=2, lora_task_id=3)
