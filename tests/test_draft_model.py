"""Promises about the draft model of a job: made like the model, beside it, and only where its tokens mean the same."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine_folder import config_json
from toolchain.engine import Engine, Limits
from toolchain.errors import PlanError
from toolchain.host import EngineJob, Host, HostCommand
from toolchain.hosts.local import Local
from toolchain.pipeline import Job
from toolchain.progress import Progress, Silent
from toolchain.recipe import load_recipe
from toolchain.repository import Repository
from toolchain.stages.commands import commands
from toolchain.vocabulary import difference

MADE = ["checkpoint", "draft/checkpoint", "trtllm-checkpoint", "draft/trtllm-checkpoint", "engine", "draft/engine"]
RECIPE = """\
name: pair
device: {device}
model: unused/unused
quantization: {{weights: int4, group_size: 64}}
limits: {{max_batch_size: 4, max_seq_len: 256}}
speculative: {{draft: {draft}, tokens: {tokens}}}
"""


class Bench:
    """A host that builds nothing: it leaves an engine's files with what it was asked for in them."""

    name = "bench"

    def __init__(self) -> None:
        self.built: list[EngineJob] = []

    def lacks(self, job: EngineJob) -> tuple[str, ...]:
        return ()

    def commands(self, job: EngineJob) -> tuple[HostCommand, ...]:
        return ()

    def build(self, job: EngineJob, log: Path, progress: Progress) -> None:
        self.built.append(job)
        argv = job.argv("in", "out")
        passed = dict(zip((word.removeprefix("--") for word in argv[1::2]), argv[2::2], strict=True))
        drafted = int(passed.get("max_draft_len", 0))
        numbers = {name: int(passed[name]) for name in ("max_batch_size", "max_input_len", "max_num_tokens")}
        limits = Limits(**numbers, max_seq_len=int(passed["max_seq_len"]) + drafted)
        config = config_json(job.release.version, limits, vocab=320)
        config["build_config"]["max_draft_len"] = drafted
        (job.out / "config.json").write_text(json.dumps(config))
        (job.out / "rank0.engine").write_text(job.recipe)


@pytest.fixture
def model(random_llama: Callable[..., Path]) -> Path:
    return random_llama()


@pytest.fixture
def small(random_llama: Callable[..., Path]) -> Path:
    return random_llama(hidden_size=128, intermediate_size=256, num_hidden_layers=1)


def job(
    folder: Path, model: Path, draft: Path, *, tokens: int = 4, device: str = "a100", host: Host | None = None
) -> Job:
    recipe = folder / "pair.yaml"
    recipe.write_text(RECIPE.format(draft=draft, tokens=tokens, device=device))
    return Job(load_recipe(str(recipe)), str(model), folder / "work", Silent(), host=host or Bench())


def actions(made: Job, until: str = "engine") -> dict[str, str]:
    return {result.state.name: result.action for result in made.run(until)}


def test_draft_is_quantized_converted_and_built_beside_the_model(tmp_path: Path, model: Path, small: Path) -> None:
    bench = Bench()
    made = job(tmp_path, model, small, host=bench)
    assert list(actions(made)) == MADE
    assert [one.recipe for one in bench.built] == ["pair", "draft"]
    target, draft = (Engine.open(made.folder / name).passport for name in ("engine", "draft/engine"))
    assert (draft.weights, draft.group_size, draft.kv) == (target.weights, target.group_size, target.kv)
    assert (draft.release, draft.device) == (target.release, target.device)
    assert (target.num_layers, draft.num_layers) == (2, 1)
    assert target.runtime["draft"] == {"tokens": 4}
    assert "draft" not in draft.runtime
    assert target.runtime["max_tokens_in_paged_kv_cache"] == draft.runtime["max_tokens_in_paged_kv_cache"]
    assert target.argv[target.argv.index("--max_draft_len") + 1] == "4"
    assert "--max_draft_len" not in draft.argv


def test_repository_holds_both_engines_and_follows_the_draft(
    tmp_path: Path, model: Path, small: Path, random_llama: Callable[..., Path]
) -> None:
    made = job(tmp_path, model, small)
    assert list(actions(made, "repository")) == [*MADE, "repository"]
    found = Repository.open(made.folder / "repository")
    assert {"tensorrt_llm", "tensorrt_llm_draft"} <= set(found.models)
    assert found.parameters["num_draft_tokens"] == 4
    assert actions(job(tmp_path, model, small), "repository") == dict.fromkeys([*MADE, "repository"], "kept")
    other = job(tmp_path, model, random_llama(hidden_size=128, intermediate_size=512, num_hidden_layers=1))
    repository = other.states()[-1]
    assert repository.reasons == ("its draft changed",)
    assert actions(other, "repository")["repository"] == "made"


def test_second_build_keeps_both_and_a_changed_draft_keeps_the_model(
    tmp_path: Path, model: Path, small: Path, random_llama: Callable[..., Path]
) -> None:
    actions(job(tmp_path, model, small))
    assert actions(job(tmp_path, model, small)) == dict.fromkeys(MADE, "kept")
    other = random_llama(hidden_size=128, intermediate_size=512, num_hidden_layers=1)
    again = actions(job(tmp_path, model, other))
    assert {name for name, action in again.items() if action == "made"} == {n for n in MADE if n.startswith("draft/")}


def test_more_drafted_tokens_make_the_models_engine_anew_and_keep_the_drafts(
    tmp_path: Path, model: Path, small: Path
) -> None:
    actions(job(tmp_path, model, small))
    changed = job(tmp_path, model, small, tokens=6)
    states = {state.name: state for state in changed.states()}
    assert "draft_tokens was 4, is 6" in states["engine"].reasons
    assert states["draft/engine"].fresh
    assert states["draft/engine"].stage == "draft build"
    assert not states["repository"].fresh


