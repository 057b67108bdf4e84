"""What goes between the gateway's side and a worker, and how a continued answer keeps its text."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.e2e.parrot import SENTENCES
from toolchain.fleet import wire
from toolchain.fleet.texts import Parameters, Texts
from toolchain.gateway.failures import ApiError

PARAMETERS = Parameters(max_input_len=200, vocab_size=400)


@pytest.fixture
def texts(parrot: Path) -> Texts:
    return Texts(parrot, PARAMETERS)


def test_a_request_comes_out_of_dynamos_form_as_it_went_in() -> None:
    ask = wire.Ask((1, 2, 3), 10, {"end_id": [1], "temperature": [0.5]}, prompt_tokens=3)
    assert wire.ask_of(wire.request(ask, "m")) == ask


def test_a_continued_request_asks_for_the_rest_and_for_fewer_least_tokens() -> None:
    sent = wire.request(wire.Ask((1, 2, 3), 10, {"min_tokens": [8]}, prompt_tokens=3), "m")
    sent["token_ids"] += [7, 8, 9, 10]
    sent["stop_conditions"]["max_tokens"] -= 4
    ask = wire.ask_of(sent)
    assert ask.so_far == 4
    assert wire.inputs(ask) == {
        "input_ids": [1, 2, 3, 7, 8, 9, 10],
        "input_lengths": 7,
        "request_output_len": 6,
        "min_tokens": 4,
        "streaming": True,
    }


def test_an_answer_that_follows_a_guide_is_not_continued() -> None:
    assert not wire.Ask((1,), 1, {"guided_decoding_guide_type": ["json"]}).can_continue
    assert wire.Ask((1,), 1, {}).can_continue


def test_a_request_of_another_front_is_refused() -> None:
    with pytest.raises(ValueError, match="not of this scalellm"):
        wire.ask_of({"token_ids": [1], "stop_conditions": {"max_tokens": 3}})


@pytest.mark.parametrize("sentence", SENTENCES)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_pieces_put_together_are_the_text_whatever_their_size(
    texts: Texts, parrot: Path, sentence: str, size: int
) -> None:
    """Half characters between two pieces, which may come from two workers, are no loss."""
    tokenizer = AutoTokenizer.from_pretrained(parrot)
    prompt, ids = sentence[:5], tokenizer(sentence[5:], add_special_tokens=False).input_ids
    ask = texts.asks({"text_input": prompt, "max_tokens": len(ids) + 5})[0]
    assert list(ask.ids) == tokenizer(prompt).input_ids
    answer = texts.answer(ask, 0)
    events = [answer.push(ids[at : at + size], None) for at in range(0, len(ids), size)] + [answer.finish()]
    assert "".join(event["text_output"] for event in events) == sentence[5:]
    assert events[-1]["finish_reason"] == "stop"
    assert events[-1]["num_output_tokens"] == len(ids)
    assert events[-1]["num_input_tokens"] == len(ask.ids)


def test_each_wanted_answer_has_a_seed_of_its_own(texts: Texts) -> None:
    asks = texts.asks({"text_input": "a", "max_tokens": 3, "seed": 5, "top_p": 1.0, "num_return_sequences": 3})
    assert [ask.tensors["seed"] for ask in asks] == [[5], [6], [7]]


def test_a_prompt_that_is_too_long_is_refused_as_triton_does_it(texts: Texts) -> None:
    with pytest.raises(ApiError, match="this engine takes at most 200") as refused:
        texts.asks({"text_input": "x" * 500, "max_tokens": 3})
    assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")
