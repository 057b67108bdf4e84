"""The pure parts of ``tensorrt_llm`` for openvino: what a request asks for, stop words by ids, lanes, the child."""

from __future__ import annotations

import os
import time
from pathlib import Path

import channel
import numpy as np
import pytest
from engine_client import EngineClient
from hypothesis import given
from hypothesis import strategies as st
from lanes import Lane
from specification import Limits, Specification, specify
from stop_words import StopMatcher
from tensors import RefusedError, refuse_unsound_numpy
from words import flatten

LIMITS = Limits(
    max_seq_len=100, max_input_len=60, vocab_size=500, eos_ids=(2, 3), max_sequences=8, max_beam_width=4,
    exclude_input=True,
)  # fmt: skip


def ask(**more: object) -> Specification:
    tensors = {"input_ids": [5, 6, 7], "input_lengths": 3, "request_output_len": 10, **more}
    return specify({name: np.atleast_2d(np.array(value)) for name, value in tensors.items()}, LIMITS)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"temperature": 3.0},
        {"runtime_top_k": 1, "runtime_top_p": 0.9},
        {"runtime_top_k": 50, "temperature": 0.0},
        {"runtime_top_k": 0, "runtime_top_p": 0.0},
    ],
)
def test_decoding_is_greedy_unless_top_k_or_top_p_asks_for_more(asked: dict[str, float]) -> None:
    assert "do_sample" not in ask(**asked).options


def test_top_k_and_top_p_are_passed_on() -> None:
    assert ask(runtime_top_k=5).options.items() >= {"do_sample": True, "top_k": 5, "top_p": 1.0}.items()
    nucleus = ask(runtime_top_p=0.5, temperature=0.7).options
    assert nucleus["do_sample"]
    assert "top_k" not in nucleus
    assert (nucleus["top_p"], nucleus["temperature"]) == pytest.approx((0.5, 0.7))


def test_own_end_id_stands_for_all_of_them_and_a_foreign_one_for_itself() -> None:
    assert ask().options["stop_token_ids"] == [2, 3]
    assert ask(end_id=3).options["stop_token_ids"] == [2, 3]
    assert ask(end_id=7).options["stop_token_ids"] == [7]
    assert ask(end_id=-1).options["stop_token_ids"] == []


def test_each_returned_sequence_has_a_seed_of_its_own() -> None:
    assert ask(num_return_sequences=3, seed=40).seeds == (40, 41, 42)
    assert ask(beam_width=3).seeds == (0,)
    assert ask(beam_width=3).options["num_return_sequences"] == 3


def test_beams_follow_the_defaults_of_tensorrt_llm() -> None:
    options = ask(beam_width=2).options
    assert (options["length_penalty"], options["early"]) == (0.0, True)
    assert ask(beam_width=2, early_stopping=False, len_penalty=1.5).options["length_penalty"] == 1.5


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"request_output_len": 98}, "3 tokens of prompt and 98 of output are 101, .* at most 100"),
        ({"input_ids": [5] * 61, "input_lengths": 61}, "61 tokens, .* at most 60"),
        ({"input_ids": [5, 500, 7]}, "input_ids: 500 is not an id"),
        ({"input_ids": [5, -1, 7]}, "input_ids: -1 is not an id"),
        ({"input_ids": [[1, 2], [3, 4]], "input_lengths": [[2], [2]]}, "a batch of 2"),
        ({"input_lengths": 4}, "input_lengths: 4"),
        ({"bad_words_list": [[7], [1]]}, "bad_words"),
        ({"embedding_bias": [0.0, 1.0]}, "embedding_bias"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"runtime_top_p_decay": 0.5}, "runtime_top_p_decay"),
        ({"return_context_logits": True}, "return_context_logits"),
        ({"beam_width": 5}, "beam_width: 5"),
        ({"beam_width": 2, "streaming": True}, "beam_width"),
        ({"beam_width": 2, "runtime_top_k": 9}, "runtime_top_k"),
        ({"beam_width": 2, "num_return_sequences": 3}, "num_return_sequences: 3"),
        ({"num_return_sequences": 9}, "num_return_sequences: 9"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": [0.5, 0.6]}, "temperature: 2 values"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(asked: dict[str, object], words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        ask(**asked)


def test_neutral_values_ask_for_nothing() -> None:
    plain = ask()
    neutral = ask(frequency_penalty=0.0, runtime_top_p_decay=1.0, runtime_top_p_reset_ids=-1, lora_task_id=0)
    assert neutral.options == plain.options


def test_stop_words_come_from_the_flattened_table() -> None:
    assert ask(stop_words_list=flatten([[4], [8, 9]])[None]).stop_words == [[4], [8, 9]]


def test_prompt_is_returned_only_without_streaming() -> None:
    assert ask(exclude_input_in_output=False).include_prompt
    assert not ask(exclude_input_in_output=False, streaming=True).include_prompt
    assert not ask().include_prompt


IDS = st.lists(st.integers(0, 2), max_size=25)


@given(IDS, st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), max_size=3), st.integers(1, 5))
def test_ids_are_cut_before_the_stop_word_that_ends_first(ids: list[int], words: list[list[int]], size: int) -> None:
    matcher = StopMatcher(words)
    given_out = [token for start in range(0, len(ids), size) for token in matcher.push(ids[start : start + size])]
    ends = [end for end in range(1, len(ids) + 1) for word in words if ids[:end][-len(word) :] == word]
    if not ends:
        assert (given_out + matcher.finish(), matcher.stopped) == (ids, False)
        return
    assert matcher.stopped
    assert any(given_out + word == ids[: min(ends)] for word in words)


