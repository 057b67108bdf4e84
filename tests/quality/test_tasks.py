"""Tasks of the lm-evaluation-harness: log-likelihoods as transformers has them, and the real harness on a task of ours.

What needs the harness is skipped without it: ``make test-lm-eval`` runs it in an environment of its own.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from tests.e2e.parrot import write_tokenizer
from toolchain.checkpoint import Checkpoint
from toolchain.cli import verbs
from toolchain.endpoint import SAMPLING
from toolchain.errors import ArtifactError, RejectedError, ToolError
from toolchain.pipeline import Job
from toolchain.progress import Silent
from toolchain.quality import tasks
from toolchain.quantizers.place import Place
from toolchain.quantizers.samples import open_tokenizer
from toolchain.recipe import parse_recipe

with_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed: make test-lm-eval")

QUESTIONS = [
    {"question": f"The number {index} is", "choices": ["odd.", "even.", "neither of both"], "answer": index % 3}
    for index in range(12)
]
TASK = """\
task: numbers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="module")
def model(random_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = random_llama(dtype="float32", vocab_size=512, tie_word_embeddings=True)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def task(tmp_path: Path) -> Path:
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in QUESTIONS))
    (tmp_path / "numbers.yaml").write_text(TASK.format(file=tmp_path / "questions.jsonl"))
    return tmp_path / "numbers.yaml"


def score(model: Path, folder: Path, rows: list[tasks.Row]) -> list[tasks.Scored]:
    return tasks.scored(Checkpoint.open(model), rows, folder, rounds_inputs=False, progress=Silent(), place=Place())


def by_transformers(model: Path, question: list[int], answer: list[int]) -> tuple[float, bool]:
    import torch
    from transformers import AutoModelForCausalLM

    whole = torch.tensor([[*question, *answer]])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()(whole).logits[0]
    behind = logits[len(question) - 1 : -1].log_softmax(-1)
    told = behind[torch.arange(len(answer)), torch.tensor(answer)].sum()
    return float(told), behind.argmax(-1).tolist() == answer


def test_log_likelihoods_of_answers_are_those_of_transformers(model: Path, tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    rows: list[tasks.Row] = [
        (chance.integers(3, 500, size).tolist(), chance.integers(3, 500, answer).tolist())
        for size, answer in ((1, 1), (7, 3), (30, 1), (12, 9))
    ]
    for (value, greedy), (question, answer) in zip(score(model, tmp_path, rows), rows, strict=True):
        wanted, also_greedy = by_transformers(model, list(question), list(answer))
        assert (value, greedy) == (pytest.approx(wanted, rel=1e-4), also_greedy)
    given = next(token for token in range(512) if by_transformers(model, [5, 6], [token])[1])
    assert score(model, tmp_path, [([5, 6], [given])])[0][1]


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="it is installed")
def test_without_the_harness_the_verb_says_how_to_get_it(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolError) as error:
        tasks.harness()
    assert "scalellm-toolchain[lm-eval" in (error.value.hint or "")


def job_of(model: Path, work: Path) -> Job:
    text = (
        "name: one\nmodel: m\ndevice: l4\nquantization: {weights: int4, group_size: 64}\nlimits: {max_seq_len: 128}\n"
    )
    return Job(parse_recipe(text, Path("one.yaml")), str(model), work, Silent())


@with_harness
def test_the_harness_finds_the_accuracy_that_transformers_log_likelihoods_give(
    model: Path, task: Path, tmp_path: Path
) -> None:
    def own(rows: list[tasks.Row]) -> list[tasks.Scored]:
        return score(model, tmp_path, rows)

    found = tasks.measures(tasks.evaluate([str(task)], tasks.model(open_tokenizer(model), own), None))
    tokenizer = open_tokenizer(model)
    right = []
    for one in QUESTIONS:
        question = tokenizer.encode(one["question"])
        whole = [tokenizer.encode(f"{one['question']} {choice}") for choice in one["choices"]]
        told = [by_transformers(model, question, ids[len(question) :])[0] for ids in whole]
        right.append(int(np.argmax(told)) == one["answer"])
    assert found["numbers"]["acc"].value == pytest.approx(np.mean(right))
    assert found["numbers"]["acc"].error == pytest.approx(np.std(right, ddof=1) / len(right) ** 0.5)


