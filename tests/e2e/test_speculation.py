"""Speculative decoding through the real Triton: two stand-ins that know answers by heart, the draft not quite.

The repository is the packaged one but for the backend of its two engine models.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import triton_contract
from tests.e2e.parrot import EOS, SENTENCES, write_tokenizer
from tests.e2e.served import Served, ServerError
from tests.engine_folder import DRAFTED as TOKENS
from tests.engine_folder import write_pair
from toolchain.servers.triton.locate import find_server
from toolchain.servers.triton.ports import free_ports
from toolchain.servers.triton.supervisor import Supervisor
from toolchain.stages.package import package
from toolchain.workspace import shipped

pytestmark = pytest.mark.timeout(180)
BLS = "tensorrt_llm_bls"
QUALITIES = {"perfect": lambda _place: False, "half": lambda place: place % 3 == 2, "useless": lambda _place: True}
LONG = "one two three four five six seven eight nine ten " * 10
"""For a draft that ends before the engine does, and for what is cut off in the middle."""


@dataclass(frozen=True)
class Pair:
    """A served repository, what its engines were asked, and what they know."""

    served: Served
    journals: dict[str, Path]
    cases: dict[str, dict[str, Any]]
    release: str

    def lines(self, role: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.journals[role].read_text().splitlines()]

    def asked(self, role: str) -> list[dict[str, Any]]:
        return [line for line in self.lines(role) if "asked" in line]

    def forget(self) -> None:
        for journal in self.journals.values():
            journal.write_text("")

    def wait_for(self, role: str, key: str) -> None:
        deadline = time.monotonic() + 20
        while not any(key in line for line in self.lines(role)):
            assert time.monotonic() < deadline, self.lines(role)
            time.sleep(0.02)


def write_cases(tokenizer: Any) -> dict[str, dict[str, Any]]:
    """Prompt -> what both engines know of it; ``wrong`` is the draft's."""
    texts = [
        (f"{name} {number}:", text, QUALITIES[name]) for name in QUALITIES for number, text in enumerate(SENTENCES[:2])
    ]
    texts += [("long:", LONG, QUALITIES["perfect"]), ("slow engine:", LONG, QUALITIES["perfect"])]
    texts += [("slow draft:", LONG, QUALITIES["perfect"])]
    cases = {}
    for prompt, text, wrong in texts:
        answer = tokenizer(text).input_ids[1:]
        places = [place for place in range(400) if wrong(place)]
        cases[prompt] = {"prompt": tokenizer(prompt).input_ids, "answer": answer, "wrong": places}
    return cases


@pytest.fixture(scope="module", params=[("0.12.0", "line"), ("1.2.1", "http")], ids="-".join)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    release, door = request.param
    with serving(tmp_path_factory.mktemp("pair"), release, door=door) as found:
        yield found


@contextmanager
def serving(folder: Path, release: str, *, door: str) -> Iterator[Pair]:
    tokenizer = write_tokenizer(folder / "tokenizer")
    cases = write_cases(tokenizer)
    engine, draft = write_pair(folder, release, folder / "tokenizer")
    package(engine, folder / "repository", draft=draft, parameters={"engine_door": door})
    journals = {role: folder / f"{role}.jsonl" for role in ("engine", "draft")}
    for role, model, longest in (("engine", "tensorrt_llm", 256), ("draft", "tensorrt_llm_draft", 96)):
        journals[role].touch()
        known = [
            {**case, "wrong": case["wrong"] if role == "draft" else [], "slow": prompt == f"slow {role}:"}
            for prompt, case in cases.items()
        ]
        known.append({"prompt": [], "answer": tokenizer("x" * 200).input_ids, "wrong": [], "slow": False})
        stand_in(folder / "repository" / model, release, known, journals[role], longest)
    server, ports = find_server("bundled", environ=os.environ), free_ports()
    supervisor = Supervisor(server, folder / "repository", ports, log=folder / "triton.log", exit_timeout_s=3)
    supervisor.start()
    try:
        yield Pair(Served(ports.http, ports.grpc, folder / "none"), journals, cases, release)
    finally:
        supervisor.kill()


