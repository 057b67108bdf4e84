"""What is made, what is kept, and that nothing is lost: the real stages on small random Llamas."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from tests.conftest import SCALELLM
from toolchain import workspace
from toolchain.errors import ArtifactError, RecipeError
from toolchain.pipeline import Job
from toolchain.progress import Silent
from toolchain.quantizers.place import Place
from toolchain.recipe import load_recipe

ARTIFACTS = ("checkpoint", "engine", "repository")

RECIPE = """\
name: small
device: cpu
model: unused/unused
quantization: {{weights: int4, group_size: 64}}
kv_cache: {{dtype: {kv}}}
limits: {{max_batch_size: {batch}, max_seq_len: 256}}
"""


@pytest.fixture(scope="module")
def model(random_llama) -> Path:
    return random_llama()


def job(folder: Path, model: Path, *, kv: str = "int8", batch: int = 4) -> Job:
    recipe = folder / "small.yaml"
    recipe.write_text(RECIPE.format(kv=kv, batch=batch))
    return Job(load_recipe(str(recipe)), str(model), folder / "work", Silent())


def actions(made: Job) -> dict[str, str]:
    return {result.state.name: result.action for result in made.run("repository")}


def test_a_second_build_makes_nothing(tmp_path, model):
    assert actions(job(tmp_path, model)) == dict.fromkeys(ARTIFACTS, "made")
    assert actions(job(tmp_path, model)) == dict.fromkeys(ARTIFACTS, "kept")


def test_another_kv_cache_keeps_the_checkpoint_and_says_why_the_engine_is_stale(tmp_path, model):
    actions(job(tmp_path, model))
    changed = job(tmp_path, model, kv="fp16")
    checkpoint, engine, repository = changed.states()
    assert checkpoint.fresh
    assert any("was int8, is fp16" in reason for reason in engine.reasons)
    assert repository.reasons == ("its engine changed",)
    assert actions(changed) == {"checkpoint": "kept", "engine": "made", "repository": "made"}


def test_a_changed_model_makes_everything_again(tmp_path, model, random_llama):
    actions(job(tmp_path, model))
    other = job(tmp_path, random_llama(num_hidden_layers=1))
    assert other.states()[0].reasons == ("the model's files changed",)
    assert actions(other) == dict.fromkeys(ARTIFACTS, "made")


@pytest.mark.parametrize("damage", ["truncate", "delete", "flip"])
def test_a_damaged_artifact_is_named_and_made_again(tmp_path, model, damage):
    made = job(tmp_path, model)
    actions(made)
    victim = made.folder / "engine" / "openvino_model.bin"
    data = victim.read_bytes()
    victim.unlink()  # the repository shares the file: damage only the engine's
    if damage == "truncate":
        victim.write_bytes(data[:-100])
    elif damage == "flip":
        victim.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    again = job(tmp_path, model)
    _, engine, _ = again.states()
    assert not engine.fresh
    assert "openvino_model.bin" in engine.reasons[0]
    assert actions(again)["engine"] == "made"
    assert victim.read_bytes() == data


def test_a_damaged_stamp_is_not_trusted(tmp_path, model):
    made = job(tmp_path, model)
    actions(made)
    (made.folder / "engine" / "stamp.json").write_text('{"stage": "engine"')
    assert "stamp" in job(tmp_path, model).states()[1].reasons[0]
    assert actions(job(tmp_path, model))["engine"] == "made"


def test_a_truncated_model_is_refused_with_the_name_of_the_file(tmp_path, llama, scalellm):
    broken = tmp_path / "broken"
    shutil.copytree(llama, broken)
    shard = sorted(broken.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-10])
    done = scalellm("build", "--recipe", "tiny", "--model", broken, "--work", tmp_path / "work")
    assert done.returncode == 5
    assert shard.name in done.stderr
    assert "truncated" in done.stderr
    assert not list((tmp_path / "work").rglob("stamp.json"))


def test_a_model_of_another_family_is_refused_by_name(tmp_path, model, scalellm):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    config = json.loads((other / "config.json").read_text())
    config |= {"architectures": ["GemmaForCausalLM"], "hidden_act": "gelu"}
    (other / "config.json").write_text(json.dumps(config))
    done = scalellm("build", "--recipe", "tiny", "--model", other, "--work", tmp_path / "work")
    assert done.returncode == 3
    assert "GemmaForCausalLM" in done.stderr
    assert "gelu" in done.stderr


@pytest.mark.parametrize("stage", ["checkpoint", "engine"])
def test_kill_9_in_the_middle_loses_nothing(tmp_path, random_llama, scalellm, stage):
    """A build killed while it makes ``stage`` leaves no half artifact; the next one gives what one run would have."""
    model = random_llama(hidden_size=768, intermediate_size=2048, num_hidden_layers=10, num_attention_heads=12,
                         num_key_value_heads=12, vocab_size=4096, max_position_embeddings=2048)  # fmt: skip
    work = tmp_path / "work"
    argv = ["build", "--recipe", "tiny", "--model", str(model), "--work", str(work)]
    victim = subprocess.Popen([SCALELLM, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(work.glob(f"tiny/{stage}.partial-*/*")):
        assert victim.poll() is None, "the build ended before it could be killed"
        time.sleep(0.001)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (work / "tiny" / stage).exists()

    done = scalellm(*argv)
    assert done.returncode == 0, done.stderr
    whole = scalellm(*argv[:-1], tmp_path / "other")
    assert whole.returncode == 0, whole.stderr
    for name in ("checkpoint", "engine"):
        stamps = [json.loads((root / "tiny" / name / "stamp.json").read_text()) for root in (work, tmp_path / "other")]
        hashes = [{file: record["sha256"] for file, record in stamp["files"].items()} for stamp in stamps]
        assert hashes[0] == hashes[1]
    assert not list(work.glob("tiny/*.partial-*"))


def test_a_data_set_of_the_hub_counts_by_its_rows(tmp_path, model, monkeypatch):
    """Fresh without asking the hub; once the checkpoint is made again, other rows make other keys for all behind it."""
    asked: list[str] = []
    texts = {"rows": [{"text": f"Letter {n} of a long tale, told by the fire." * 20} for n in range(8)]}

    def load_dataset(name: str, *, streaming: bool) -> object:
        asked.append(name)
        return {"train": types.SimpleNamespace(take=lambda count: texts["rows"][:count])}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))

    def hub_job() -> Job:
        recipe = tmp_path / "small.yaml"
        calibration = "calibration: {data: 'hf:some/tales', samples: 4, tokens: 32}\n"
        text = RECIPE.format(kv="int8", batch=4).replace("group_size: 64", "group_size: 64, method: awq") + calibration
        recipe.write_text(text)
        return Job(load_recipe(str(recipe)), str(model), tmp_path / "work", Silent())

    made = hub_job()
    keys = {result.state.name: result.key for result in made.run("engine")}
    stamp = workspace.require(made.folder / "checkpoint", "checkpoint")
    assert stamp.inputs["calibration"]["digest"]
    assert workspace.key_of(stamp.inputs) == keys["checkpoint"]
    assert asked == ["some/tales"]

    again = hub_job()
    assert [state.fresh for state in again.states()][:2] == [True, True]
    assert {result.action for result in again.run("engine")} == {"kept"}
    assert asked == ["some/tales"], "a fresh checkpoint must not need the network"

    shutil.rmtree(made.folder / "checkpoint")
    same = hub_job().run("engine")
    assert [(result.action, result.key) for result in same] == [("made", keys["checkpoint"]), ("kept", keys["engine"])]

    texts["rows"] = texts["rows"][::-1]
    shutil.rmtree(made.folder / "checkpoint")
    other = hub_job().run("engine")
    assert [result.action for result in other] == ["made", "made"]
    assert other[0].key != keys["checkpoint"]


def test_where_it_is_computed_is_stamped_and_changes_no_key(tmp_path, model):
    made = job(tmp_path, model)
    made.run("checkpoint")
    stamp = workspace.require(made.folder / "checkpoint", "checkpoint")
    assert stamp.extra == {"device": "cpu"}
    elsewhere = Job(made.recipe, str(model), made.work, Silent(), Place("cuda:7", max_ram=2**20, max_vram=2**20))
    assert elsewhere.states()[0].fresh


def test_limits_that_cannot_be_read_and_a_memory_that_does_not_do_are_refused(tmp_path, llama, scalellm):
    argv = ("quantize", "--recipe", "tiny", "--model", llama, "--work", tmp_path / "work")
    done = scalellm(*argv, "--max-ram", "plenty")
    assert done.returncode == 2
    assert "'plenty' is not a size; write it as 8GiB" in done.stderr
    done = scalellm(*argv, "--device", "tpu")
    assert done.returncode == 2
    assert "--quantize-on tpu: there are auto, cpu, cuda and cuda:N" in done.stderr
    done = scalellm(*argv, "--device", "cpu", "--max-ram", "32MiB")
    assert done.returncode == 3
    assert "quantize needs at least" in done.stderr
    assert "more than --max-ram 32.00 MiB" in done.stderr
    assert not list((tmp_path / "work").rglob("model*"))


def test_two_builds_of_one_recipe_do_not_mix(tmp_path, model):
    made = job(tmp_path, model)
    with (
        workspace.draft(made.folder / "checkpoint", "checkpoint", {"a": 1}),
        pytest.raises(ArtifactError, match="another scalellm"),
    ):
        made.run("repository")


@pytest.fixture(scope="module")
def llama(random_llama) -> Path:
    return random_llama(max_position_embeddings=4096)


class TestGpuRecipeOnThisMachine:
    """A machine without the GPU goes as far as it can, says what is missing, and loses nothing."""

    @pytest.mark.parametrize(("recipe", "sm"), [("rtx4090", 89), ("t4", 75), ("a100", 80)])
    def test_it_ends_at_the_checkpoint_and_says_what_is_missing(self, scalellm, tmp_path, llama, recipe, sm):
        done = scalellm("build", "--recipe", recipe, "--model", llama, "--work", tmp_path)
        assert done.returncode == 4, done.stderr
        assert f"SM {sm}" in done.stderr
        assert "trtllm-build" in done.stderr
        assert f"scalellm build --recipe {recipe}" in done.stderr
        assert (tmp_path / recipe / "checkpoint" / "stamp.json").exists()

    def test_it_continues_from_the_stamped_checkpoint_without_the_model(self, scalellm, tmp_path, llama):
        here, there = tmp_path / "here", tmp_path / "there"
        scalellm("build", "--recipe", "l4", "--model", llama, "--work", here)
        shutil.copytree(here / "l4", there / "l4")
        done = scalellm("build", "--recipe", "l4", "--model", tmp_path / "gone", "--work", there)
        assert done.returncode == 4, done.stderr
        assert "checkpoint: up to date, kept" in done.stdout


CALIBRATED = """\
name: small
device: cpu
model: unused/unused
quantization: {{weights: int4, group_size: 64, method: awq}}
calibration: {{data: {data}, samples: 4, tokens: {tokens}}}
limits: {{max_batch_size: 4, max_seq_len: 256}}
"""


class TestCalibration:
    """The checkpoint is made again when the text changes, and the text is read only when it is made."""

    @pytest.fixture
    def text(self, tmp_path) -> Path:
        file = tmp_path / "mine.txt"
        file.write_text("\n\n".join(f"Paragraph {n} speaks of {n * n} apples and {n + 7} pears." for n in range(60)))
        return file

    def job(self, folder: Path, model: Path, text: Path, tokens: int = 32) -> Job:
        recipe = folder / "small.yaml"
        recipe.write_text(CALIBRATED.format(data=text, tokens=tokens))
        return Job(load_recipe(str(recipe)), str(model), folder / "work", Silent())

    def test_a_calibrated_checkpoint_holds_its_report_and_the_texts_digest(self, tmp_path, model, text):
        made = self.job(tmp_path, model, text)
        assert actions(made) == dict.fromkeys(ARTIFACTS, "made")
        folder = made.folder / "checkpoint"
        page = (folder / "quantization_report.html").read_text(encoding="utf-8")
        assert "mine.txt" in page
        assert "self_attn.q_proj" in page
        inputs = json.loads((folder / "stamp.json").read_text())["inputs"]
        assert inputs["method"] == "awq"
        assert inputs["calibration"]["digest"] == hashlib.sha256(text.read_bytes()).hexdigest()
        report = json.loads((folder / "quantization_report.json").read_text())
        assert (report["calibration"]["samples"], report["calibration"]["tokens"]) == (4, 32)
        assert len(report["calibration"]["layers"]) == 2

    def test_another_text_or_other_settings_make_the_checkpoint_again_and_say_why(self, tmp_path, model, text):
        self.job(tmp_path, model, text).run("checkpoint")
        assert self.job(tmp_path, model, text).states()[0].fresh
        longer = self.job(tmp_path, model, text, tokens=40).states()[0]
        assert longer.reasons == ("calibration.tokens was 32, is 40",)
        text.write_text(text.read_text() + "\n\nOne more.")
        changed = self.job(tmp_path, model, text)
        assert changed.states()[0].reasons == ("the text that it is calibrated on changed",)
        assert changed.run("checkpoint")[0].action == "made"

    def test_text_that_is_missing_is_refused_by_name_and_leaves_nothing(self, tmp_path, model, text):
        text.unlink()
        with pytest.raises(RecipeError, match=r"there is no file .*mine\.txt"):
            self.job(tmp_path, model, text).run("checkpoint")
        assert not list((tmp_path / "work").rglob("stamp.json"))

    def test_a_checkpoint_that_was_brought_along_needs_neither_model_nor_text(self, tmp_path, model, text):
        self.job(tmp_path, model, text).run("checkpoint")
        text.unlink()
        moved = self.job(tmp_path, tmp_path / "gone", text)
        assert moved.states()[0].fresh
        other = self.job(tmp_path, tmp_path / "gone", tmp_path / "other.txt").states()[0]
        assert not other.fresh

    def test_without_calibration_there_is_no_text_no_report_page_and_the_key_of_before(self, tmp_path, model):
        made = job(tmp_path, model)
        made.run("checkpoint")
        folder = made.folder / "checkpoint"
        assert not (folder / "quantization_report.html").exists()
        inputs = json.loads((folder / "stamp.json").read_text())["inputs"]
        assert set(inputs) == {"weights", "group_size", "scales", "kv", "quantizer_version", "model"}
