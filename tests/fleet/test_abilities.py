"""What an engine can do, it can do behind an endpoint: guides, adapters by name, drafts, several answers."""

from __future__ import annotations

import json
import signal
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.served import Served
from tests.e2e.test_cpu_speculation import PROMPTS, RECIPE
from tests.e2e.test_guided import ADAPTERS, asked, fits
from tests.e2e.test_triton_models import CAPITAL, Reference, make_engine
from tests.fleet.endpoint import Endpoint, Replica, as_served, endpoint, one_triton, signal_worker, until
from tests.gateway.test_kserve import BLS, over_grpc, streamed, whole
from tests.lora import merged, write_adapter
from toolchain import workspace
from toolchain.adapters import open_adapter
from toolchain.checkpoint import Checkpoint
from toolchain.pipeline import Job
from toolchain.progress import Silent
from toolchain.recipe import load_recipe
from toolchain.stages.package import package

pytestmark = pytest.mark.timeout(180)
TOO_LONG = 3000
"""Tokens; a prompt may have 512."""
ASKED: list[dict[str, Any]] = [
    asked("json_schema", seed=1),
    asked("regex", seed=2),
    {
        "text_input": CAPITAL,
        "max_tokens": 20,
        "lora_task_id": 2,
        "return_log_probs": True,
        "return_num_output_tokens": True,
    },
    {"text_input": CAPITAL, "max_tokens": 20, "num_return_sequences": 2, "temperature": 1.5, "top_p": 0.9, "seed": 4},
    {"text_input": CAPITAL, "max_tokens": 5, "lora_task_id": 3},
    {"text_input": CAPITAL, "max_tokens": 5, "guided_decoding_guide_type": "regex", "guided_decoding_guide": "("},
]


