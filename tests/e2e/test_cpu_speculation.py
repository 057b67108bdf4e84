"""Speculative decoding on the CPU engine, from a recipe to the real Triton: a parrot, and a smaller one that drafts."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.parrot import SENTENCES, write_parrot
from tests.e2e.served import Served, ServerError
from tests.e2e.test_triton_models import Reference
from tests.gateway.behind_gateway import gateway, settings_for
from tests.gateway.test_doors import post, until_ready
from toolchain.pipeline import Job
from toolchain.progress import Silent
from toolchain.recipe import load_recipe
from toolchain.servers.triton.locate import find_server
from toolchain.servers.triton.ports import free_ports
from toolchain.servers.triton.supervisor import Supervisor

pytestmark = pytest.mark.timeout(240)
BLS, ENSEMBLE = "tensorrt_llm_bls", "ensemble"
PROMPTS = [" ".join(sentence.split()[:3]) for sentence in SENTENCES if sentence.isascii()]
RECIPE = """\
device: cpu
model: {model}
kv_cache: {{dtype: fp32}}
limits: {{max_batch_size: 4, max_seq_len: 512}}
cpu: {{threads: 1}}
speculative: {{draft: {draft}, tokens: 3}}
"""


@pytest.fixture(scope="module")
def parrots(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    work = tmp_path_factory.mktemp("parrots")
    return write_parrot(work / "model"), write_parrot(work / "draft", layers=1)


@pytest.fixture(scope="module")
def reference(parrots: tuple[Path, Path]) -> Reference:
    return Reference(parrots[0])


@pytest.fixture(scope="module")
def served(parrots: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    work = tmp_path_factory.mktemp("served")
    recipe = work / "pair.yaml"
    recipe.write_text(RECIPE.format(model=parrots[0], draft=parrots[1]))
    made = Job(load_recipe(str(recipe)), None, work / "work", Silent())
    made.run("repository")
    repository, status = made.folder / "repository", work / "status.json"
    config = repository / "tensorrt_llm" / "config.pbtxt"
    told = 'key: "status_file" value { string_value: "'
    config.write_text(config.read_text().replace(told, f"{told}{status}"))
    ports = free_ports()
    server = find_server("bundled", environ=os.environ)
    supervisor = Supervisor(server, repository, ports, log=work / "triton.log", exit_timeout_s=3)
    supervisor.start()
    try:
        yield Served(ports.http, ports.grpc, status, ports.metrics)
    finally:
        supervisor.kill()


@pytest.mark.parametrize("model", [BLS, ENSEMBLE])
def test_text_is_that_of_the_model_alone_and_most_of_it_was_drafted(
    served: Served, reference: Reference, model: str
) -> None:
    expected = [reference.text(prompt, 40) for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        asked = {"max_tokens": 40, "return_perf_metrics": True}
        found = list(pool.map(lambda prompt: served.generate(model, text_input=prompt, **asked), PROMPTS))
    assert [one["text_output"] for one in found] == expected
    for one in found:
        accepted, drafted = one["total_accepted_draft_tokens"], one["total_draft_tokens"]
        assert 0 < accepted <= drafted
        assert one["acceptance_rate"] == pytest.approx(accepted / drafted)
        assert accepted / drafted > 0.4


def test_stream_ends_with_the_counts_of_the_whole_answer(served: Served, reference: Reference) -> None:
    with served.streaming(BLS, text_input=PROMPTS[1], max_tokens=40, return_perf_metrics=True) as events:
        pieces = list(events)
    assert "".join(piece["text_output"] for piece in pieces) == reference.text(PROMPTS[1], 40)
    assert pieces[-1]["total_accepted_draft_tokens"] > 3


def test_server_says_how_much_was_drafted_in_all(served: Served) -> None:
    before = served.idle()
    one = served.generate(BLS, text_input=PROMPTS[0], max_tokens=30, return_perf_metrics=True)
    after = served.wait_for(lambda status: status["finished"] > before["finished"] and not status["running"])
    assert after["accepted"] - before["accepted"] == one["total_accepted_draft_tokens"]
    assert after["drafted"] - before["drafted"] == one["total_draft_tokens"]
    assert after["kv_usage_percent"] == 0


def test_a_gateway_gives_the_same_text_and_tells_what_the_drafts_were_worth(
    parrots: tuple[Path, Path], served: Served, reference: Reference
) -> None:
    asked = settings_for(parrots[0], served.http_port)
    asked = replace(asked, upstreams=(replace(asked.upstreams[0], status_file=served.status_file),))
    body = json.dumps({"model": "parrot", "prompt": PROMPTS[0], "max_tokens": 40, "temperature": 0}).encode()
    with gateway(asked) as door:
        until_ready(door)
        _code, _headers, answer = post(f"{door.url}/completions", body)
        _code, _headers, predicted = post(door.predict_url, json.dumps({"text": PROMPTS[0], "max_tokens": 40}).encode())
        told = served.idle()
        with urllib.request.urlopen(f"{door.root}/status") as state:
            drafts = json.load(state)["replicas"][0]["drafts"]
        with urllib.request.urlopen(f"{door.root}/metrics") as metrics:
            families = {one.name: one for one in text_string_to_metric_families(metrics.read().decode())}
    assert json.loads(answer)["choices"][0]["text"] == reference.text(PROMPTS[0], 40)
    assert json.loads(predicted)["generated_text"] == reference.text(PROMPTS[0], 40)
    assert drafts == {"drafted": told["drafted"], "accepted": told["accepted"]}
    assert 0 < drafts["accepted"] <= drafts["drafted"]
    for name, value in drafts.items():
        (sample,) = families[f"scalellm_engine_{name}_tokens"].samples
        assert (sample.labels, sample.value) == ({"triton": asked.upstreams[0].http_url}, value)


def test_sampled_text_repeats_with_its_seed(served: Served) -> None:
    asked = {"text_input": "Greek", "max_tokens": 12, "top_k": 50, "temperature": 20.0}
    texts = [served.text(BLS, **asked, seed=seed) for seed in (1, 2, 3, 1)]
    assert texts[0] == texts[3]
    assert len(set(texts)) > 1


@pytest.mark.parametrize(
    ("asked", "tensor"),
    [({"min_tokens": 3}, "min_tokens"), ({"beam_width": 2, "num_return_sequences": 2}, "beam_width")],
)
def test_what_drafts_would_change_is_refused_by_name(served: Served, asked: dict[str, int], tensor: str) -> None:
    with pytest.raises(ServerError, match=f"{tensor}: not supported together with this server's speculative decoding"):
        served.generate(BLS, text_input=PROMPTS[0], max_tokens=8, **asked)
    assert served.idle()["active"] == 0
