"""The worker's side against a Triton that the test writes: heartbeats, losses, room, and what it cancels."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from toolchain.fleet import wire
from toolchain.fleet.worker.pieces import APART_S, Waiting
from toolchain.fleet.worker.worker import Adapter, LostError, make_triton
from toolchain.gateway.settings import Timeouts
from toolchain.gateway.triton import make_session

Handler = Callable[[dict[str, Any], web.StreamResponse], Awaitable[None]]
ASK = wire.request(wire.Ask((5, 6), 3, {"end_id": [1]}, prompt_tokens=2), "m")


class Client:
    """What Dynamo tells a worker of its client."""

    gone = False
    goes = False
    """Whether it goes after its first tokens."""

    def is_stopped(self) -> bool:
        return self.gone


class Scene:
    """A Triton whose answers ``handler`` writes, and the adapter in front of it."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.closed = asyncio.Event()
        self.handler: Handler = count
        self.adapter: Adapter

    async def stream(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        self.asked.append(body)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        try:
            await self.handler(body, response)
        except (asyncio.CancelledError, ConnectionError):
            self.closed.set()
            raise
        return response

    async def items(self, found: dict[str, Any] = ASK, client: Client | None = None) -> list[wire.Item]:
        return [item async for item in self.adapter.generate(found, client or Client())]


@asynccontextmanager
async def scene() -> AsyncIterator[Scene]:
    found = Scene()
    app = web.Application()
    app.router.add_get("/v2/models/tensorrt_llm/config", config)
    app.router.add_post("/v2/models/tensorrt_llm/generate", one_token)
    app.router.add_post("/v2/models/tensorrt_llm/generate_stream", found.stream)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        async with make_session(Timeouts()) as session:
            triton = make_triton(f"http://127.0.0.1:{port}", session, Timeouts())
            assert await triton.probe()
            found.adapter = Adapter(triton, frozenset({1, 2}), replica="one")
            yield found
    finally:
        await runner.cleanup()


async def config(_http: web.Request) -> web.Response:
    return web.json_response({"input": [{"name": "input_ids"}], "output": [{"name": "output_ids"}]})


async def one_token(_http: web.Request) -> web.Response:
    return web.json_response({"output_ids": 7})


async def write(response: web.StreamResponse, *ids: int, **more: Any) -> None:
    event = {"output_ids": list(ids) if len(ids) > 1 else ids[0], "sequence_length": len(ids), **more}
    await response.write(f"data: {json.dumps(event)}\n\n".encode())


async def count(body: dict[str, Any], response: web.StreamResponse) -> None:
    for number in range(body["request_output_len"]):
        await write(response, body["input_ids"][-1] + number + 1, output_log_probs=-0.5)


def told(items: list[wire.Item]) -> list[wire.Item]:
    """Without those that only say that it lives and who it is."""
    return [item for item in items if item not in (wire.item([]), wire.begun("one"))]


def test_tokens_go_through_with_log_probs_and_the_last_has_the_reason() -> None:
    async def slow(body: dict[str, Any], response: web.StreamResponse) -> None:
        for number in range(body["request_output_len"]):
            await write(response, body["input_ids"][-1] + number + 1, output_log_probs=-0.5)
            await asyncio.sleep(5 * APART_S)

    async def play() -> list[wire.Item]:
        async with scene() as found:
            found.handler = slow
            return told(await found.items())

    assert asyncio.run(play()) == [
        wire.item([7], [-0.5]),
        wire.item([8], [-0.5]),
        wire.item([9], [-0.5], "length"),
    ]


def test_tokens_that_come_together_go_together_and_none_is_lost_or_counted_twice() -> None:
    async def play() -> tuple[list[wire.Item], int]:
        async with scene() as found:
            sent = wire.request(wire.Ask((5, 6), 300, {"end_id": [1]}, prompt_tokens=2), "m")
            return told(await found.items(sent)), found.adapter.tokens

    items, counted = asyncio.run(play())
    assert [one for item in items for one in item["token_ids"]] == list(range(7, 307))
    assert all(len(item["log_probs"]) == len(item["token_ids"]) for item in items)
    assert [item.get("finish_reason") for item in items] == [None] * (len(items) - 1) + ["length"]
    assert counted == 300


def test_a_lonely_event_and_the_end_never_wait_for_others() -> None:
    async def play() -> list[list[Any]]:
        waiting = Waiting(apart_s=3600)
        waiting.put("first")
        found = [await waiting.take(1)]
        for event in ("second", "third"):
            waiting.put(event)
        found.append(await waiting.take(0.01))  # it says at least so often what it has
        waiting.put(None)
        return [*found, await waiting.take(3600)]

    assert asyncio.run(asyncio.wait_for(play(), 30)) == [["first"], ["second", "third"], [None]]


def test_what_had_come_before_an_answer_was_cut_is_told_before_it_is_handed_over() -> None:
    async def cut(_body: dict[str, Any], response: web.StreamResponse) -> None:
        await write(response, 7)
        await write(response, 8)
        await write(response, 9, 10)
        assert response._req is not None
        assert response._req.transport is not None
        response._req.transport.close()

    async def play() -> list[int]:
        async with scene() as found:
            found.handler = cut
            seen: list[int] = []
            sent = wire.request(wire.Ask((5, 6), 30, {"end_id": [1]}, prompt_tokens=2), "m")

            async def read() -> None:
                async for item in found.adapter.generate(sent, Client()):
                    seen.extend(item["token_ids"])

            with pytest.raises(LostError):
                await read()
            return seen

    assert asyncio.run(asyncio.wait_for(play(), 30)) == [7, 8, 9, 10]


def test_any_end_id_of_the_model_ends_an_answer_in_the_item_that_holds_it() -> None:
    """Else a worker that dies between the two would have the answer continued behind its end."""

    async def end(_body: dict[str, Any], response: web.StreamResponse) -> None:
        await write(response, 9, 2)

    async def play() -> list[wire.Item]:
        async with scene() as found:
            found.handler = end
            return told(await found.items())

    assert asyncio.run(play()) == [wire.item([9, 2], None, "eos")]


def test_a_silent_request_says_that_its_worker_lives() -> None:
    async def slow(body: dict[str, Any], response: web.StreamResponse) -> None:
        await asyncio.sleep(1.3)
        await count(body, response)

    async def play() -> list[wire.Item]:
        async with scene() as found:
            found.handler = slow
            return await found.items()

    items = asyncio.run(play())
    assert items[:3] == [wire.begun("one"), wire.item([]), wire.item([])]
    assert told(items)[-1]["finish_reason"] == "length"


def test_a_cut_answer_is_handed_over_after_the_worker_has_taken_itself_back() -> None:
    async def cut(_body: dict[str, Any], response: web.StreamResponse) -> None:
        await write(response, 7)
        assert response._req is not None
        assert response._req.transport is not None
        response._req.transport.close()

    async def play() -> tuple[list[wire.Item], list[bool], bool]:
        async with scene() as found:
            found.handler = cut
            changes: list[bool] = []

            async def on_change(up: bool) -> None:
                changes.append(up)

            looking = asyncio.create_task(found.adapter.look_after(on_change))
            items = []
            lost = False
            try:
                async for item in found.adapter.generate(ASK, Client()):
                    items.append(item)
            except LostError:
                lost = changes == [False]
            while changes != [False, True]:
                await asyncio.sleep(0.05)
            looking.cancel()
            return told(items), changes, lost

    items, changes, lost = asyncio.run(asyncio.wait_for(play(), 30))
    assert items == [wire.item([7])]
    assert lost
    assert changes == [False, True]


def test_a_client_that_has_gone_is_cancelled_in_the_triton() -> None:
    async def endless(_body: dict[str, Any], response: web.StreamResponse) -> None:
        while True:
            await write(response, 7)
            await asyncio.sleep(0.01)

    async def play() -> int:
        async with scene() as found:
            found.handler, client = endless, Client()
            sent = wire.request(wire.Ask((5,), 10**6, {}, 1), "m")
            seen = 0
            async for item in found.adapter.generate(sent, client):
                seen += len(item["token_ids"])
                client.gone = seen > 5
            await asyncio.wait_for(found.closed.wait(), 10)
            return found.adapter.running

    assert asyncio.run(play()) == 0


def test_a_refusal_is_told_and_not_tried_elsewhere() -> None:
    async def refuse(_body: dict[str, Any], response: web.StreamResponse) -> None:
        text = "request_output_len (client input max_tokens): 0, must be at least 1"
        await response.write(f"data: {json.dumps({'error': text})}\n\n".encode())

    async def play() -> list[wire.Item]:
        async with scene() as found:
            found.handler = refuse
            return told(await found.items())

    (item,) = asyncio.run(play())
    refused = wire.refused(item)
    assert refused is not None
    assert (refused["status"], refused["param"]) == (400, "max_tokens")


def test_a_continued_request_waits_for_room_longer_than_a_new_one() -> None:
    async def busy(_body: dict[str, Any], response: web.StreamResponse) -> None:
        text = "64 requests are running or waiting, and this server takes no more: try again later"
        await response.write(f"data: {json.dumps({'error': text})}\n\n".encode())

    async def play() -> list[wire.Item]:
        async with scene() as found:
            found.handler = busy
            new = told(await found.items())
            sent = wire.request(wire.Ask((5, 6, 7), 3, {}, prompt_tokens=2), "m")
            waiting = asyncio.create_task(found.items(sent))
            await asyncio.sleep(2)
            assert not waiting.done()
            found.handler = count
            return new + told(await waiting)

    items = asyncio.run(play())
    assert (wire.refused(items[0]) or {})["status"] == 429
    assert items[-1]["finish_reason"] == "length"


@pytest.mark.parametrize("drained", [True, False])
def test_what_runs_when_the_drain_is_over_is_handed_over(drained: bool) -> None:
    async def slow(_body: dict[str, Any], response: web.StreamResponse) -> None:
        for token in (7, 8, 9):
            await write(response, token)
            await asyncio.sleep(0.3)

    async def play() -> list[wire.Item]:
        async with scene() as found:
            found.handler = slow
            waiting = asyncio.create_task(found.items())
            await asyncio.sleep(0.2)
            if not drained:
                found.adapter.leaving.set()
            return told(await waiting)

    if drained:
        assert asyncio.run(play())[-1]["finish_reason"] == "length"
    else:
        with pytest.raises(LostError):
            asyncio.run(play())
