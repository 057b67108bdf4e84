"""Promises of the instrument, against a server whose delays are known. Times are judged from below only, or by far."""

from __future__ import annotations

from itertools import pairwise
from statistics import mean

import pytest

from tests.measuring.slow_server import slow_server
from toolchain.errors import EndpointError, RejectedError
from toolchain.measuring.doors import Door, first_model
from toolchain.measuring.load import Raw, Task, arrival_times, poisson_times, requests_of, send
from toolchain.measuring.prompts import Prompt
from toolchain.measuring.report import Load, Request

PROMPTS = [Prompt(f"prompt {index}", 2, 4) for index in range(50)]
ONE = Load(kind="closed", concurrency=1)


def measured(raw: list[Raw]) -> tuple[Request, ...]:
    return requests_of(raw, PROMPTS, lambda one: len(one.text.split()))


@pytest.mark.parametrize("kind", ["openai-chat", "openai-completions", "triton-http"])
def test_what_is_streamed_is_timed_piece_by_piece(kind: str) -> None:
    with slow_server(first_s=0.06, next_s=0.03) as server:
        door = Door(kind, server.url, "slow", ignore_eos=True)
        found = measured(send([door], Task(PROMPTS, ONE, "simultaneous", 3)))
    assert [one.error for one in found] == [None] * 3
    for one in found:
        assert len(one.arrivals_s) == one.output_tokens == 4
        assert one.ttft_s is not None
        assert one.ttft_s >= 0.06
        assert one.itl_s is not None
        assert one.itl_s >= 0.02  # the first word may have been delayed on its way
        assert one.e2e_s is not None
        assert one.e2e_s >= 0.15
        assert list(one.arrivals_s) == sorted(one.arrivals_s)
    said = [body.get("prompt") or body.get("text_input") or body["messages"][0]["content"] for body in server.bodies]
    assert said == ["prompt 0", "prompt 1", "prompt 2"]
    assert all(body["max_tokens"] == body["min_tokens"] == 4 for body in server.bodies)
    assert [one.server_output_tokens for one in found] == [4 if kind.startswith("openai") else None] * 3


def test_a_whole_answer_has_an_end_and_no_first_token() -> None:
    with slow_server(first_s=0.05) as server:
        found = measured(send([Door("predict", server.url, "")], Task(PROMPTS, ONE, "simultaneous", 2)))
    assert [(one.ttft_s, one.itl_s, one.output_tokens) for one in found] == [(None, None, 4)] * 2
    assert all(one.e2e_s is not None and one.e2e_s >= 0.05 for one in found)


def test_one_connection_serves_one_worker() -> None:
    with slow_server() as server:
        door = Door("openai-chat", server.url, "slow")
        send([door], Task(PROMPTS, Load(kind="closed", concurrency=2), "simultaneous", 12))
        assert server.connections == 2


def test_a_server_that_hangs_up_after_every_answer_is_asked_on_new_connections() -> None:
    with slow_server(hangs_up_s=0.003) as server:
        found = measured(send([Door("openai-chat", server.url, "slow")], Task(PROMPTS, ONE, "simultaneous", 12)))
        assert server.connections == len(server.bodies) == 12
    assert not [one.error for one in found if one.error]


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_closed_loop_keeps_so_many_in_flight(concurrency: int) -> None:
    with slow_server(first_s=0.03) as server:
        door = Door("openai-chat", server.url, "slow")
        raw = send([door], Task(PROMPTS, Load(kind="closed", concurrency=concurrency), "simultaneous", 9))
    assert server.most_in_flight == concurrency
    assert sorted(one.prompt for one in raw) == list(range(9))


def test_an_open_loop_counts_from_the_scheduled_time() -> None:
    """One every 10 ms, for a server that takes 50 ms for each, one after the other: the queue grows, and it shows."""
    load = Load(kind="open", rate_per_s=100, seed=3)
    with slow_server(first_s=0.05, serial=True) as server:
        found = measured(send([Door("openai-chat", server.url, "slow")], Task(PROMPTS, load, "simultaneous", 12)))
    times = poisson_times(100, 12, 3)
    assert [one.scheduled_s for one in found] == pytest.approx(times, abs=1e-5)
    assert max(one.ttft_s or 0 for one in found) >= 12 * 0.05 - times[-1]
    assert server.most_in_flight > 4  # it does not wait for answers


