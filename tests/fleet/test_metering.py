"""Promises about the books of a real endpoint: they agree with what its clients were told, also after a loss."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import openai
import pytest

from tests.e2e.test_triton_models import CAPITAL, JAPAN
from tests.fleet.endpoint import Endpoint, signal_worker, until
from tests.fleet.test_failover import TOKENS, heal, kill_worker, stream
from toolchain.ledger.checking import verify
from toolchain.ledger.totals import Total, report

pytestmark = pytest.mark.timeout(180)
BODIES: list[dict[str, Any]] = [
    {"prompt": CAPITAL, "max_tokens": 60, "temperature": 0},
    {"prompt": [CAPITAL, JAPAN], "max_tokens": 20, "temperature": 0},
    {"prompt": JAPAN, "max_tokens": 15, "temperature": 1.5, "seed": 3, "n": 3},
]


@contextmanager
def booked(running: Endpoint) -> Iterator[dict[str, Total]]:
    """What was booked to each replica within a ``with`` block; filled in at its end."""
    path = running.replicas[0].work.parent / "ledger.sqlite"
    show(running)
    running.meter.flush()
    before = report(path, ("replica",)).groups
    found: dict[str, Total] = {}
    yield found
    show(running)
    running.meter.flush()
    for (name,), after in report(path, ("replica",)).groups.items():
        old = before.get((name,), Total())
        found[name] = Total(**{field: getattr(after, field) - getattr(old, field) for field in vars(after)})
    assert verify(path, running.meter.head).sound


def show(running: Endpoint) -> None:
    """A look at the board."""
    said = [{"name": one.work.name, "state": one.state} for one in running.replicas]
    node = {"node": "n1", "provider": "anna", "device": "cpu", "gpus": 0, "price_per_hour": 0.4, "replicas": said}
    running.meter.tick({"nodes/n1": node})


def test_the_books_say_what_the_clients_were_told(running: Endpoint) -> None:
    client = openai.OpenAI(base_url=running.gateway.url, api_key="x", max_retries=0, timeout=60)
    with booked(running) as found:
        used = [client.completions.create(model="parrot", **body).usage for body in BODIES]
    assert sum(one.tokens_in for one in found.values()) == sum(one.prompt_tokens for one in used if one)
    assert sum(one.tokens_out for one in found.values()) == sum(one.completion_tokens for one in used if one)
    assert sum(one.requests for one in found.values()) == 4  # of one body with two prompts, two
    assert set(found) == {"r0", "r1"}


def test_answers_that_went_on_elsewhere_are_booked_to_both_in_parts(running: Endpoint) -> None:
    client = openai.OpenAI(base_url=running.gateway.url, api_key="x", max_retries=0, timeout=120)
    begun = threading.Semaphore(0)
    with booked(running) as found, ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(stream, client, begun.release) for _ in range(4)]
        for _ in streams:
            assert begun.acquire(timeout=60)
        signal_worker(running.replicas[0], signal.SIGKILL)
        used = [one.result(120)[2] for one in streams]
    heal(running, running.replicas[0], kill_worker)
    assert used == [TOKENS] * 4
    assert found["r0"].requests + found["r1"].requests == 4
    assert found["r1"].continued == found["r0"].requests > 0
    assert 0 < found["r0"].tokens_out < found["r0"].requests * TOKENS
    assert found["r0"].tokens_out + found["r1"].tokens_out == 4 * TOKENS


def test_a_worker_tells_the_figures_of_its_engine(running: Endpoint) -> None:
    client = openai.OpenAI(base_url=running.gateway.url, api_key="x", max_retries=0, timeout=60)
    client.completions.create(model="parrot", prompt=CAPITAL, max_tokens=20)
    until(lambda: any(one.told.get("figures", {}).get("tokens") for one in running.replicas))
    for one in running.replicas:
        figures = one.told["figures"]
        assert figures["kv_blocks"]["total"] > 0
        assert 'nv_inference_request_success{model="tensorrt_llm"' in figures["metrics"]
        assert "preprocessing" not in figures["metrics"]
