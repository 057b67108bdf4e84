"""`scalellm inspect` and `scalellm import` as a person meets them, and that `build` imports by itself."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from tests.backends.test_openvino import TOLERANCE, Stateful, logits_of, span, tokens
from tests.conftest import SCALELLM
from tests.quantizers.foreign import gguf_files
from tests.quantizers.foreign import test_compressed_tensors as ct
from tests.quantizers.foreign.adopted import assert_same, dequantized
from tests.quantizers.foreign.folders import AWQ, GPTQ, awq, gptq, write
from tests.quantizers.foreign.test_pickled import pickled
from toolchain import workspace
from toolchain.checkpoint import Checkpoint
from toolchain.errors import ArtifactError, PlanError
from toolchain.pipeline import Job, import_model
from toolchain.progress import Silent
from toolchain.quantizers import foreign
from toolchain.recipe import load_recipe
from toolchain.stages.inspect import inspect


def job(folder: Path, model: Path, quantization: str, **more: str) -> Job:
    keys = {"device": "cpu", "limits": "{max_batch_size: 4, max_seq_len: 256}"} | more
    lines = [f"model: unused/unused\nquantization: {quantization}", *(f"{key}: {value}" for key, value in keys.items())]
    recipe = folder / "small.yaml"
    recipe.write_text("\n".join(lines) + "\n")
    return Job(load_recipe(str(recipe)), str(model), folder / "work", Silent())


class TestInspect:
    """What a folder is, in words and as JSON."""

    def test_a_plain_folder(self, random_llama):
        folder = random_llama()
        found = inspect(folder)
        assert (found.identity.format, found.identity.use) == ("plain", "direct")
        assert found.parameters == sum(int(np.prod(one.shape)) for one in Checkpoint.open(folder).tensors.values())
        assert found.next == f"scalellm build --recipe RECIPE --model {folder}"
        assert (found.layers, found.dtype, found.calibrated) == (2, "float16", False)

    def test_an_awq_folder_as_a_person_sees_it(self, tmp_path, scalellm):
        source = write(tmp_path / "x", awq(64), AWQ | {"group_size": 64})
        told = scalellm("inspect", source.path).stdout
        count = sum(one.numel() for one in source.model.parameters())
        for words in (
            "AutoAWQ int4, groups of 64",
            "LlamaForCausalLM",
            "yes, imported first",
            "zero points",
            f"{count / 1e6:.2f} million",
        ):
            assert words in told, told
        assert "quantization: {weights: int4, group_size: 64}" in told
        assert f"scalellm import {source.path} OUT" in told

    def test_zero_points_that_do_not_fit_are_told_before_anybody_tries(self, tmp_path, scalellm):
        source = write(tmp_path / "x", awq(128, zero=None), AWQ)
        found = json.loads(scalellm("inspect", source.path, "--json").stdout)
        assert found["identity"]["use"] == "refused"
        assert "% of its groups" in found["identity"]["reason"]
        assert found["next"].startswith("Start from the unquantized model")

    def test_a_gguf_file_and_a_pickled_folder(self, tmp_path, scalellm):
        file = gguf_files.write(tmp_path / "m.gguf", Type.Q4_0).path
        found = json.loads(scalellm("inspect", file, "--json").stdout)
        assert found["identity"]["title"] == "llama.cpp GGUF, Q4_0: int4 in groups of 32"
        assert found["identity"]["group_size"] == 32
        assert found["parameters"] == 2 * 512 * 256 + 256 + 2 * (4 * 256 * 256 + 3 * 256 * 512 + 2 * 256)
        pickled(tmp_path / "bin")
        assert "in pickled files (.bin)" in scalellm("inspect", tmp_path / "bin").stdout

    def test_our_own_checkpoint_shows_its_stamp(self, tmp_path, random_llama):
        made = job(tmp_path, random_llama(), "{weights: int4, group_size: 64}")
        made.run("engine")
        found = inspect(made.folder / "checkpoint")
        assert found.stamp.startswith("checkpoint, made 20")
        assert found.identity.producer.startswith("scalellm ")
        assert (found.identity.use, found.identity.weights, found.identity.group_size) == ("direct", "int4", 64)
        engine = inspect(made.folder / "engine")
        assert engine.kind == "engine"
        assert engine.facts["passport"]["checkpoint"] == workspace.require(made.folder / "checkpoint", "checkpoint").key

    def test_another_family_is_refused_by_name(self, tmp_path, random_llama):
        shutil.copytree(random_llama(), tmp_path / "other")
        config = json.loads((tmp_path / "other" / "config.json").read_text())
        (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"architectures": ["GemmaForCausalLM"]}))
        found = inspect(tmp_path / "other")
        assert found.identity.use == "refused"
        assert "GemmaForCausalLM" in found.identity.reason
        assert found.architecture == ""

    def test_nothing_there_is_an_error(self, tmp_path, scalellm):
        done = scalellm("inspect", tmp_path / "absent")
        assert done.returncode == 5
        assert "absent: no such file or folder" in done.stderr


class TestImport:
    """`scalellm import SRC OUT`"""

    def test_it_makes_a_checkpoint_and_says_what_to_type(self, tmp_path, scalellm):
        source = write(tmp_path / "x", gptq(), GPTQ)
        done = scalellm("import", source.path, tmp_path / "out")
        assert done.returncode == 0, done.stderr
        assert "quantization: {weights: int4, group_size: 128}" in done.stdout
        assert_same(dequantized(tmp_path / "out"), source.stands_for)
        again = json.loads(scalellm("import", source.path, tmp_path / "out", "--json").stdout)
        assert again["action"] == "kept"

    def test_a_folder_of_something_else_is_not_touched(self, tmp_path, scalellm):
        source = write(tmp_path / "x", gptq(), GPTQ)
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "letter.txt").write_text("dear")
        done = scalellm("import", source.path, tmp_path / "mine")
        assert done.returncode == 5
        assert "is no import" in done.stderr
        assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
        with pytest.raises(ArtifactError, match="is no import"):
            import_model(foreign.open_foreign(source.path), source.path, Silent())

    def test_a_folder_that_needs_none_says_so(self, tmp_path, scalellm, random_llama):
        done = scalellm("import", random_llama(), tmp_path / "out")
        assert done.returncode == 3
        assert "needs no import" in done.stderr
        assert not (tmp_path / "out").exists()

    def test_a_refusal_has_its_exit_code_and_no_traceback(self, tmp_path, scalellm):
        source = write(tmp_path / "x", awq(128, zero=None), AWQ)
        done = scalellm("import", source.path, tmp_path / "out")
        assert done.returncode == 3
        assert "% of its groups" in done.stderr
        assert "Traceback" not in done.stderr

    def test_kill_9_in_the_middle_loses_nothing(self, tmp_path, scalellm):
        source = write(tmp_path / "x", awq(), AWQ)
        argv = ["import", str(source.path), str(tmp_path / "out")]
        for _ in range(5):
            victim = subprocess.Popen([SCALELLM, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while victim.poll() is None and not list(tmp_path.glob("out.partial-*/journal.jsonl")):
                time.sleep(0.0005)
            victim.send_signal(signal.SIGKILL)
            victim.wait()
        assert scalellm(*argv).returncode == 0
        assert scalellm(*argv[:2], tmp_path / "whole").returncode == 0
        stamps = [json.loads((tmp_path / name / "stamp.json").read_text()) for name in ("out", "whole")]
        hashes = [{name: one["sha256"] for name, one in stamp["files"].items()} for stamp in stamps]
        assert hashes[0] == hashes[1]
        assert not list(tmp_path.glob("*.partial-*"))


class TestBuild:
    """A recipe whose model is foreign: it is imported on the way."""

    def test_q4_0_becomes_an_engine_with_the_same_logits(self, tmp_path):
        source = gguf_files.write(tmp_path / "m.gguf", Type.Q4_0, kv_heads=2)
        made = job(tmp_path, source.path, "{weights: int4, group_size: 32}")
        assert [result.action for result in made.run("repository")] == ["made"] * 3
        ids = tokens(2, 30)
        found = Stateful(made.folder / "engine")(ids, np.ones((2, 30), np.int64), span(2, 0, 30))
        reference = source.reference()
        for name, parameter in reference.named_parameters():
            if "norm" in name:
                parameter.data = parameter.data.half().float()
        np.testing.assert_allclose(found, logits_of(reference, ids), rtol=0, atol=TOLERANCE)
        again = job(tmp_path, source.path, "{weights: int4, group_size: 32}")
        assert [result.action for result in again.run("repository")] == ["kept"] * 3

    def test_the_imported_weights_are_linked_and_not_copied(self, tmp_path):
        source = write(tmp_path / "x", awq(), AWQ)
        made = job(tmp_path, source.path, "{weights: int4}")
        made.run("checkpoint")
        one, other = (made.folder / name / "model.safetensors" for name in ("imported", "checkpoint"))
        assert one.samefile(other)

    def test_a_changed_source_is_imported_again(self, tmp_path):
        source = write(tmp_path / "x", awq(), AWQ)
        job(tmp_path, source.path, "{weights: int4}").run("checkpoint")
        write(tmp_path / "y", awq(), AWQ, kv_heads=2)
        changed = job(tmp_path, tmp_path / "y", "{weights: int4}")
        assert changed.states()[0].reasons == ("the model's files changed",)
        assert changed.run("checkpoint")[0].action == "made"

    def test_a_pickled_model_is_quantized_as_the_recipe_says(self, tmp_path):
        pickled(tmp_path / "bin")
        made = job(tmp_path, tmp_path / "bin", "{weights: int4, group_size: 32}")
        made.run("engine")
        assert inspect(made.folder / "checkpoint").identity.group_size == 32
        assert inspect(made.folder / "imported").identity.format == "plain"

    @pytest.mark.parametrize(
        ("quantization", "asked"), [("{weights: none}", "none"), ("{weights: int4}", "int4 in groups of 128")]
    )
    def test_a_recipe_that_contradicts_the_folder_is_told_what_to_write(self, tmp_path, quantization, asked):
        source = gguf_files.write(tmp_path / "m.gguf", Type.Q4_0)
        with pytest.raises(PlanError, match=f"are int4 in groups of 32 already and cannot become {asked}") as caught:
            job(tmp_path, source.path, quantization)
        assert "quantization: {weights: int4, group_size: 32}" in caught.value.hint

    def test_groups_of_32_are_refused_for_tensorrt_by_name(self, tmp_path):
        source = gguf_files.write(tmp_path / "m.gguf", Type.Q4_0)
        with pytest.raises(PlanError, match="TensorRT-LLM engine computes groups of 128 or 64 only"):
            job(tmp_path, source.path, "{weights: int4, group_size: 32}", device="l4")

    def test_doctor_finds_the_imported_folder_intact(self, tmp_path, scalellm):
        source = write(tmp_path / "x", awq(), AWQ)
        made = job(tmp_path, source.path, "{weights: int4}")
        made.run("checkpoint")
        told = scalellm("doctor", "--work", tmp_path / "work").stdout
        assert f"{made.folder / 'imported'}" in told.replace("\n", "")
        assert "this is a" not in told

    def test_fp8_without_input_ranges_runs_on_a_cpu_and_is_refused_for_tensorrt(self, tmp_path):
        pack, settings = ct.packed(ct.FP8, "float-quantized"), ct.settings(ct.FP8, "float-quantized", ct.DYNAMIC)
        source = write(tmp_path / "x", pack, settings)
        made = job(tmp_path, source.path, "{weights: fp8}")
        assert [result.action for result in made.run("engine")] == ["made"] * 2
        with pytest.raises(PlanError, match="without the ranges of their inputs"):
            job(tmp_path, source.path, "{weights: fp8}", device="l4")