def test_failures_are_named_and_nothing_is_sent_twice() -> None:
    with slow_server(fail_every=3, cut_every=4) as server:
        door = Door("openai-chat", server.url, "slow")
        found = measured(send([door], Task(PROMPTS, ONE, "simultaneous", 12)))
        assert len(server.bodies) == 12
    assert [bool(one.error) for one in found] == [(n % 3 == 0) or (n % 4 == 0) for n in range(1, 13)]
    assert found[2].error == "RejectedError: 503: too many"
    assert found[3].error is not None
    assert found[3].error.startswith("EndpointError: ")
    assert found[2].ttft_s is None


def test_nobody_there_is_an_error_at_once() -> None:
    with slow_server() as server:
        gone = Door("openai-chat", server.url, "slow")
    with pytest.raises(EndpointError):
        send([gone], Task(PROMPTS, ONE, "simultaneous", 1))


def test_one_at_a_time_asks_the_services_in_turn() -> None:
    with slow_server(first_s=0.02) as a, slow_server(first_s=0.02) as b:
        doors = [Door("openai-chat", server.url, "slow") for server in (a, b)]
        raw = send(doors, Task(PROMPTS, ONE, "one-at-a-time", 3))
    assert [one.service for one in raw] == [0, 1, 0, 1, 0, 1]
    assert all(before.done <= after.sent for before, after in pairwise(raw))


def test_staggered_services_start_one_after_the_other() -> None:
    with slow_server() as a, slow_server() as b:
        doors = [Door("openai-chat", server.url, "slow") for server in (a, b)]
        found = measured(send(doors, Task(PROMPTS, ONE, "staggered", 2, stagger_s=0.2)))
    first = [next(one.scheduled_s for one in found if one.service == service) for service in (0, 1)]
    assert first == [0, pytest.approx(0.2)]
    assert all(one.sent_s >= one.scheduled_s for one in found)


def test_simultaneous_services_start_together() -> None:
    with slow_server() as a, slow_server() as b:
        doors = [Door("openai-chat", server.url, "slow") for server in (a, b)]
        found = measured(send(doors, Task(PROMPTS, ONE, "simultaneous", 1)))
    assert [(one.service, one.scheduled_s) for one in found] == [(0, 0), (1, 0)]


def test_arrivals_are_poisson_and_seeded() -> None:
    times = poisson_times(20, 4000, 5)
    gaps = [after - before for before, after in pairwise(times)]
    assert times[0] == 0
    assert mean(gaps) == pytest.approx(1 / 20, rel=0.06)  # standard error 1.6 %
    assert mean(gap * gap for gap in gaps) == pytest.approx(2 / 20**2, rel=0.2)  # E[x^2] = 2 / rate^2
    assert times == poisson_times(20, 4000, 5) != poisson_times(20, 4000, 6)


def test_staggered_arrivals_are_shifted_by_a_share_of_the_mean_gap() -> None:
    task = Task(PROMPTS, Load(kind="open", rate_per_s=2), "staggered", 3)
    first, second = arrival_times(task, 2)
    assert [b - a for a, b in zip(first, second, strict=True)] == pytest.approx([0.25] * 3)


@pytest.mark.parametrize("load", [Load(kind="closed", concurrency=2), Load(kind="open", rate_per_s=1)])
def test_one_at_a_time_is_refused_for_more(load: Load) -> None:
    with pytest.raises(RejectedError, match="one at a time"):
        send([], Task(PROMPTS, load, "one-at-a-time", 1))


def test_the_first_model_of_an_openai_server() -> None:
    with slow_server() as server:
        assert first_model(f"{server.url}/v1") == "slow"
        assert Door("openai-chat", f"{server.url}/v1", "slow").about() == {"version": "1.2.3"}
        assert Door("triton-http", server.url, "slow").about() == {"name": "triton", "version": "9"}