def stand_in(model: Path, release: str, cases: list[dict[str, Any]], journal: Path, max_seq_len: int) -> None:
    """Nothing but the backend is replaced."""
    emitted = (model / "config.pbtxt").read_text()
    assert emitted.count('backend: "tensorrtllm"') == 1
    (model / "config.pbtxt").write_text(emitted.replace('backend: "tensorrtllm"', 'backend: "python"'))
    shutil.copyfile(Path(__file__).parent / "stand_in" / "pair.py", model / "1" / "model.py")
    shutil.copyfile(shipped("model_repo_templates") / "common" / "shared" / "channel.py", model / "1" / "channel.py")
    script = {
        "inputs": triton_contract.inputs(release),
        "cases": cases,
        "journal": str(journal),
        "longest_draft": TOKENS,
        "max_seq_len": max_seq_len,
    }
    (model / "1" / "script.json").write_text(json.dumps(script))


def expected(case: dict[str, Any], count: int) -> tuple[int, int]:
    """(accepted, drafted) by the definition: a step accepts what the draft has right, and adds one token."""
    answer, place, accepted, drafted = len(case["answer"]), 0, 0, 0
    while (room := min(TOKENS, count - place - 1, 96 - len(case["prompt"]) - place)) > 0:
        good = next((n for n in range(room) if place + n in case["wrong"]), room)
        drafted += room
        if place + good >= answer:  # the engine ends within what was drafted
            return accepted + answer - place, drafted
        accepted, place = accepted + good, place + good + 1
    return accepted, drafted


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("quality", QUALITIES)
def test_text_is_that_of_the_engine_alone_and_acceptance_is_what_the_draft_deserves(
    pair: Pair, quality: str, number: int, stream: bool
) -> None:
    prompt, case = f"{quality} {number}:", pair.cases[f"{quality} {number}:"]
    request = {"text_input": prompt, "max_tokens": 80}
    alone = pair.served.generate(BLS, **request, num_draft_tokens=0)
    assert alone["text_output"] == SENTENCES[number]
    assert alone["total_draft_tokens"] == 0
    pair.forget()
    if stream:
        with pair.served.streaming(BLS, **request) as events:
            answers = list(events)
        assert len(answers) > 1
    else:
        answers = [pair.served.generate(BLS, **request)]
    assert "".join(one["text_output"] for one in answers) == SENTENCES[number]
    accepted, drafted = expected(case, 80)
    last = answers[-1]
    assert (last["total_accepted_draft_tokens"], last["total_draft_tokens"]) == (accepted, drafted)
    assert last["acceptance_rate"] == pytest.approx(accepted / drafted, rel=1e-6)
    steps = len(pair.asked("engine"))
    assert len(case["answer"]) - accepted <= steps <= len(case["answer"]) - accepted + 1


def test_tensors_are_those_of_the_release(pair: Pair) -> None:
    pair.forget()
    pair.served.text(BLS, text_input="perfect 0:", max_tokens=20, temperature=0.5, seed=7)
    engine, draft = pair.asked("engine")[0]["tensors"], pair.asked("draft")[0]["tensors"]
    old = pair.release == "0.12.0"
    assert draft["min_length" if old else "min_tokens"] == [TOKENS]
    assert engine["random_seed" if old else "seed"] == [7 + len(pair.cases["perfect 0:"]["prompt"])]
    assert draft["runtime_top_k"] == [1]
    assert "temperature" not in draft
    assert engine["end_id"] == draft["end_id"] == [EOS]
    assert engine["draft_input_ids"] == pair.cases["perfect 0:"]["answer"][:TOKENS]
    assert engine["request_output_len"] == [TOKENS + 1]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7])
def test_answer_has_as_many_tokens_as_were_asked_for(pair: Pair, count: int) -> None:
    request = {"text_input": "perfect 0:", "max_tokens": count}
    alone = pair.served.text(BLS, **request, num_draft_tokens=0)
    pair.forget()
    assert pair.served.text(BLS, **request) == alone
    assert all(line["asked"] <= count for line in pair.asked("engine"))


@pytest.mark.parametrize("stop", ["river", " is the", "apital", "."])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_word_inside_an_accepted_run_cuts_the_text_where_the_engine_alone_is_cut(
    pair: Pair, stop: str, stream: bool
) -> None:
    request = {"text_input": "perfect 0:", "max_tokens": 80, "stop_words": [stop]}
    alone = pair.served.text(BLS, **request, num_draft_tokens=0)
    assert alone == SENTENCES[0][: SENTENCES[0].index(stop)]
    pair.forget()
    found = "".join(pair.served.pieces(BLS, **request)) if stream else pair.served.text(BLS, **request)
    assert found == alone
    said = len(pair.cases["perfect 0:"]["answer"])
    assert all(line["place"] < said - 1 or stop == "." for line in pair.asked("engine"))