def test_ids_that_cannot_begin_a_stop_word_go_out_at_once() -> None:
    matcher = StopMatcher([[7, 8, 9]])
    assert matcher.push([1, 7, 8]) == [1]
    assert matcher.push([8]) == [7, 8, 8]
    assert matcher.push([7, 8, 9, 1]) == []
    assert matcher.stopped


class Recorder:
    """A request that only remembers."""

    def __init__(self) -> None:
        self.done = False
        self.waiting: list[str] = []
        self.sent: list[list[str]] = []

    def absorb(self, event: str) -> bool:
        self.waiting.append(event)
        return event in {"first", "last"}

    def flush(self) -> None:
        self.sent.append(self.waiting)
        self.waiting = []
        self.done = self.sent[-1][-1] == "last"


def test_lane_sends_first_tokens_at_once_and_gathers_later_ones_in_order() -> None:
    lane, request = Lane(0), Recorder()
    lane.start()
    for event in ("first", "a", "b", "last", "too late"):
        lane.put(request, event)
    lane.close()
    lane.join(10)
    assert request.sent == [["first"], ["a", "b", "last"]]


def test_lane_holds_no_token_back_that_comes_a_while_after_the_last_send(monkeypatch: pytest.MonkeyPatch) -> None:
    lane, request = Lane(0), Recorder()

    def at(now: float, *events: str) -> list[list[str]]:
        monkeypatch.setattr("lanes.time.monotonic", lambda: now)
        for event in events:
            lane._take(request, event)
        lane._flush_due(now)
        return request.sent

    assert at(100.00, "first") == [["first"]]
    assert at(100.05, "slow") == [["first"], ["slow"]]
    assert at(100.06, "fast") == [["first"], ["slow"]]
    assert at(100.07, "faster") == [["first"], ["slow"]]
    assert at(100.09) == [["first"], ["slow"], ["fast", "faster"]]
    assert at(100.10, "last")[-1] == ["last"]
    assert not lane._sent, "nothing is remembered of a request that is done"


def test_lane_sends_what_waits_without_further_events() -> None:
    lane, request = Lane(0), Recorder()
    lane.start()
    lane.put(request, "a")
    deadline = time.monotonic() + 10
    while not request.sent and time.monotonic() < deadline:
        time.sleep(0.01)
    lane.close()
    assert request.sent == [["a"]]


def test_engine_that_does_not_start_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="did not start: the engine process ended with exit code 1"):
        EngineClient(tmp_path, on_events=lambda _events, _status: None, on_death=lambda _reason: None)


def test_private_line_carries_arrays_both_ways() -> None:
    name = channel.name_of("a test")
    listener = channel.listen(name)
    caller = channel.connect(name)
    answerer = channel.accept(listener)
    assert answerer is not None
    caller.send(("ask", {"ids": np.arange(5)}))
    word, tensors = answerer.recv()
    assert word == "ask"
    assert tensors["ids"].tolist() == [0, 1, 2, 3, 4]
    answerer.close()
    with pytest.raises(EOFError):
        caller.recv()
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        channel.connect(name)


def test_two_servers_cannot_answer_the_same_line() -> None:
    name = channel.name_of("another test")
    listener = channel.listen(name)
    with pytest.raises(OSError, match="in use"):
        channel.listen(name)
    listener.close()


def test_numpy_2_is_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_unsound_numpy(strict=True)
    monkeypatch.setattr(np, "__version__", "2.4.6")
    with pytest.raises(RuntimeError, match="pip install 'numpy<2'"):
        refuse_unsound_numpy(strict=True)
    monkeypatch.setitem(os.environ, "TRITON_SERVER_VERSION", "2.51.0")
    with pytest.raises(RuntimeError, match=r"Triton 2\.51\.0"):
        refuse_unsound_numpy()
    monkeypatch.setitem(os.environ, "TRITON_SERVER_VERSION", "2.61.0")
    refuse_unsound_numpy(strict=True)
