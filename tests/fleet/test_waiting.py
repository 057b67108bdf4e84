"""Requests that wait for a place are load: an endpoint has one replica more before its queue is full."""

from __future__ import annotations

import asyncio
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import openai
from starlette.requests import Request

from tests.conftest import unused_ports
from tests.e2e.test_triton_models import CAPITAL
from tests.fleet.endpoint import ENDPOINT, Endpoint, until
from tests.fleet.test_failover import stream
from tests.fleet.test_head import Scene
from tests.gateway.behind_gateway import settings_for
from toolchain.fleet.front.front import Fleet, steered
from toolchain.fleet.front.texts import Parameters, Texts
from toolchain.fleet.front.traffic import Course, Lane, Traffic
from toolchain.fleet.plane import Plane
from toolchain.fleet.worker.membership import TOKENIZER
from toolchain.gateway.logs import Log
from toolchain.gateway.run import Listen, background
from toolchain.gateway.service import Service
from toolchain.gateway.settings import Limits
from toolchain.gateway.visit import Visit
from toolchain.repository import Repository

INPUTS = {"text_input": CAPITAL, "max_tokens": 4}


def texts_of(repository: Path) -> Texts:
    return Texts(repository / TOKENIZER, Parameters.of(Repository.open(repository).parameters))


class Busy(Scene):
    """A head whose one replica takes one request, and which would count a thousand tokens as few."""

    def __init__(self, folder: Path, texts: Texts) -> None:
        self.texts = texts
        super().__init__(folder, min=1, max=3, target_tokens_in_flight=1000)

    def lane(self, version: object) -> Lane:
        return Lane("e", self.texts, 1)


def test_what_waits_in_the_gateways_queue_brings_a_replica_and_then_has_its_place(
    parrot: Path, repository: Path, tmp_path: Path
) -> None:
    scene = Busy(tmp_path, texts_of(repository))
    settings = settings_for(parrot, limits=Limits(max_queue=8))
    prompt = len(scene.texts.asks(INPUTS)[0].ids)

    async def play() -> None:
        service = Service(settings)
        service.pool = Fleet(Plane(tmp_path, "e"), scene.traffic, settings, on_retry=lambda *_: None)

        def visit() -> asyncio.Task[None]:
            http = Request({"type": "http", "headers": [], "client": None})
            return asyncio.create_task(Visit(service, http, "test").enter(INPUTS))

        await asyncio.to_thread(scene.rounds)
        await visit()
        with scene.traffic.use(prompt):  # as its answer has it from then on
            waiting = [visit(), visit()]
            while scene.traffic.tokens < 3 * prompt:
                await asyncio.sleep(0.01)
            assert (service.admission.running, service.admission.waiting) == (1, 2)
            load = scene.traffic.load()
            assert (load.requests, load.tokens, load.room, load.idle_s) == (3, 3 * prompt, 1, 0)
            await asyncio.to_thread(scene.rounds)
            assert [version for _, version in scene.assigned()] == [1, 1, 1]
            await asyncio.gather(*waiting)
            assert (service.admission.running, service.admission.waiting) == (3, 0)
        assert (scene.traffic.load().requests, scene.traffic.load().tokens) == (0, 0)

    asyncio.run(asyncio.wait_for(play(), 60))


def test_a_client_in_the_queue_is_counted_until_it_goes(running: Endpoint, parrot: Path, repository: Path) -> None:
    """Through the doors, to real replicas."""
    lane = Lane(ENDPOINT, texts_of(repository), 1)
    traffic = Traffic(Course({lane.name: lane}, lane.name))
    settings = settings_for(parrot, limits=Limits(max_queue=1))
    settings = replace(settings, timeouts=replace(settings.timeouts, patience_s=30))
    plane = Plane(Path(running.replicas[0].spec.discovery), ENDPOINT)
    listen = Listen(port=unused_ports(1)[0], predict_port=None)
    begun = threading.Semaphore(0)
    with background(settings, listen, log=Log(), engines=steered(plane, traffic)), ThreadPoolExecutor(2) as pool:
        client = openai.OpenAI(base_url=listen.urls["OpenAI"], api_key="x", max_retries=0, timeout=60)
        first = pool.submit(stream, client, begun.release)
        assert begun.acquire(timeout=60)
        second = pool.submit(client.completions.create, model="parrot", prompt=CAPITAL, max_tokens=4)
        until(lambda: traffic.load().requests == 2, 20)
        with urllib.request.urlopen(f"{listen.urls['OpenAI'].removesuffix('/v1')}/metrics") as answer:
            assert "\nscalellm_gateway_waiting 1.0\n" in answer.read().decode()
        assert first.result(60)
        assert second.result(60).choices[0].finish_reason == "length"
        until(lambda: traffic.load().requests == traffic.load().tokens == 0, 20)
