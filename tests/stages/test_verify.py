"""scalellm verify: what is measured, what the recipe accepts, and the verdict that serve heeds."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.engine_folder import write_engine
from tests.quality.against import logits, measured
from toolchain import accuracy, workspace
from toolchain.checkpoint import KV_RANGES
from toolchain.engine import Engine
from toolchain.errors import ArtifactError, PlanError, RecipeError
from toolchain.pipeline import Job, verifying
from toolchain.progress import Silent
from toolchain.quality.held_out import held_out_rows
from toolchain.quantizers.samples import Samples
from toolchain.recipe import parse_recipe

TEXT = """\
name: one
model: some/model
device: a100
quantization: {weights: int8}
kv_cache: {dtype: int8}
limits: {max_batch_size: 2, max_seq_len: 128}
calibration: {samples: 8, tokens: 64}
"""
ASKED = {"text": "builtin", "samples": 4, "tokens": 48}


@pytest.fixture(scope="module")
def model(random_llama: Callable[..., Path]) -> Path:
    return random_llama(dtype="float16", num_attention_heads=4, num_key_value_heads=4)


def job_of(model: Path, work: Path, text: str = TEXT) -> Job:
    return Job(parse_recipe(text, Path("one.yaml")), str(model), work, Silent())


def quantized(model: Path, work: Path, text: str = TEXT) -> Job:
    job = job_of(model, work, text)
    job.run("checkpoint")
    return job


def engine_of(job: Job, **passport: Any) -> Engine:
    """An engine that was built from the job's checkpoint."""
    key = workspace.require(job.path("checkpoint"), "checkpoint").key
    return write_engine(job.folder / "engine", "1.2.1", checkpoint=key, **passport)


def verdict_on(engine: Engine) -> accuracy.Verdict | None:
    return accuracy.read_verdict(engine.path, accuracy.digest_of(engine.stamp.files))


def test_the_report_says_what_transformers_say(model: Path, tmp_path: Path) -> None:
    """From the recipe to the file: the text, the checkpoint and its int8 cache, by whole models in float32."""
    job = quantized(model, tmp_path)
    found = verifying.verify(job, **ASKED)
    report = json.loads((tmp_path / "one" / "quality" / "report.json").read_text())
    rows = held_out_rows("builtin", model, samples=4, tokens=48, calibration="builtin")
    assert report["text"] == {"source": rows.source, "digest": rows.digest, "sequences": 4, "tokens": 48}
    original = logits(model, rows)
    for name, kv in (("weights", "fp16"), ("int8", "int8")):
        wanted = measured(original, logits(tmp_path / "one" / "checkpoint", rows, kv), rows)
        for key, value in wanted.items():
            assert report["models"][name][key]["value"] == pytest.approx(value, rel=2e-3, abs=2e-5), (name, key)
        assert report["models"][name]["kl"]["error"] > 0
    assert (found.passed, found.judged, found.failures) == (True, "int8", ())
    assert "W8A16 and a simulated int8 cache against the unquantized model on 4 x 48 tokens" in found.summary
    assert [one.kv for one in found.capacities] == ["int8", "fp16"]
    assert [one.bytes_per_token for one in found.capacities] == [1024, 2048]
    left = {file.name for file in (tmp_path / "one" / "quality").rglob("*") if file.is_file()}
    assert left == {"report.json", "stamp.json"}


def test_a_report_is_made_once_for_a_checkpoint_and_a_text(model: Path, tmp_path: Path) -> None:
    job = quantized(model, tmp_path)
    verifying.verify(job, **ASKED)
    stamp = tmp_path / "one" / "quality" / "stamp.json"
    first = stamp.stat().st_mtime_ns
    strict = job_of(model, tmp_path, TEXT + "accept: {top1_agreement: 1}\n")
    again = verifying.verify(strict, **ASKED)  # what is accepted is asked anew
    assert stamp.stat().st_mtime_ns == first
    assert not again.passed
    assert again.failures[0].startswith("top1_agreement is 0.")
    verifying.verify(job, **{**ASKED, "samples": 3})
    assert stamp.stat().st_mtime_ns != first


