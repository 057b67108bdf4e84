"""scalellm verify --greedy: chat prompts, who writes, and what the report says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.stages.test_verify import job_of, quantized
from toolchain.cli import verbs
from toolchain.errors import PlanError
from toolchain.pipeline.greedy import Asked, verify_greedy
from toolchain.quality.chats import chats
from toolchain.quantizers.samples import open_tokenizer

TEXT = """\
name: one
model: some/model
device: a100
quantization: {weights: int4, group_size: 64}
kv_cache: {dtype: int8}
limits: {max_batch_size: 2, max_seq_len: 256}
calibration: {samples: 8, tokens: 64}
"""
CHATS = [
    [("system", "Be short."), ("user", "Who are you?"), ("assistant", "A knight."), ("user", "And your horse?")],
    [("user", "How deep is the lake?"), ("assistant", "Nobody knows.")],
    [("user", "word " * 400)],
    [("user", "Where is the bridge?")],
]


@pytest.fixture(scope="module")
def model(random_llama: Callable[..., Path]) -> Path:
    return random_llama(dtype="float32")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [{"messages": [{"role": role, "content": said} for role, said in one]} for one in CHATS]
    made = tmp_path / "chats.jsonl"
    made.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def test_role_play_prompts_have_their_length_and_one_start_token(model: Path) -> None:
    found = chats("builtin", model, samples=3, tokens=120, calibration=None)
    assert [len(ids) for ids in found.ids] == [120] * 3
    assert len(set(found.texts)) == 3
    tokenizer = open_tokenizer(model)
    for text, ids in zip(found.texts, found.ids, strict=True):
        assert text.startswith("[INST] ")  # a tokenizer without a template of its own gets Llama-2's
        assert text.endswith(" [/INST]")
        assert list(ids).count(tokenizer.bos_token_id) == 1


def test_of_a_conversation_all_before_its_last_answer_is_asked_and_long_ones_are_left_out(
    model: Path, file: Path
) -> None:
    found = chats(str(file), model, samples=3, tokens=180, calibration=None)
    first, second, third = found.texts
    assert first.endswith("A knight. </s><s>[INST] And your horse? [/INST]")
    assert second == "[INST] How deep is the lake? [/INST]"
    assert third == "[INST] Where is the bridge? [/INST]"
    with pytest.raises(PlanError, match="holds 3 of 4 chat prompts of at most 180 tokens") as refused:
        chats(str(file), model, samples=4, tokens=180, calibration=None)
    assert "--samples 3" in (refused.value.hint or "")


def test_the_report_tells_each_model_of_the_recipe_and_the_text_is_written_once(model: Path, tmp_path: Path) -> None:
    job = quantized(model, tmp_path, TEXT)
    asked = Asked(text="builtin", samples=5, tokens=112, count=12)
    found = verify_greedy(job, asked)
    written = json.loads(found.file.read_text())
    assert written == json.loads(json.dumps(found.report))
    assert set(found.report["models"]) == {"weights", "int8"}
    for name, one in found.report["models"].items():
        lengths = [answer["leading"][name] for answer in found.report["answers"]]
        assert one["agreement_length"]["value"] == pytest.approx(sum(lengths) / 5)
        assert one["agreement_length"]["error"] > 0
        assert one["same_answers"]["value"] == sum(length == 12 for length in lengths) / 5
        assert one["agreement_length"]["value"] <= 12 * one["greedy_agreement"]["value"]
    stamp = (tmp_path / "one" / "greedy" / "stamp.json").stat().st_mtime_ns
    again = verify_greedy(job, asked)
    assert json.loads(again.file.read_text()) == written
    assert (tmp_path / "one" / "greedy" / "stamp.json").stat().st_mtime_ns == stamp
    assert not [path for path in (tmp_path / "one").iterdir() if path.name.startswith("verify-")]


def test_the_unquantized_checkpoint_agrees_to_the_end(model: Path, tmp_path: Path) -> None:
    job = quantized(model, tmp_path, TEXT.replace("{weights: int4, group_size: 64}", "{weights: none}"))
    found = verify_greedy(job, Asked(text="builtin", samples=4, tokens=112, count=12))
    assert found.report["models"]["weights"]["agreement_length"] == {"value": 12, "error": 0}
    assert found.report["models"]["weights"]["same_answers"]["value"] == 1


def test_an_answer_that_leaves_no_room_for_a_prompt_is_refused(model: Path, tmp_path: Path) -> None:
    job = quantized(model, tmp_path, TEXT)
    with pytest.raises(PlanError, match="--greedy 60: leaves 4 of 64 tokens for a prompt") as refused:
        verify_greedy(job, Asked(text="builtin", samples=2, tokens=64, count=60))
    assert refused.value.hint == "--greedy 32, or more --tokens"


def test_the_verb_prints_a_table_or_json(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "one.yaml"
    recipe.write_text(TEXT)
    job_of(model, tmp_path / "work", TEXT).run("checkpoint")
    flags = ["verify", "--recipe", str(recipe), "--model", str(model), "--work", str(tmp_path / "work")]
    flags += ["--greedy", "6", "--tokens", "96", "--samples", "2"]
    said = CliRunner().invoke(verbs, flags, catch_exceptions=False)
    assert "2 greedy answers of at most 6 tokens to role-play prompts" in said.stdout
    assert "+ int8 cache" in said.stdout
    told = json.loads(CliRunner().invoke(verbs, [*flags, "--json"], catch_exceptions=False).stdout)
    assert told["models"]["weights"]["agreement_length"]["value"] <= 6
    both = CliRunner().invoke(verbs, [*flags, "--tasks", "x"])
    assert (both.exit_code, "give one of them" in both.stderr) == (2, True)
