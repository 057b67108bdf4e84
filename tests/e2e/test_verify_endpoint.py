"""verify --endpoint: a real Triton with the CPU engine against the checkpoint's own forward pass."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.e2e.parrot import EOS, SENTENCES, write_parrot
from toolchain import accuracy
from toolchain.endpoint import Endpoint
from toolchain.engine import Engine
from toolchain.errors import RejectedError
from toolchain.pipeline import Job, verifying
from toolchain.pipeline.greedy import Asked, verify_greedy
from toolchain.pipeline.tasks import written
from toolchain.progress import Silent
from toolchain.quality.tasks import Writing, cut
from toolchain.quantizers.samples import open_tokenizer
from toolchain.recipe import parse_recipe
from toolchain.servers.triton.locate import find_server
from toolchain.servers.triton.ports import free_ports
from toolchain.servers.triton.supervisor import Supervisor

pytestmark = pytest.mark.timeout(180)
RECIPE = """\
name: parrot
model: some/model
device: cpu
quantization: {weights: int8}
kv_cache: {dtype: fp32}
limits: {max_batch_size: 4, max_seq_len: 256}
cpu: {threads: 1, precision: f32}
"""
ASKED: dict[str, Any] = {"samples": 4, "tokens": 40}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    model = write_parrot(tmp_path_factory.mktemp("parrot"))
    made = Job(parse_recipe(RECIPE, Path("parrot.yaml")), str(model), tmp_path_factory.mktemp("work"), Silent())
    made.run("repository")
    return made


@pytest.fixture(scope="module")
def endpoint(job: Job) -> Iterator[Endpoint]:
    ports = free_ports()
    server = find_server("bundled", environ=os.environ)
    log = job.folder / "triton.log"
    supervisor = Supervisor(server, job.folder / "repository", ports, log=log, exit_timeout_s=3)
    supervisor.start()
    try:
        yield Endpoint(f"http://127.0.0.1:{ports.http}", f"127.0.0.1:{ports.grpc}")
    finally:
        supervisor.kill()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "held.txt"
    file.write_text("\n\n".join((SENTENCES[0], *SENTENCES[2:]) * 4))
    return str(file)


@pytest.mark.parametrize("model", ["tensorrt_llm_bls", "ensemble"])
def test_the_engine_answers_as_its_checkpoint_does(job: Job, endpoint: Endpoint, text: str, model: str) -> None:
    """Both doors: one says token ids, the other only text, which is cut into tokens anew."""
    found = verifying.verify_endpoint(job, Endpoint(endpoint.http_url, "", model=model), text=text, **ASKED)
    assert found.passed, json.dumps(found.report["answers"])
    assert found.report["measures"]["greedy_agreement"]["value"] > 0.97
    verdict = _verdict(job)
    assert verdict is not None
    assert verdict.passed
    assert f"{len(found.report['answers'])} greedy answers" in verdict.summary
    assert not [file for file in job.folder.iterdir() if file.name.startswith("verify-")]


def test_the_report_is_what_transformers_say_of_the_same_tokens(job: Job, endpoint: Endpoint, text: str) -> None:
    """The unquantized model in transformers is close enough to a model that knows its sentences by heart."""
    found = verifying.verify_endpoint(job, endpoint, text=text, **ASKED)
    report = json.loads(found.file.read_text())
    theirs = AutoModelForCausalLM.from_pretrained(job.source, dtype=torch.float32).eval()
    assert len(report["answers"]) == 4
    spoken = [one for one in report["answers"] if one["tokens"]]  # a prompt may end where its sentence does
    assert sum(len(one["tokens"]) for one in spoken) > 10
    for one in spoken:
        ids = torch.tensor([[*one["prompt"], *one["tokens"]]])
        with torch.no_grad():
            logits = theirs(ids).logits[0, len(one["prompt"]) - 1 : -1].log_softmax(-1)
        own = logits.gather(1, ids[0, len(one["prompt"]) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(one["log_probs"]), own.float(), atol=0.3, rtol=0.1)


def test_how_far_the_engine_goes_with_the_unquantized_model_is_what_both_say_by_themselves(
    job: Job, endpoint: Endpoint
) -> None:
    """Each writes its own answer to the same chat prompts; the report is right about their first difference."""
    asked = Asked(text="builtin", samples=3, tokens=80, count=10)
    found = verify_greedy(job, asked, endpoint)
    assert found.file.name == "greedy-endpoint.json"
    theirs = AutoModelForCausalLM.from_pretrained(job.source, dtype=torch.float32).eval()
    assert len(found.report["answers"]) == 3
    for one in found.report["answers"]:
        ids = torch.tensor([one["prompt"]])
        made = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
        own = made[0, ids.shape[1] :].tolist()
        same = [a == b for a, b in zip([*one["tokens"], *([EOS] if one["ended"] else [])], own, strict=False)]
        assert one["leading"]["engine"] == (same.index(False) if False in same else len(same))
    lengths = [one["leading"]["engine"] for one in found.report["answers"]]
    assert found.report["models"]["engine"]["agreement_length"]["value"] == pytest.approx(sum(lengths) / 3)


def test_a_task_s_answers_come_from_the_engine_up_to_their_ends(job: Job, endpoint: Endpoint) -> None:
    """What the lm-evaluation-harness is told, with a question that fits and one that loses its beginning."""
    tokenizer = open_tokenizer(Path(job.source))
    begin = "Count with me: one two three"
    asked = Writing(begin, (" seven",), 40, {})
    assert cut(written(endpoint, tokenizer, asked, job.plan.limits), asked.until) == " four five six"
    long = Writing("word " * 300 + begin, (" seven",), 40, {})
    with pytest.raises(RejectedError):
        list(endpoint.generate(long.text, max_tokens=40, stream=False))
    assert isinstance(written(endpoint, tokenizer, long, job.plan.limits), str)
    sampled = Writing(begin, (), 8, {"temperature": 0.7, "top_p": 1.0})
    assert written(endpoint, tokenizer, sampled, job.plan.limits).startswith(" ")


def _verdict(job: Job) -> accuracy.Verdict | None:
    engine = Engine.open(job.folder / "engine")
    return accuracy.read_verdict(engine.path, accuracy.digest_of(engine.stamp.files))


def test_an_engine_of_other_weights_is_not_accepted(job: Job, endpoint: Endpoint, text: str, tmp_path: Path) -> None:
    """What wrong kernels look like from outside: fluent nonsense. Here the checkpoint is another model's instead."""
    model = tmp_path / "other"
    model.mkdir()
    for file in Path(job.source).iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    tensors = load_file(model / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("down_proj.weight", "o_proj.weight"))]:
        tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    other = Job(parse_recipe(RECIPE, Path("parrot.yaml")), str(model), tmp_path / "work", Silent())
    other.run("checkpoint")
    found = verifying.verify_endpoint(other, endpoint, text=text, **ASKED)
    assert not found.passed
    assert found.failures[0].startswith("greedy_agreement is 0.")
    assert "no engine here yet" in found.notes[0]
    assert found.verdict is None