def changed(folder: Path, change: Callable[[Path], None]) -> None:
    """Change an artifact's files, and stamp it as if it had been made so."""
    change(folder)
    raw = json.loads((folder / "stamp.json").read_text())
    for name, record in raw["files"].items():
        stat = (folder / name).stat()
        record |= {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": workspace.sha256_of(folder / name)}
    (folder / "stamp.json").write_text(json.dumps(raw))


def ten_times_the_scale(folder: Path) -> None:
    file = folder / KV_RANGES
    document = json.loads(file.read_text())
    for layer in document["layers"]:
        layer["v_amax"] = layer["k_amax"] = 10 * max(layer["k_amax"], layer["v_amax"])
    file.write_text(json.dumps(document))


def test_a_wrong_scale_of_the_cache_is_not_accepted_and_the_fallback_is_named_with_its_price(
    model: Path, tmp_path: Path
) -> None:
    """Also where predictions hardly show it, as those of a small model that was trained: the ranges do."""
    text = TEXT + "accept: {top1_agreement: 0.5}\n"
    right = verifying.verify(quantized(model, tmp_path / "a", text), **ASKED)
    assert (right.passed, right.advice) == (True, ())
    job = quantized(model, tmp_path / "b", text)
    changed(job.path("checkpoint"), ten_times_the_scale)
    wrong = verifying.verify(job, **ASKED)
    assert not wrong.passed
    assert wrong.failures == (f"int8_kv_range is {range_used(wrong.report):.4g}, and accept says 0.2 at least",)
    assert range_used(wrong.report) == pytest.approx(range_used(right.report) / 10)
    assert wrong.advice[0].startswith("the weights pass and the int8 cache does not: kv_cache: {dtype: fp16} (")
    assert wrong.report["models"]["weights"] == right.report["models"]["weights"]


def range_used(report: dict[str, Any]) -> float:
    layers = report["caches"]["int8"]
    return min(max(one["k_amax"], one["v_amax"]) / (127 * one["scale"]) for one in layers)


def swapped_nibbles(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if tensor.dtype.itemsize == 1 and name.endswith("proj.weight"):
                tensors[name] = (tensor >> 4) | (tensor << 4)
        save_file(tensors, file)


def test_swapped_nibbles_are_not_accepted(model: Path, tmp_path: Path) -> None:
    text = TEXT.replace("{weights: int8}", "{weights: int4, group_size: 64}")
    right = verifying.verify(quantized(model, tmp_path / "a", text), **ASKED)
    job = quantized(model, tmp_path / "b", text)
    changed(job.path("checkpoint"), swapped_nibbles)
    wrong = verifying.verify(job, **ASKED)
    assert not wrong.passed
    assert wrong.advice == ("the weights alone do not pass: another method, smaller groups, or more bits",)
    assert wrong.report["models"]["weights"]["kl"]["value"] > 5 * right.report["models"]["weights"]["kl"]["value"]


class TestVerdict:
    """What lies beside the engine."""

    def test_of_weights_it_is_written_once_there_is_an_engine(self, model: Path, tmp_path: Path) -> None:
        job = quantized(model, tmp_path, TEXT + "accept: {top1_agreement: 0.01}\n")
        early = verifying.verify(job, **ASKED)
        assert early.verdict is None
        assert "no engine here yet" in early.notes[-1]
        engine = engine_of(job)
        found = verifying.verify(job, **ASKED)
        verdict = verdict_on(engine)
        assert verdict is not None
        assert (verdict.passed, verdict.summary) == (True, f"weights: {found.summary}")
        assert verdict.measured["weights"]["measures"]["kl"] == found.report["models"]["int8"]["kl"]
        assert verdict.measured["weights"]["accept"]["top1_agreement"] == 0.01

    def test_bad_weights_make_a_bad_one(self, model: Path, tmp_path: Path) -> None:
        job = quantized(model, tmp_path, TEXT + "accept: {top1_agreement: 1}\n")
        engine = engine_of(job)
        verifying.verify(job, **ASKED)
        verdict = verdict_on(engine)
        assert verdict is not None
        assert not verdict.passed

    def test_good_weights_do_not_open_the_gate_of_doubted_kernels_and_bad_ones_close_it(
        self, model: Path, tmp_path: Path
    ) -> None:
        text = TEXT.replace("a100", "t4")
        job = quantized(model, tmp_path, text)
        assert job.plan.gate == "required"
        engine = engine_of(job, device="t4", sm=75, gate="required")
        strict = job_of(model, tmp_path, text + "accept: {top1_agreement: 1}\n")
        verifying.verify(strict, **ASKED)
        bad = verdict_on(engine)
        assert bad is not None
        assert not bad.passed
        found = verifying.verify(job, **ASKED)
        assert found.passed
        assert found.verdict is None
        assert verdict_on(engine) is None
        assert "does not open the gate" in found.notes[-1]

    def test_what_the_running_engine_answered_opens_the_gate_of_doubted_kernels(
        self, model: Path, tmp_path: Path
    ) -> None:
        job = quantized(model, tmp_path, TEXT.replace("a100", "t4"))
        engine = engine_of(job, device="t4", sm=75, gate="required")
        good = {"passed": True, "summary": "32 answers equal", "measures": {}}
        weights = {"passed": True, "summary": "weights fine", "measures": {}}
        assert verifying.record(engine, verifying.WEIGHTS, weights, running=True) is None
        assert verifying.record(engine, verifying.ENGINE, good, running=True)
        first = verdict_on(engine)
        assert first is not None
        assert (first.passed, first.summary) == (True, "engine: 32 answers equal")
        verifying.record(engine, verifying.WEIGHTS, weights, running=True)
        both = verdict_on(engine)
        assert both is not None
        assert (both.passed, set(both.measured)) == (True, {"engine", "weights"})
        verifying.record(engine, verifying.ENGINE, good | {"passed": False, "summary": "other answers"}, running=True)
        bad = verdict_on(engine)
        assert bad is not None
        assert (bad.passed, bad.summary) == (False, "engine: other answers")

    def test_an_engine_of_another_checkpoint_gets_none(self, model: Path, tmp_path: Path) -> None:
        job = quantized(model, tmp_path)
        engine = write_engine(job.folder / "engine", "1.2.1", checkpoint="another")
        found = verifying.verify(job, **ASKED)
        assert "was built from another checkpoint" in found.notes[-1]
        assert verdict_on(engine) is None


def test_what_cannot_be_compared_is_refused_with_the_way_out(model: Path, tmp_path: Path) -> None:
    job = job_of(model, tmp_path)
    with pytest.raises(ArtifactError, match="not up to date: there is none yet") as caught:
        verifying.verify(job, **ASKED)
    assert caught.value.hint == "scalellm quantize --recipe one.yaml"
    job.run("checkpoint")
    with pytest.raises(PlanError, match="is quantized itself") as refused:
        verifying.verify(job, **ASKED, reference=tmp_path / "one" / "checkpoint")
    assert "--reference DIR" in refused.value.hint
    with pytest.raises(PlanError, match=r"--tokens 4096: the model knows 512 positions"):
        verifying.verify(job, **{**ASKED, "tokens": 4096})


class TestText:
    """What is measured on, and that it is not what the model was calibrated on."""

    def rows(self, model: Path, text: str, calibration: str | None = None) -> Samples:
        return held_out_rows(text, model, samples=2, tokens=16, calibration=calibration)

    def test_the_calibration_s_own_text_is_refused(self, model: Path, tmp_path: Path) -> None:
        text, copy = tmp_path / "a.txt", tmp_path / "b.txt"
        text.write_text("one two three four five six seven\n\neight nine ten eleven twelve\n" * 5)
        copy.write_text(text.read_text())
        assert self.rows(model, str(text), "builtin").token_ids.shape == (2, 16)
        for calibration in (text, copy):
            with pytest.raises(RecipeError, match="calibrated on, so it says nothing"):
                self.rows(model, str(text), str(calibration))

    def test_paragraphs_that_the_calibration_has_too_are_left_out(self, model: Path, tmp_path: Path) -> None:
        known, both, alone = (tmp_path / f"{name}.txt" for name in ("known", "both", "alone"))
        new = [f"paragraph number {number} is new here" for number in range(6)]
        known.write_text("this was seen before by the model\n\nand so was this\n")
        both.write_text("\n\n".join(["this was seen before by the model", *new]))
        alone.write_text("\n\n".join(new))
        np.testing.assert_array_equal(
            self.rows(model, str(both), str(known)).token_ids, self.rows(model, str(alone)).token_ids
        )
        part = tmp_path / "part.txt"
        part.write_text("and so was this\n")
        with pytest.raises(RecipeError, match="calibrated on all of it"):
            self.rows(model, str(part), str(known))

    def test_what_cannot_be_read_or_is_too_little_is_refused(self, model: Path, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match=r"--text a\.doc: the file must end in"):
            self.rows(model, "a.doc")
        with pytest.raises(RecipeError, match=r"--text none\.txt: there is no such file"):
            self.rows(model, "none.txt")
        (tmp_path / "short.txt").write_text("short")
        with pytest.raises(PlanError, match=r"its text makes 0 of 2 samples") as caught:
            self.rows(model, str(tmp_path / "short.txt"))
        assert "--samples 1" in caught.value.hint


def test_the_verb_prints_a_table_or_json_and_its_exit_code_is_the_verdict(
    model: Path, tmp_path: Path, scalellm: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    recipe = tmp_path / "one.yaml"
    recipe.write_text(TEXT)
    flags = ("--recipe", recipe, "--model", model, "--work", tmp_path / "work")
    assert scalellm("quantize", *flags).returncode == 0
    more = ("--samples", "4", "--tokens", "48", "--max-ram", "4GiB")
    said = scalellm("verify", *flags, *more)
    assert said.returncode == 0, said.stderr
    assert "+ int8 cache *" in said.stdout
    assert "accepted: weights W8A16" in said.stdout
    recipe.write_text(TEXT + "accept: {top1_agreement: 1}\n")
    told = scalellm("verify", *flags, *more, "--json")
    assert told.returncode == 1
    document = json.loads(told.stdout)
    assert document["passed"] is False
    assert document["report"]["models"]["int8"]["kl"]["value"] > 0
    small = scalellm("verify", *flags, "--samples", "5", "--tokens", "48", "--max-ram", "1MiB")
    assert small.returncode == 3
    assert "verify needs at least" in small.stderr