@with_harness
def test_both_models_answer_and_their_difference_is_paired(model: Path, task: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    job_of(model, work).run("checkpoint")
    recipe = tmp_path / "one.yaml"
    recipe.write_text(job_of(model, work).recipe.text)
    words = ["verify", "--recipe", str(recipe), "--model", str(model), "--work", str(work), "--tasks", str(task)]
    done = CliRunner().invoke(verbs, [*words, "--limit", "9", "--json"], catch_exceptions=False)
    report: dict[str, Any] = json.loads(done.stdout)
    assert json.loads((work / "one" / "tasks.json").read_text()) == {k: v for k, v in report.items() if k != "file"}
    assert report["questions"] == {"numbers": 9}
    before, after = (report["models"][name]["numbers"]["acc"]["value"] for name in ("original", "quantized"))
    assert report["changes"]["numbers"]["acc"]["value"] == pytest.approx(after - before)
    assert [path.name for path in (work / "one").glob("tasks-*")] == []


WRITES = """\
task: writes
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 20}}
filter_list:
  - name: plain
    filter:
      - function: remove_whitespace
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Speaks as much of Triton's generate as is asked for: it says that every number is odd."""
    seen: list[dict[str, Any]] = []

    class Odd(BaseHTTPRequestHandler):
        def log_message(self, *_arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            self.say({"inputs": [{"name": name} for name in ("text_input", "max_tokens", *SAMPLING)]})

        def do_POST(self) -> None:
            seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.say({"text_output": " odd.\nThe next"})

        def say(self, document: dict[str, Any]) -> None:
            body = json.dumps(document).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Odd) as listening:
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}", seen
        listening.shutdown()
        thread.join()


@with_harness
def test_a_running_engine_writes_and_the_harness_counts(
    model: Path, task: Path, tmp_path: Path, server: tuple[str, list[dict[str, Any]]]
) -> None:
    url, seen = server
    writes, recipe = task.with_name("writes.yaml"), tmp_path / "one.yaml"
    writes.write_text(WRITES.format(file=tmp_path / "questions.jsonl"))
    recipe.write_text(job_of(model, tmp_path / "work").recipe.text)
    words = ["verify", "--recipe", str(recipe), "--model", str(model), "--work", str(tmp_path / "work")]
    asked = [*words, "--tasks", str(writes), "--endpoint", url]
    done = CliRunner().invoke(verbs, [*asked, "--json"], catch_exceptions=False)
    report: dict[str, Any] = json.loads(done.stdout)
    found = report["models"]["engine"]["writes"]["exact_match"]
    odd = [float(one["answer"] == 0) for one in QUESTIONS]
    assert found["value"] == pytest.approx(np.mean(odd))
    assert found["error"] == pytest.approx(np.std(odd, ddof=1) / len(odd) ** 0.5)
    assert Path(report["file"]).name == "tasks-endpoint.json"
    assert sorted(one["text_input"] for one in seen) == sorted(one["question"] for one in QUESTIONS)
    assert all((one["max_tokens"], one["stop_words"], "temperature" in one) == (20, ["\n"], False) for one in seen)
    shown = CliRunner().invoke(verbs, asked, catch_exceptions=False)
    assert "exact_match" in shown.stdout
    with pytest.raises(RejectedError, match="compares how likely") as refused:
        CliRunner().invoke(verbs, [*words, "--tasks", str(task), "--endpoint", url], catch_exceptions=False)
    assert "leave --endpoint out" in (refused.value.hint or "")


def test_an_answer_ends_before_the_first_of_its_ends() -> None:
    assert tasks.cut("odd.\n\nQ: 4", ["Q:", "\n"]) == "odd."
    assert tasks.cut("odd.", ["\n"]) == "odd."
    assert tasks.cut("odd.", []) == "odd."


@with_harness
def test_what_cannot_be_asked_is_refused(model: Path, task: Path, tmp_path: Path) -> None:
    made = tasks.model(open_tokenizer(model), lambda rows: [(0.0, False)] * len(rows))
    with pytest.raises(ArtifactError, match="the harness knows no such task"):
        tasks.evaluate(["no_such_task_at_all"], made, None)
    with pytest.raises(ArtifactError, match="no such file"):
        tasks.evaluate([str(tmp_path / "none.yaml")], made, None)
    writes = task.with_name("writes.yaml")
    text = task.read_text().replace("task: numbers", "task: writes").replace("multiple_choice", "generate_until")
    writes.write_text(text.replace("metric: acc,", "metric: exact_match,"))
    with pytest.raises(RejectedError, match="makes the model write"):
        tasks.evaluate([str(writes)], made, None)
