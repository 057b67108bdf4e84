"""Speculative decoding on the CPU engine, from a recipe to the real Triton: a parrot, and a smaller one that drafts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.parrot import SENTENCES, write_parrot
from tests.e2e.served import Served, ServerError
from tests.e2e.test_triton_models import Reference
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