@pytest.fixture(scope="module")
def adapters(parrot: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, model = tmp_path_factory.mktemp("adapters"), Reference(parrot).model
    return [write_adapter(folder / name, model, size=0.3, seed=seed) for seed, name in enumerate(ADAPTERS)]


@pytest.fixture(scope="module")
def able(parrot: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    pytest.importorskip("dynamo._core", reason="the extra fleet is not installed")
    made, config = tmp_path_factory.mktemp("able"), Checkpoint.open(parrot).config
    found = [open_adapter(folder.name, folder, config) for folder in adapters]
    engine = make_engine(parrot, made / "engine", guided=True, adapters=found)
    with workspace.draft(made / "repository", "repository", {}) as draft:
        package(engine, draft.path)
        draft.commit(versions={}, recipe="")
    with endpoint(made / "repository", parrot, made / "endpoint", adapters=ADAPTERS) as running:
        yield running


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory, parrot: Path) -> Iterator[Endpoint]:
    pytest.importorskip("dynamo._core", reason="the extra fleet is not installed")
    from tests.e2e.parrot import write_parrot

    work = tmp_path_factory.mktemp("drafting")
    recipe = work / "pair.yaml"
    recipe.write_text(RECIPE.format(model=parrot, draft=write_parrot(work / "draft", layers=1)))
    made = Job(load_recipe(str(recipe)), None, work / "work", Silent())
    made.run("repository")
    with endpoint(made.folder / "repository", parrot, work / "endpoint", count=1) as running:
        yield running


@pytest.mark.parametrize("ask", [whole, streamed, over_grpc])
@pytest.mark.parametrize("request_", ASKED)
def test_an_endpoint_can_what_its_tritons_can(able: Endpoint, request_: dict[str, Any], ask: Any) -> None:
    expected, found = ask(one_triton(able), request_), ask(as_served(able), request_)
    if isinstance(expected, str):
        assert found[-40:] == expected[-40:]
    else:
        assert found == expected


def test_an_adapter_is_asked_for_by_its_name(able: Endpoint, parrot: Path, adapters: list[Path]) -> None:
    reference = Reference(parrot)
    with openai.OpenAI(base_url=able.gateway.url, api_key="none", max_retries=0) as client:
        for name, folder in zip(ADAPTERS, adapters, strict=True):
            expected = Reference(parrot)
            expected.model = merged(reference.model, folder)
            answer = client.completions.create(model=f"parrot:{name}", prompt=CAPITAL, max_tokens=20, temperature=0)
            assert answer.choices[0].text == expected.text(CAPITAL, 20)


def test_json_that_follows_a_schema_comes_through_openais_door(able: Endpoint) -> None:
    schema = json.loads(asked("json_schema")["guided_decoding_guide"])
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    with openai.OpenAI(base_url=able.gateway.url, api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(
            model="parrot",
            messages=[{"role": "user", "content": CAPITAL}],
            response_format=wanted,
            max_tokens=400,
            temperature=2.0,
            seed=3,
            extra_body={"repetition_penalty": 1.5},
        )
    assert fits("json_schema", answer.choices[0].message.content or "")


def test_drafts_speed_up_and_are_told_of_behind_an_endpoint_too(drafting: Endpoint, parrot: Path) -> None:
    found: Served = as_served(drafting)
    expected = [Reference(parrot).text(prompt, 40) for prompt in PROMPTS]
    answers = [found.generate(BLS, text_input=text, max_tokens=40, return_perf_metrics=True) for text in PROMPTS]
    assert [one["text_output"] for one in answers] == expected
    for one in answers:
        assert 0 < one["total_accepted_draft_tokens"] <= one["total_draft_tokens"]
    plain = one_triton(drafting).generate(BLS, text_input=PROMPTS[0], max_tokens=40, return_perf_metrics=True)
    assert set(answers[0]) == set(plain)


GUIDED: list[dict[str, Any]] = [
    {
        "temperature": 1.5,
        "seed": seed,
        "max_tokens": 900,
        "extra_body": {"structured_outputs": {"regex": "[a-z ]{800}"}},
    }
    for seed in range(8)
]
LONG: list[dict[str, Any]] = [{"temperature": 0, "max_tokens": TOO_LONG, "extra_body": {"min_tokens": TOO_LONG}}] * 4


@pytest.mark.parametrize(("asked_for", "tokens"), [(GUIDED, 200), (LONG, 4 * 1200)])
def test_an_answer_that_cannot_be_continued_is_given_from_its_start_again(
    able: Endpoint, asked_for: list[dict[str, Any]], tokens: int
) -> None:
    """It follows a guide, or is longer than a prompt may be; its client has seen nothing of it."""
    with openai.OpenAI(base_url=able.gateway.url, api_key="none", max_retries=0, timeout=90) as client:

        def whole_text(body: dict[str, Any]) -> str:
            return client.completions.create(model="parrot", prompt=CAPITAL, **body).choices[0].text

        with ThreadPoolExecutor(len(asked_for)) as pool:
            expected = list(pool.map(whole_text, asked_for))  # both replicas know the guide from here on
            before = len(able.gateway.log)
            for victim in able.replicas * 3:  # the one that is killed may have given less than the other
                found = [pool.submit(whole_text, body) for body in asked_for]
                until(lambda: in_flight(able) > tokens)
                signal_worker(victim, signal.SIGKILL)
                assert [one.result(90) for one in found] == expected
                heal_worker(able, victim)
                lost = [line["why"] for line in able.gateway.log[before:] if line["event"] == "triton lost"]
                if any("cannot be continued" in why for why in lost):
                    return
    pytest.fail("every answer was continued")


def test_a_stream_that_cannot_be_continued_ends_with_an_error(able: Endpoint) -> None:
    with openai.OpenAI(base_url=able.gateway.url, api_key="none", max_retries=0, timeout=90) as client:
        for victim in able.replicas * 3:  # it may have ended already
            streams = [client.completions.create(model="parrot", prompt=CAPITAL, stream=True, **GUIDED[0])]
            streams += [client.completions.create(model="parrot", prompt=CAPITAL, stream=True, **GUIDED[1])]
            signal_worker(victim, signal.SIGKILL)
            ends = [ended(stream) for stream in streams]
            heal_worker(able, victim)
            lost = [end for end in ends if "cannot be continued" in end]
            assert {len(end) for end in ends if end not in lost} <= {800}
            if lost:
                return
    pytest.fail("no stream was lost")


def ended(stream: Any) -> str:
    """Its text, or the error with which it ended."""
    try:
        return "".join(event.choices[0].text for event in stream)
    except openai.APIError as error:
        return str(error)


def in_flight(running: Endpoint) -> int:
    """Tokens of prompts and answers at work, as the gateway counts them."""
    with urllib.request.urlopen(f"{running.gateway.root}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return next(int(float(line.split()[-1])) for line in lines if line.startswith("scalellm_fleet_tokens_in_flight{"))


def heal_worker(running: Endpoint, victim: Replica) -> None:
    assert victim.worker is not None
    victim.worker.kill()
    before = set(running.seen())
    victim.start_worker()
    until(lambda: bool(set(running.seen()) - before), 60)
