"""What goes between the gateway's side and a worker, and how a continued answer keeps its text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.e2e.parrot import SENTENCES
from toolchain.fleet import wire
from toolchain.fleet.front.texts import Parameters, Texts
from toolchain.fleet.worker.dialect import dialect
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
    answer = texts.answer(ask, 0, {"stream": True})
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


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("beam_width", 2, "beam_width: an endpoint over several replicas gives no beams"),
        ("return_context_logits", True, "return_context_logits: an endpoint"),
        ("lora_weights", [1.0, 2.0], "lora_weights: .* by lora_task_id"),
        ("num_draft_tokens", 3, "num_draft_tokens: speculative decoding with a draft model is not set up"),
        ("num_return_sequences", 9, "num_return_sequences: 9, this engine takes 1 to 8"),
        ("text_input", ["a", "b"], "text_input: a batch of 2 prompts"),
        ("image_url_input", "x", "image_url_input: this model takes text only"),
    ],
)
def test_what_an_endpoint_cannot_do_is_refused_by_name(parrot: Path, name: str, value: Any, said: str) -> None:
    texts = Texts(parrot, replace(PARAMETERS, max_answers=8))
    with pytest.raises(ApiError, match=said) as refused:
        texts.asks({"text_input": "a", "max_tokens": 3, name: value})
    assert refused.value.status == 400


def test_what_asks_for_nothing_is_no_reason_to_refuse(texts: Texts) -> None:
    nothing = {"beam_width": 1, "return_context_logits": False, "num_draft_tokens": 0, "num_return_sequences": 0}
    assert len(texts.asks({"text_input": "a", "max_tokens": 3, **nothing})) == 1


def grown(texts: Texts, parrot: Path, prompt: str, more: str, **inputs: Any) -> list[dict[str, Any]]:
    """The events of an answer that is ``more``, id by id, each of probability e**-0.5; until a stop word comes."""
    ids = AutoTokenizer.from_pretrained(parrot)(more, add_special_tokens=False).input_ids
    asked = {"text_input": prompt, "max_tokens": len(ids), **inputs}
    answer = texts.answer(texts.asks(asked)[0], 0, asked)
    events = []
    for one in ids:
        events.append(answer.push([one], [-0.5]))
        if answer.stopped:
            break
    return [event for event in [*events, answer.finish()] if event]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_stop_word_ends_an_answer_and_is_no_part_of_it(texts: Texts, parrot: Path, streaming: bool) -> None:
    events = grown(texts, parrot, "one ", "two three four", stop_words=["ee f", ""], stream=streaming)
    assert "".join(event["text_output"] for event in events) == "two thr"
    assert events[-1]["finish_reason"] == "stop"
    assert (len(events) == 1) is not streaming


def test_a_whole_answer_is_one_event_with_the_prompt_where_it_is_wanted(texts: Texts, parrot: Path) -> None:
    (event,) = grown(texts, parrot, "one ", "two", exclude_input_in_output=False)
    assert event["text_output"] == "one two"
    assert event["finish_reason"] == "length"
    assert event["cum_log_probs"] == [sum(event["output_log_probs"])]
    assert len(event["output_ids"]) == event["num_output_tokens"] == len(event["output_log_probs"])


def test_what_the_engine_measured_comes_with_the_answer_where_it_is_asked_for() -> None:
    told = {"output_ids": 5, "sequence_length": 1, "model_name": "m", "acceptance_rate": 0.5}
    assert wire.metrics(wire.Ask((1,), 1, {}), told) == {}
    wanted = wire.metrics(wire.Ask((1,), 1, {"return_perf_metrics": [True]}), told)
    assert wanted == {"acceptance_rate": 0.5}
    assert wire.metrics_of(wire.item([5], told=wanted)) == wanted
    assert wire.metrics_of(wire.item([5])) == {}


OLD = {"engine_release": "0.12.0", "engine_renamed": "seed=random_seed", "engine_lacks": "lora_task_id"}


def test_an_engine_of_an_older_release_is_asked_by_its_own_names() -> None:
    inputs = wire.inputs(wire.Ask((1, 2), 4, {"seed": [7], "temperature": [0.5]}, prompt_tokens=2))
    spoken = dialect(OLD)(inputs)
    assert spoken["random_seed"] == [7]
    assert "seed" not in spoken
    assert (spoken["input_ids"], spoken["streaming"]) == ([1, 2], [True])
    assert dialect({})(inputs) == inputs


def test_what_an_older_release_lacks_is_refused_by_name_unless_it_asks_for_nothing() -> None:
    assert "lora_task_id" not in dialect(OLD)({"lora_task_id": [0]})
    with pytest.raises(ApiError, match=r"lora_task_id: the engine's release, 0\.12\.0, does not have it"):
        dialect(OLD)({"lora_task_id": [1]})