def test_engine_goes_on_alone_where_the_sequence_is_too_long_for_the_draft(pair: Pair) -> None:
    pair.forget()
    with pair.served.streaming(BLS, text_input="long:", max_tokens=140) as events:
        answers = list(events)
    case = pair.cases["long:"]
    assert len(case["prompt"]) + len(case["answer"]) > 96 + TOKENS
    assert "".join(one["text_output"] for one in answers) == LONG
    *steps, rest = pair.asked("engine")
    assert all(line["draft"] for line in steps)
    assert not rest["draft"]
    assert len(answers) - len(steps) > 10, "the rest is streamed token by token"
    assert (answers[-1]["total_accepted_draft_tokens"], answers[-1]["total_draft_tokens"]) == expected(case, 140)


@pytest.mark.parametrize("role", ["engine", "draft"])
def test_client_that_goes_away_stops_the_engine_that_is_at_work_and_nothing_is_asked_after_it(
    pair: Pair, role: str
) -> None:
    pair.forget()
    with pair.served.streaming(BLS, text_input=f"slow {role}:", max_tokens=90) as events:
        next(events)
    pair.wait_for("engine" if role == "engine" else "draft", "asked")
    time.sleep(1.0)
    asked = len(pair.asked("engine")), len(pair.asked("draft"))
    time.sleep(0.5)
    assert (len(pair.asked("engine")), len(pair.asked("draft"))) == asked
    stops = [line for name in pair.journals for line in pair.lines(name) if "stop" in line or "gone" in line]
    assert asked[0] < 15, stops
    assert pair.served.text(BLS, text_input="perfect 0:", max_tokens=80) == SENTENCES[0]


@pytest.mark.parametrize(
    ("tensor", "value", "said"),
    [
        ("use_draft_logits", True, "use_draft_logits: drafts are compared by their tokens"),
        ("num_draft_tokens", TOKENS + 1, "built for 0 to 4"),
    ],
)
def test_what_drafts_cannot_do_is_refused_by_name(pair: Pair, tensor: str, value: Any, said: str) -> None:
    with pytest.raises(ServerError, match=said):
        pair.served.generate(BLS, text_input="perfect 0:", max_tokens=5, **{tensor: value})


def test_beams_and_drafts_exclude_each_other_and_penalties_are_answered_without_a_draft(pair: Pair) -> None:
    with pytest.raises(ServerError, match="num_draft_tokens: not together with repetition_penalty"):
        pair.served.generate(BLS, text_input="perfect 0:", max_tokens=5, num_draft_tokens=2, repetition_penalty=1.5)
    pair.forget()
    answer = pair.served.generate(BLS, text_input="perfect 0:", max_tokens=80, repetition_penalty=1.5)
    assert answer["text_output"] == SENTENCES[0]
    assert answer["total_draft_tokens"] == 0
    assert pair.asked("draft") == []


def test_many_streams_at_once_get_their_own_text(pair: Pair) -> None:
    def ask(number: int) -> bool:
        prompt = f"{list(QUALITIES)[number % 3]} {number % 2}:"
        return "".join(pair.served.pieces(BLS, text_input=prompt, max_tokens=80)) == SENTENCES[number % 2]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(96)))


def test_triton_itself_carries_the_drafts_too(tmp_path: Path) -> None:
    """The way for what JSON cannot carry, for as few calls as show that the tensors pass: see ``http_door.py``."""
    with serving(tmp_path, "1.2.1", door="bls") as pair:
        answer = pair.served.generate(BLS, text_input="perfect 0:", max_tokens=10)
        ids = pair.cases["perfect 0:"]["answer"]
        assert SENTENCES[0].startswith(answer["text_output"])
        assert (answer["total_accepted_draft_tokens"], answer["total_draft_tokens"]) == (8, 8)
        assert [line["draft"] for line in pair.asked("engine")][-2:] == [ids[:4], ids[5:9]]
