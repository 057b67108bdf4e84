"""The loop of speculative decoding without Triton: two engines that know a text by heart, the draft not quite."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from speculation import Drafts, Speculation, tokens_to_draft
from tensors import RefusedError
from words import flatten

PROMPT, END = [7, 8, 9], 2
Tensors = dict[str, np.ndarray]


class Heart:
    """An engine that continues ``PROMPT`` with ``text`` and then END, wrong at the positions ``wrong``."""

    def __init__(self, text: list[int], wrong: Callable[[int], bool] = lambda _place: False) -> None:
        self.text, self.wrong = [*text, END], wrong
        self.asked: list[Tensors] = []
        self.stopped: list[str] = []

    def prepare(self, tensors: Tensors) -> Tensors:
        raise NotImplementedError

    def stop(self, request_id: str) -> None:
        self.stopped.append(request_id)

    def token(self, place: int) -> int:
        right = self.text[place] if place < len(self.text) else END
        return 1000 + place if self.wrong(place) else right

    def generate(self, request_id: str, tensors: Tensors, wanted: list[str]) -> Iterator[Tensors]:
        self.asked.append(tensors)
        ids = tensors["input_ids"][0].tolist()
        assert ids[: len(PROMPT)] == PROMPT
        assert tensors["input_lengths"].item() == len(ids)
        place, most = len(ids) - len(PROMPT), tensors["request_output_len"].item()
        draft = tensors["draft_input_ids"][0].tolist() if "draft_input_ids" in tensors else []
        new: list[int] = []
        while len(new) < most:
            token = self.token(place + len(new))
            if token == END and "min_tokens" not in tensors:
                break
            new.append(token)
            if (len(new) > len(draft) or token != draft[len(new) - 1]) and draft:
                break
        pieces = [[token] for token in new] if tensors["streaming"].item() else [new]
        for piece in pieces:
            yield {"output_ids": np.array([[piece]], dtype=np.int32), "sequence_length": np.array([[len(piece)]])}


def request(count: int, **more: Any) -> Tensors:
    """The tensors of one request, as ``wiring.to_engine`` gives them."""
    return {
        "input_ids": np.array([PROMPT], dtype=np.int32),
        "input_lengths": np.array([[len(PROMPT)]], dtype=np.int32),
        "request_output_len": np.array([[count]], dtype=np.int32),
        "end_id": np.array([[END]], dtype=np.int32),
        "streaming": np.array([[False]]),
        **more,
    }


def answer(speculation: Speculation, tensors: Tensors) -> tuple[list[int], Tensors]:
    """All new tokens, and the last response."""
    responses = list(speculation.generate("r", tensors, ["output_ids", "sequence_length"]))
    ids = [token for one in responses for token in one["output_ids"].reshape(-1).tolist()]
    return ids, responses[-1] if responses else {}


def alone(text: list[int], count: int) -> list[int]:
    return text[:count]


def rate(last: Tensors) -> tuple[int, int]:
    assert last["acceptance_rate"].dtype == np.float32
    accepted, drafted = last["total_accepted_draft_tokens"].item(), last["total_draft_tokens"].item()
    assert last["acceptance_rate"].item() == pytest.approx(accepted / drafted if drafted else 0.0)
    return accepted, drafted


TEXT = list(range(100, 130))


@pytest.mark.parametrize(
    ("wrong", "accepted", "drafted"),
    [
        (lambda _place: False, 24, 24),  # 30 tokens: six steps of 4 + 1
        (lambda _place: True, 0, 110),  # one token a step, with less room at the end: 26 x 4 + 3 + 2 + 1
        (lambda place: place % 5 == 2, 23, 25),  # 2 of 4, then five times 4 of 4, then 1 of 1
    ],
    ids=["perfect", "useless", "one wrong in five"],
)
def test_text_is_the_engines_own_and_acceptance_is_what_the_draft_deserves(
    wrong: Callable[[int], bool], accepted: int, drafted: int
) -> None:
    engine, draft = Heart(TEXT), Heart(TEXT, wrong)
    ids, last = answer(Speculation(engine, Drafts(draft, 4, 4096), 4), request(len(TEXT)))
    assert ids == TEXT
    assert rate(last) == (accepted, drafted)
    assert len(engine.asked) == len(TEXT) - accepted


@settings(deadline=None)
@given(
    text=st.lists(st.integers(3, 40), max_size=40),
    bad=st.sets(st.integers(0, 40)),
    count=st.integers(1, 50),
    tokens=st.integers(1, 8),
    longest=st.integers(0, 60),
    streaming=st.booleans(),
)
def test_whatever_the_draft_says_the_tokens_are_those_of_the_engine_alone(
    text: list[int], bad: set[int], count: int, tokens: int, longest: int, streaming: bool
) -> None:
    engine, draft = Heart(text), Heart(text, bad.__contains__)
    told = request(count, streaming=np.array([[streaming]]))
    ids, last = answer(Speculation(engine, Drafts(draft, tokens, longest), tokens), told)
    assert ids == alone(text, count)
    for asked in engine.asked:
        if "draft_input_ids" in asked:
            assert asked["draft_input_ids"].shape[1] <= tokens
            assert asked["request_output_len"].item() == asked["draft_input_ids"].shape[1] + 1
            assert not asked["streaming"].item()
            assert asked["draft_input_ids"].dtype == asked["input_ids"].dtype == np.int32
    for asked in draft.asked:
        assert asked["input_ids"].shape[1] + asked["request_output_len"].item() <= longest
    if last:
        rate(last)


def test_sequence_that_is_too_long_for_the_draft_goes_on_without_it_in_one_request() -> None:
    engine, draft = Heart(TEXT), Heart(TEXT)
    ids, _ = answer(
        Speculation(engine, Drafts(draft, 4, len(PROMPT) + 10), 4), request(30, streaming=np.array([[True]]))
    )
    assert ids == TEXT
    assert len(engine.asked) == 3
    assert engine.asked[-1]["request_output_len"].item() == 20
    assert engine.asked[-1]["streaming"].item()


@pytest.mark.parametrize("words", [[[105]], [[104, 105]], [[109, 110]], [[9, 100]]])
def test_stop_word_inside_an_accepted_run_ends_the_answer_there(words: list[list[int]]) -> None:
    engine = Heart(TEXT)
    stop = np.array([flatten(words)], dtype=np.int32)
    ids, _ = answer(Speculation(engine, Drafts(Heart(TEXT), 4, 4096), 4), request(30, stop_words_list=stop))
    assert ids == TEXT[: TEXT.index(words[0][-1]) + 1]


def test_every_step_of_a_sampled_answer_has_a_seed_of_its_own() -> None:
    engine = Heart(TEXT)
    sampled = request(12, temperature=np.array([[0.7]]), seed=np.array([[5]], dtype=np.uint64))
    answer(Speculation(engine, Drafts(Heart(TEXT), 2, 4096), 2), sampled)
    assert [asked["seed"].item() for asked in engine.asked] == [5 + 3, 5 + 6, 5 + 9, 5 + 12]
    engine.asked.clear()
    answer(Speculation(engine, Drafts(Heart(TEXT), 2, 4096), 2), request(6))
    assert all("seed" not in asked for asked in engine.asked)


def test_draft_writes_greedily_and_is_told_neither_sampling_nor_logits() -> None:
    draft = Heart(TEXT)
    told = request(6, temperature=np.array([[0.7]]), runtime_top_k=np.array([[40]]), lora_task_id=np.array([[1]]))
    answer(Speculation(Heart(TEXT), Drafts(draft, 2, 4096), 2), told)
    assert draft.asked[0]["runtime_top_k"].item() == 1
    assert draft.asked[0]["min_tokens"].item() == 2
    assert {"temperature", "lora_task_id", "draft_input_ids"}.isdisjoint(draft.asked[0])


def test_names_of_an_older_release_reach_both_engines() -> None:
    engine, draft = Heart(TEXT), Heart(TEXT)

    def older(tensors: Tensors) -> Tensors:
        return {{"seed": "random_seed", "min_tokens": "min_length"}.get(name, name): a for name, a in tensors.items()}

    answer(Speculation(engine, Drafts(draft, 2, 4096), 2, older), request(6, temperature=np.array([[0.7]])))
    assert "random_seed" in engine.asked[0]
    assert "min_length" in draft.asked[0]


def test_lengths_are_those_of_the_whole_answer_and_first_times_those_of_the_first_step() -> None:
    class Told(Heart):
        def generate(self, request_id: str, tensors: Tensors, wanted: list[str]) -> Iterator[Tensors]:
            step = np.array([[len(self.asked)]])
            for response in super().generate(request_id, tensors, wanted):
                yield {**response, "first_token_time_ns": step, "last_token_time_ns": step, "num_output_tokens": step}

    _, last = answer(Speculation(Told(TEXT), Drafts(Heart(TEXT), 4, 4096), 4), request(len(TEXT)))
    assert last["num_output_tokens"].item() == len(TEXT)
    assert (last["first_token_time_ns"].item(), last["last_token_time_ns"].item()) == (0, 5)


def test_answer_without_drafts_is_one_request_and_says_so() -> None:
    engine, draft = Heart(TEXT), Heart(TEXT)
    ids, last = answer(Speculation(engine, Drafts(draft, 4, 4096), 0), request(30))
    assert ids == TEXT
    assert (len(engine.asked), len(draft.asked)) == (1, 0)
    assert rate(last) == (0, 0)


@pytest.mark.parametrize("slow", ["engine", "draft"])
def test_stop_reaches_the_engine_that_is_at_work_and_nothing_is_asked_after_it(slow: str) -> None:
    begun, go = threading.Event(), threading.Event()

    class Slow(Heart):
        def generate(self, request_id: str, tensors: Tensors, wanted: list[str]) -> Iterator[Tensors]:
            begun.set()
            assert go.wait(10)
            yield from super().generate(request_id, tensors, wanted)

    engine = (Slow if slow == "engine" else Heart)(TEXT)
    draft = (Slow if slow == "draft" else Heart)(TEXT)
    speculation = Speculation(engine, Drafts(draft, 4, 4096), 4)
    found: list[list[int]] = []
    thread = threading.Thread(target=lambda: found.append(answer(speculation, request(30))[0]))
    thread.start()
    assert begun.wait(10)
    speculation.stop("r")
    go.set()
    thread.join(10)
    assert found == [[]]
    assert (engine.stopped, draft.stopped) == ((["r"], []) if slow == "engine" else ([], ["r"]))
    assert len(engine.asked) + len(draft.asked) == (2 if slow == "engine" else 1)


DRAFTS = Drafts(Heart([]), 4, 4096)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beam_width", [[2]]),
        ("num_return_sequences", [[2]]),
        ("return_log_probs", [[True]]),
        ("return_generation_logits", [[True]]),
        ("repetition_penalty", [[1.5]]),
        ("presence_penalty", [[0.5]]),
        ("min_tokens", [[3]]),
        ("bad_words_list", [[[5], [1]]]),
        ("embedding_bias", [[0.0, 2.0]]),
        ("guided_decoding_guide", [["{}"]]),
        ("input_ids", [[1], [2]]),
    ],
)
def test_what_a_draft_cannot_do_is_answered_without_it_and_refused_where_it_is_asked_for(name: str, value: Any) -> None:
    tensors = request(5, **{name: np.array(value)})
    assert tokens_to_draft({}, tensors, DRAFTS) == 0
    assert tokens_to_draft({"num_draft_tokens": np.array([[0]])}, tensors, DRAFTS) == 0
    with pytest.raises(RefusedError, match="num_draft_tokens: not together with"):
        tokens_to_draft({"num_draft_tokens": np.array([[2]])}, tensors, DRAFTS)


def test_neutral_values_do_not_exclude_a_draft() -> None:
    neutral = request(
        5,
        beam_width=np.array([[1]]),
        repetition_penalty=np.array([[1.0]]),
        return_log_probs=np.array([[False]]),
        bad_words_list=np.array([[[0], [-1]]]),
        embedding_bias=np.zeros((1, 4)),
        temperature=np.array([[0.5]]),
    )
    assert tokens_to_draft({}, neutral, DRAFTS) == 4


def test_number_of_drafted_tokens_is_within_what_the_engine_is_built_for() -> None:
    assert tokens_to_draft({"num_draft_tokens": np.array([[3]])}, request(5), DRAFTS) == 3
    for count in (5, -1):
        with pytest.raises(RefusedError, match="built for 0 to 4"):
            tokens_to_draft({"num_draft_tokens": np.array([[count]])}, request(5), DRAFTS)


def test_server_without_a_draft_refuses_drafts_and_logits_are_refused_by_name() -> None:
    assert tokens_to_draft({}, request(5), None) == 0
    with pytest.raises(RefusedError, match="num_draft_tokens: speculative decoding with a draft model is not set up"):
        tokens_to_draft({"num_draft_tokens": np.array([[2]])}, request(5), None)
    for drafts in (None, DRAFTS):
        with pytest.raises(RefusedError, match="use_draft_logits: "):
            tokens_to_draft({"use_draft_logits": np.array([[True]])}, request(5), drafts)
