"""Promises about how an answer is put together and written, without any server."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion as CompletionObject
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from toolchain.chat import ChatTemplate
from toolchain.gateway.answers import Answer, Chat, Completion, Piece, Predict, Token, usage
from toolchain.gateway.settings import Model
from toolchain.gateway.stops import Cut

MODEL = Model("m", 0, ChatTemplate(None), fingerprint="fp_1")


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_text_is_cut_at_the_first_stop_text_however_it_comes(text: str, stops: list[str], data: st.DataObject) -> None:
    places = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(places)[1]] if places else text
    cut, given_out, left, finish = Cut(stops), "", text, None
    while left and not finish:
        size = data.draw(st.integers(1, len(left)))
        piece = cut.push(Piece(0, left[:size], tuple(Token(one, -1.0) for one in left[:size])))
        given_out, left, finish = given_out + piece.text, left[size:], piece.finish
    if not finish:
        piece = cut.push(Piece(0, "", finish="length"))
        given_out, finish = given_out + piece.text, piece.finish
    assert given_out == expected
    assert finish == ("stop" if places else "length")


@given(st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=8), st.text("ab", min_size=1, max_size=3))
def test_log_probabilities_are_of_the_text_that_is_given_out(tokens: list[str], stop: str) -> None:
    cut, text, kept = Cut([stop]), "", []
    for token in tokens:
        piece = cut.push(Piece(0, token, (Token(token, -1.0),)))
        text, kept = text + piece.text, [*kept, *piece.tokens]
        if piece.finish:
            break
    else:
        piece = cut.push(Piece(0, "", finish="length"))
        text, kept = text + piece.text, [*kept, *piece.tokens]
    written = "".join(token.text for token in kept)
    assert text.startswith(written)
    assert piece.finish == "stop" or written == text


def test_what_is_written_is_what_the_openai_package_reads() -> None:
    answers = [Answer("Hi", [Token("Hi", -0.5)], "stop", 3, 1), Answer("Ho", [Token("Ho", -0.5)], "length", 3, 1)]
    chat = ChatCompletion.model_validate_json(Chat(MODEL).whole(answers, usage(answers)), strict=True)
    assert [choice.message.content for choice in chat.choices] == ["Hi", "Ho"]
    assert chat.system_fingerprint == "fp_1"
    plain = CompletionObject.model_validate_json(Completion(MODEL).whole(answers, usage(answers)), strict=True)
    assert [choice.finish_reason for choice in plain.choices] == ["stop", "length"]
    assert plain.usage is not None
    assert (plain.usage.prompt_tokens, plain.usage.completion_tokens) == (3, 2)


def test_each_event_is_one_line_of_json_and_the_last_is_done() -> None:
    shape = Chat(MODEL)
    used = usage([Answer("", [], "stop", 1, 1)])
    raw = shape.opening([0, 1]) + shape.piece(Piece(0, "a\n\nb")) + shape.piece(Piece(1, "", finish="stop"))
    events = (raw + shape.closing(used)).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [ChatCompletionChunk.model_validate_json(event.removeprefix("data: ")) for event in events[:-2]]
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", "assistant"]
    assert chunks[2].choices[0].delta.content == "a\n\nb"
    assert chunks[3].choices[0].finish_reason == "stop"
    assert chunks[4].usage == used


@pytest.mark.parametrize("tokens", [(), (Token('"choices":[]', -0.5),)])
@pytest.mark.parametrize("finish", [None, "stop"])
def test_a_chunk_is_what_the_package_itself_would_write(tokens: tuple[Token, ...], finish: Any) -> None:
    text, model = 'a "choices":[]\n\u2028é', replace(MODEL, name='m "choices":[]')
    piece = Piece(1, text, tokens, finish)
    for shape, kind in ((Chat(model), ChatCompletionChunk), (Completion(model), CompletionObject)):
        for event in shape.piece(piece).decode().removesuffix("\n\n").split("\n\n"):
            told = json.loads(event.removeprefix("data: "))
            made: Any = kind.construct(**told)
            assert json.loads(made.model_dump_json(exclude_unset=True)) == told
            assert (made.model, made.id, made.created) == (model.name, shape.id, shape.common["created"])
            if kind is ChatCompletionChunk or finish:  # OpenAI's completions have null there, which their type has not
                kind.model_validate(told, strict=True)


def test_a_prompt_counts_once_for_all_its_answers() -> None:
    answers = [Answer("", [], "stop", 5, 2), Answer("", [], "stop", 5, 3), Answer("", [], "stop", 7, 1)]
    assert usage(answers[:2]).prompt_tokens == 5
    assert usage([answers[0], answers[2]], prompts=2).prompt_tokens == 12
    assert usage(answers).completion_tokens == 6
    assert usage([]).total_tokens == 0


@pytest.mark.parametrize("text", ["plain", 'it\'s "quoted"\n', "日本 😀"])
def test_the_old_form_of_predict_reads_back_as_python(text: str) -> None:
    answers = [Answer(text)]
    assert json.loads(Predict().whole(answers, usage(answers))) == {"generated_text": text}
    old = json.loads(Predict(as_repr=True).whole(answers, usage(answers)))
    assert ast.literal_eval(old) == {"generated_text": text}
