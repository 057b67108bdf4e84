"""KServe's doors of an endpoint of two real replicas: as one Triton, also while a part of one is killed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.served import Served, ServerError, inputs, until_final
from tests.fleet.endpoint import Endpoint, as_served, one_triton
from tests.fleet.test_failover import heal, kill_worker
from tests.gateway.test_doors import COUNT
from tests.gateway.test_kserve import ALIKE, BLS, over_grpc, plain, streamed, whole

pytestmark = pytest.mark.timeout(180)
CLIENTS, TOKENS = 8, 2000
NOT_HERE = [
    ({"beam_width": 2}, "beam_width: an endpoint over several replicas gives no beams"),
    ({"return_context_logits": True}, "return_context_logits: an endpoint over several replicas"),
    ({"num_return_sequences": 10_000}, "num_return_sequences: 10000, this engine takes 1 to"),
]


@pytest.fixture(scope="module")
def fleet(running: Endpoint) -> Served:
    return as_served(running)


@pytest.fixture(scope="module")
def triton(running: Endpoint) -> Served:
    return one_triton(running)


@pytest.mark.parametrize("request_", ALIKE)
@pytest.mark.parametrize("ask", [whole, streamed, over_grpc])
def test_an_endpoint_answers_as_one_triton(fleet: Served, triton: Served, request_: dict[str, Any], ask: Any) -> None:
    expected, found = ask(triton, request_), ask(fleet, request_)
    if isinstance(expected, str):
        assert found[-40:] == expected[-40:]
    else:
        assert found == expected


@pytest.mark.parametrize(("more", "said"), NOT_HERE)
def test_what_an_endpoint_does_not_do_is_refused_by_name(fleet: Served, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ServerError) as refused:
        fleet.generate(BLS, text_input="a", max_tokens=3, **more)
    assert said in plain(refused.value)


def test_streams_over_grpc_do_not_see_that_a_worker_is_lost(running: Endpoint, fleet: Served) -> None:
    begun, victim = threading.Semaphore(0), running.replicas[0]
    undisturbed = long_text(fleet, lambda: None)
    with ThreadPoolExecutor(CLIENTS) as pool:
        asked = [pool.submit(long_text, fleet, begun.release) for _ in range(CLIENTS)]
        for _ in asked:
            assert begun.acquire(timeout=60)
        at_work = sum(not one.done() for one in asked)
        kill_worker(victim)
        texts = [one.result(120) for one in asked]
    heal(running, victim, kill_worker)
    assert at_work, "the streams were too short for this machine"
    assert texts == [undisturbed] * CLIENTS


def long_text(fleet: Served, on_first: Callable[[], object]) -> str:
    """A long greedy answer over gRPC."""
    asked = {"text_input": COUNT, "max_tokens": TOKENS, "min_tokens": TOKENS, "stream": True}
    text = ""
    with fleet.grpc_stream() as (client, answers):
        client.async_stream_infer(BLS, inputs(asked), enable_empty_final_response=True)
        for result in until_final(answers):
            if not text:
                on_first()
            text += result.as_numpy("text_output")[0].decode()
    return text
