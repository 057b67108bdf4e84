"""A replica with a draft engine beside its engine: two stand-ins behind a real Triton, asked as a worker asks them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.parrot import SENTENCES
from tests.e2e.test_speculation import QUALITIES, TOKENS, Pair, expected, serving
from tests.fleet.test_worker import Client
from toolchain.fleet import wire
from toolchain.fleet.front.texts import Parameters, Texts
from toolchain.fleet.worker.dialect import dialect
from toolchain.fleet.worker.drafted import Drafted
from toolchain.fleet.worker.worker import Adapter, make_triton
from toolchain.gateway.failures import ApiError
from toolchain.gateway.settings import Timeouts
from toolchain.gateway.triton import make_session

pytestmark = pytest.mark.timeout(180)


class Replica:
    """The pair, and what the gateway's side makes of its tokens."""

    def __init__(self, pair: Pair, folder: Path) -> None:
        self.pair = pair
        told = json.loads((folder / "repository" / "repository.json").read_text())
        self.parameters: dict[str, Any] = told["parameters"]
        self.texts = Texts(folder / "tokenizer", Parameters.of(self.parameters))

    def ask(self, client: Client | None = None, **inputs: Any) -> list[dict[str, Any]]:
        """The events of one answer."""
        (ask,) = self.texts.asks(inputs)
        answer = self.texts.answer(ask, 0, inputs)
        events = []
        for item in asyncio.run(self._items(ask, client or Client())):
            assert not (refusal := wire.refused(item)), refusal
            answer.metrics.update(wire.metrics_of(item))
            if item["token_ids"]:
                events.append(answer.push(item["token_ids"], None))
            if answer.stopped:
                break
        return [*events, answer.finish()]

    async def _items(self, ask: wire.Ask, client: Client) -> list[wire.Item]:
        async with make_session(Timeouts()) as session:
            triton = make_triton(f"http://127.0.0.1:{self.pair.served.http_port}", session, Timeouts())
            assert await triton.probe()
            self.pair.forget()  # that, too, was asked of the engine
            drafted = Drafted(triton, self.parameters)
            adapter = Adapter(triton, spoken=dialect(self.parameters), drafted=drafted)
            items = []
            async for item in adapter.generate(wire.request(ask, "m"), client):
                items.append(item)
                if item["token_ids"] and client.goes:
                    client.gone = True
            await asyncio.sleep(0.2 if client.goes else 0)
            return items


class Goes(Client):
    """A client that goes after its first tokens."""

    goes = True


@pytest.fixture(scope="module", params=["0.12.0", "1.2.1"])
def replica(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    folder = tmp_path_factory.mktemp("pair")
    with serving(folder, request.param, door="http") as pair:
        yield Replica(pair, folder)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("quality", QUALITIES)
def test_the_text_is_the_engines_and_the_draft_is_worth_what_it_deserves(
    replica: Replica, quality: str, number: int
) -> None:
    prompt, case = f"{quality} {number}:", replica.pair.cases[f"{quality} {number}:"]
    events = replica.ask(text_input=prompt, max_tokens=80, stream=True)
    assert "".join(event["text_output"] for event in events) == SENTENCES[number]
    last = events[-1]
    told = last["total_accepted_draft_tokens"][0], last["total_draft_tokens"][0]
    assert told == expected(case, 80)
    assert len(replica.pair.asked("engine")) < len(case["answer"]) or quality == "useless"


def test_the_tensors_are_those_of_the_release(replica: Replica) -> None:
    replica.ask(text_input="perfect 0:", max_tokens=20, temperature=0.5, seed=7)
    engine, draft = (replica.pair.asked(role)[0]["tensors"] for role in ("engine", "draft"))
    old = replica.pair.release == "0.12.0"
    assert draft["min_length" if old else "min_tokens"] == [TOKENS]
    assert engine["random_seed" if old else "seed"] == [7 + len(replica.pair.cases["perfect 0:"]["prompt"])]
    assert engine["draft_input_ids"] == replica.pair.cases["perfect 0:"]["answer"][:TOKENS]


def test_without_a_draft_the_engine_is_asked_by_its_own_names_too(replica: Replica) -> None:
    replica.ask(text_input="perfect 0:", max_tokens=20, top_p=0.5, seed=7, min_tokens=2, num_draft_tokens=0)
    (asked,) = (line["tensors"] for line in replica.pair.asked("engine"))
    old = replica.pair.release == "0.12.0"
    assert (asked["random_seed" if old else "seed"], asked["min_length" if old else "min_tokens"]) == ([7], [2])
    assert replica.pair.asked("draft") == []


def test_a_continued_answer_is_drafted_on(replica: Replica) -> None:
    """As after a failover: the prompt and the tokens so far, and fewer that are left."""
    (ask,) = replica.texts.asks({"text_input": "perfect 0:", "max_tokens": 80})
    ids = replica.pair.cases["perfect 0:"]["answer"]
    rest = wire.Ask((*ask.ids, *ids[:10]), 70, ask.tensors, ask.prompt_tokens, ask.draft_tokens)
    found = asyncio.run(replica._items(rest, Client()))
    assert [token for item in found for token in item["token_ids"]][: len(ids) - 10] == ids[10:]


def test_a_stop_word_inside_an_accepted_run_ends_the_text(replica: Replica) -> None:
    events = replica.ask(text_input="perfect 0:", max_tokens=80, stop_words=["apital"], stream=True)
    assert "".join(event["text_output"] for event in events) == SENTENCES[0][: SENTENCES[0].index("apital")]


def test_a_client_that_goes_stops_the_engines(replica: Replica) -> None:
    replica.ask(Goes(), text_input="slow engine:", max_tokens=90)
    asked = len(replica.pair.asked("engine"))
    assert asked < 15
    replica.ask(text_input="useless 0:", max_tokens=4)
    assert len(replica.pair.asked("engine")) <= 4 + 1


def test_more_drafts_than_the_engine_is_built_for_are_refused(replica: Replica) -> None:
    with pytest.raises(ApiError, match="built for 0 to 4"):
        replica.texts.asks({"text_input": "a", "max_tokens": 5, "num_draft_tokens": TOKENS + 1})