def test_interrupted_work_goes_on_at_the_draft(tmp_path: Path, model: Path, small: Path) -> None:
    made = job(tmp_path, model, small)
    actions(made)
    shutil.rmtree(made.folder / "draft" / "engine")
    again = actions(job(tmp_path, model, small))
    assert [name for name, action in again.items() if action == "made"] == ["draft/engine"]


def _renamed(folder: Path, copy: Path, old: str, new: str) -> Path:
    """A copy of a model whose tokenizer calls one token something else."""
    shutil.copytree(folder, copy)
    raw = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    vocabulary[new] = vocabulary.pop(old)
    (copy / "tokenizer.json").write_text(json.dumps(raw))
    return copy


def test_draft_with_another_tokenizer_is_refused_and_the_first_difference_named(
    tmp_path: Path, model: Path, small: Path
) -> None:
    other = _renamed(small, tmp_path / "other", "A", "AA")
    ids = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    with pytest.raises(PlanError, match=f"token {ids['A']} is 'A' in the model and 'AA' in the draft"):
        job(tmp_path, model, other)


def test_tokenizers_that_differ_in_the_models_own_ids_only_are_the_same(
    tmp_path: Path, model: Path, small: Path
) -> None:
    shorter = shutil.copytree(small, tmp_path / "shorter")
    raw = json.loads((shorter / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    del vocabulary[max(vocabulary, key=vocabulary.get)]
    (shorter / "tokenizer.json").write_text(json.dumps(raw))
    assert difference(model, shorter) == ""
    assert "is nothing in the model" in difference(shorter, model)


def test_lists_of_pieces_and_sentencepiece_files_are_compared_too(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder, pieces in zip(folders, (["x", "y"], ["x", "y"], ["x", "z"]), strict=True):
        folder.mkdir()
        document = {"model": {"type": "Unigram", "vocab": [[piece, -1.5] for piece in pieces]}, "added_tokens": []}
        (folder / "tokenizer.json").write_text(json.dumps(document))
    assert difference(folders[0], folders[1]) == ""
    assert difference(folders[0], folders[2]) == "token 1 is 'y' in the model and 'z' in the draft"
    for folder in folders:
        (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    assert difference(folders[0], folders[1]) == ""
    assert difference(folders[0], folders[2]) == "their files tokenizer.model differ"


def test_backend_without_drafts_is_refused_before_the_draft_is_looked_for(tmp_path: Path, model: Path) -> None:
    recipe = tmp_path / "pair.yaml"
    recipe.write_text(RECIPE.format(draft="no/such-model", tokens=4, device="a100") + "backend: tensorrt_llmapi\n")
    with pytest.raises(PlanError, match="does not set up a draft model in TensorRT-LLM's PyTorch runtime"):
        Job(load_recipe(str(recipe)), str(model), tmp_path / "work", Silent())


def test_cpu_engine_and_its_draft_lie_in_one_triton_model(tmp_path: Path, model: Path, small: Path) -> None:
    made = job(tmp_path, model, small, device="cpu")
    assert list(actions(made, "repository")) == [
        "checkpoint", "draft/checkpoint", "engine", "draft/engine", "repository"
    ]  # fmt: skip
    repository = Repository.open(made.folder / "repository")
    assert "tensorrt_llm_draft" not in repository.models
    assert repository.parameters["num_draft_tokens"] == 0  # for tensorrt_llm_bls, which drafts nothing here
    version = made.folder / "repository" / "tensorrt_llm" / "1"
    drafted, own = (json.loads((version / name / "engine.json").read_text()) for name in ("draft", "engine"))
    assert (own["runtime"]["draft"], own["num_layers"]) == ({"tokens": 4}, 2)
    assert (drafted["num_layers"], "draft" in drafted["runtime"]) == (1, False)
    assert actions(job(tmp_path, model, small, device="cpu"), "repository")["repository"] == "kept"


def test_commands_of_both_models_are_printed(tmp_path: Path, model: Path, small: Path) -> None:
    made = job(tmp_path, model, small, host=Local())
    assert made.draft
    lane = commands(made.plan, "pair", None, tmp_path / "work", made.host_commands(made.folder / "engine"))
    drafted = made.draft.host_commands(made.draft.folder / "engine")
    both = lane.with_draft(commands(made.draft.plan, "pair", None, made.folder, drafted))
    builds = {step.name: step.argv for step in both.steps if step.argv[:1] == ("trtllm-build",)}
    assert list(builds) == ["build", "build of the draft model"]
    assert "--max_draft_len" in builds["build"]
    second = builds["build of the draft model"]
    assert "--max_draft_len" not in second
    folder = Path(second[second.index("--checkpoint_dir") + 1])
    assert folder == made.folder / "draft" / "trtllm-checkpoint"
    assert [step.argv[:2] for step in both.steps].count(("scalellm", "quantize")) == 1
    assert set(lane.notes) <= set(both.notes)


def test_explain_prints_how_both_engines_are_built(
    tmp_path: Path, scalellm: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    text = RECIPE.format(device="a100", draft="TinyLlama/TinyLlama-1.1B-Chat-v1.0", tokens=4)
    recipe = tmp_path / "pair.yaml"
    recipe.write_text(text.replace("unused/unused", "meta-llama/Llama-2-13b-chat-hf"))
    done = scalellm("build", "--recipe", recipe, "--work", tmp_path / "work", "--explain")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trtllm-build") == 2
    assert done.stdout.count("--max_draft_len 4") == 1
    assert "draft build: to do" in done.stdout
