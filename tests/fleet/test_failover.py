"""An endpoint of two real replicas: clients see one service, also while parts of it are killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.test_triton_models import CAPITAL, JAPAN
from tests.fleet.endpoint import Endpoint, Replica, signal_worker, until
from tests.gateway.behind_gateway import gateway, settings_for
from tests.gateway.test_doors import COUNT, post, until_ready
from toolchain.endpoint import Endpoint as Door
from toolchain.measuring.conformance_doors import Json, Kserve
from toolchain.stages.conformance import Beside, conformance

pytestmark = pytest.mark.timeout(180)
CLIENTS = 8
TOKENS = 2000
SHORT: dict[str, Any] = {"prompt": CAPITAL, "max_tokens": 60, "temperature": 0}
ALIKE: list[dict[str, Any]] = [
    {"prompt": CAPITAL, "max_tokens": 60, "temperature": 0, "logprobs": 1},
    {"prompt": JAPAN, "max_tokens": 60, "temperature": 0},
    {"prompt": CAPITAL, "max_tokens": 7, "temperature": 0},
    {"prompt": COUNT, "max_tokens": 60, "temperature": 0, "stop": ["seven"]},
    {"prompt": COUNT, "max_tokens": 20, "temperature": 1.5, "seed": 11, "n": 3},
    {"prompt": [CAPITAL, COUNT], "max_tokens": 20, "temperature": 0, "n": 2},
    {"prompt": COUNT, "max_tokens": 20, "min_tokens": 20, "temperature": 0, "repetition_penalty": 1.3},
    {"prompt": "x " * 6000, "max_tokens": 5},
    {"prompt": CAPITAL, "max_tokens": 10, "presence_penalty": 1.0},
    {"prompt": CAPITAL, "max_tokens": 1_000_000},
]


def test_every_door_answers_as_a_service_of_one_triton_does(running: Endpoint) -> None:
    url = running.gateway.url
    completion = Json("OpenAI", f"{url}/completions", "parrot", None)
    predict = Json("/predict", running.gateway.predict_url, "parrot", None)
    beside = Beside(chat=Json("chat", f"{url}/chat/completions", "parrot", None), predict=predict)
    kserve = [
        Kserve(Door(running.gateway.root, ""), "http"),
        Kserve(Door("", f"127.0.0.1:{running.gateway.listen.grpc_port}"), "grpc"),
    ]
    found = list(conformance([completion, predict, *kserve], beside))
    assert found
    assert [one for one in found if not one.passed] == []


def test_answers_are_those_of_the_gateway_over_plain_triton(running: Endpoint, parrot: Any) -> None:
    port = int(running.replicas[0].spec.triton_url.rsplit(":", 1)[1])
    with gateway(settings_for(parrot, port)) as plain:
        until_ready(plain)
        for body in ALIKE:
            raw = json.dumps({"model": "parrot", **body}).encode()
            one, two = (post(f"{url}/completions", raw) for url in (plain.url, running.gateway.url))
            assert one[0] == two[0], (body, one, two)
            assert essence(one[2], body) == essence(two[2], body)


def essence(raw: bytes, asked: dict[str, Any]) -> Any:
    """An answer without what is new each time. How many tokens come together with the stop text is chance."""
    chance = {"id", "created", *(("usage",) if "stop" in asked else ())}
    return {name: value for name, value in json.loads(raw).items() if name not in chance}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_answer_at_the_engine(running: Endpoint, stream: bool) -> None:
    def cancelled() -> int:
        return sum(json.loads(Path(one.spec.status_file).read_text())["cancelled"] for one in running.replicas)

    body = {"model": "parrot", "prompt": COUNT, "max_tokens": TOKENS, "min_tokens": TOKENS, "stream": stream}
    asked = urllib.request.Request(f"{running.gateway.url}/completions", json.dumps(body).encode())
    asked.add_header("Content-Type", "application/json")
    before = cancelled()
    with contextlib.suppress(TimeoutError), urllib.request.urlopen(asked, timeout=0.5) as answer:
        answer.readline()
    until(lambda: cancelled() == before + 1)


def kill_worker(replica: Replica) -> None:
    signal_worker(replica, signal.SIGKILL)


def stop_worker(replica: Replica) -> None:
    signal_worker(replica, signal.SIGSTOP)


def drain_worker(replica: Replica) -> None:
    signal_worker(replica, signal.SIGTERM)


def kill_triton(replica: Replica) -> None:
    os.kill(replica.triton.pid, signal.SIGKILL)


def kill_stub(replica: Replica) -> None:
    os.kill(replica.stub(), signal.SIGKILL)


@pytest.mark.parametrize("strike", [kill_worker, stop_worker, drain_worker, kill_triton, kill_stub])
def test_no_client_sees_that_a_part_of_a_replica_is_lost(running: Endpoint, strike: Callable[[Replica], None]) -> None:
    """Greedy streams: those at work go on elsewhere, those that come in the next second are answered elsewhere."""
    client = openai.OpenAI(base_url=running.gateway.url, api_key="x", max_retries=0, timeout=120)
    undisturbed = stream(client, lambda: None)
    answer = client.completions.create(model="parrot", **SHORT).choices[0].text
    begun, victim = threading.Semaphore(0), running.replicas[0]
    with ThreadPoolExecutor(2 * CLIENTS) as pool:
        early = [pool.submit(stream, client, begun.release) for _ in range(CLIENTS)]
        for _ in early:
            assert begun.acquire(timeout=60)
        at_work = sum(not future.done() for future in early)
        strike(victim)
        late = []
        for _ in range(CLIENTS):
            late.append(pool.submit(client.completions.create, model="parrot", **SHORT))
            time.sleep(0.1)
        texts = [future.result(120) for future in early]
        answers = [future.result(120).choices[0].text for future in late]
    heal(running, victim, strike)
    assert at_work, "the streams were too short for this machine"
    assert texts == [undisturbed] * CLIENTS
    assert answers == [answer] * CLIENTS


def stream(client: openai.OpenAI, on_first: Callable[[], object]) -> tuple[str, str, int]:
    """Text, finish reason and number of tokens of one long answer."""
    events = client.completions.create(
        model="parrot",
        prompt=COUNT,
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"min_tokens": TOKENS},
    )
    text, finish, used = "", "", 0
    for event in events:
        if not event.choices:
            used = event.usage.completion_tokens if event.usage else 0
            continue
        if not text:
            on_first()
        text += event.choices[0].text
        finish = event.choices[0].finish_reason or finish
    return text, finish, used


def heal(running: Endpoint, victim: Replica, strike: Callable[[Replica], None]) -> None:
    """What was lost is started again; a worker finds its Triton again by itself."""
    if strike in (kill_triton, kill_stub):
        until(lambda: len(running.seen()) == 1)
        victim.restart_triton()
        until(lambda: len(running.seen()) == 2, 60)
    else:
        assert victim.worker is not None
        if strike is drain_worker:
            assert victim.worker.wait(30) == 0
        victim.worker.kill()
        before = set(running.seen())
        victim.start_worker()
        until(lambda: bool(set(running.seen()) - before), 60)
