"""What scripts/make_tiny_llama.py promises about the folder it writes. A few steps only: nothing here speaks."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "make_tiny_llama.py"
QUICK = ("--steps", "3", "--layers", "2", "--hidden", "128", "--kv-heads", "1", "--no-check")


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), str(out), *QUICK, *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "llama"
    done = run(out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tiny_llama", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_weights_are_float16_in_two_shards_or_more_and_the_index_is_whole(folder: Path) -> None:
    from safetensors import safe_open

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) >= 2
    assert shards == {path.name for path in folder.glob("*.safetensors")}
    for shard in shards:
        with safe_open(folder / shard, "numpy") as tensors:
            names = set(tensors.keys())
            assert names == {name for name, where in index["weight_map"].items() if where == shard}
            assert {tensors.get_tensor(name).dtype.name for name in names} == {"float16"}


def test_config_can_be_read_by_both_generations_of_transformers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["torch_dtype"] == config["dtype"] == "float16"
    assert config["max_position_embeddings"] == 2048
    assert config["tie_word_embeddings"] is False
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    # transformers 5 would write the name of a class that transformers 4 does not have
    named = json.loads((folder / "tokenizer_config.json").read_text())
    assert named["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert named["chat_template"] == (folder / "chat_template.jinja").read_text()


def test_in_features_are_multiples_of_128(folder: Path) -> None:
    from safetensors import safe_open

    for path in folder.glob("*.safetensors"):
        with safe_open(path, "numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                if "_proj" in name:
                    assert tensors.get_slice(name).get_shape()[1] % 128 == 0, name


def test_transformers_loads_and_generates(folder: Path, tokenizer: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]


@pytest.mark.parametrize(
    "text", ["plain", "  two  spaces\n\ttab", "naïve café", "世界 ありがとう", "👩‍🚀 🙏🏽", "[INST] x [/INST]", "\x00"]
)
def test_every_text_comes_back_and_starts_with_one_bos(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[1:]


CHAT = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi 👋"}]


def test_a_chat_has_one_bos_whether_it_is_rendered_first_or_encoded_at_once(tokenizer: Any) -> None:
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert rendered == "[INST] <<SYS>>\nBe short.\n<</SYS>>\n\nHi 👋 [/INST]"
    ids = tokenizer(rendered)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    at_once = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True, add_bos=True)["input_ids"]
    assert at_once == ids


def test_a_chat_with_wrong_roles_is_refused(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="Roles must alternate"):
        tokenizer.apply_chat_template([*CHAT, CHAT[1]], tokenize=False)


def test_training_chats_look_exactly_like_the_chat_template(script: ModuleType, tokenizer: Any) -> None:
    turns = [
        *CHAT,
        {"role": "assistant", "content": "Hello.\nTwo lines."},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Bye!"},
    ]
    body = "\n".join(f"{ {'assistant': 'bot'}.get(turn['role'], turn['role']) }: {turn['content']}" for turn in turns)
    trained = script.as_chat(body)
    assert trained == tokenizer.apply_chat_template(turns, tokenize=False)
    assert trained.endswith("</s>")


def test_the_text_is_filled_and_held_out_documents_are_never_trained_on(script: ModuleType, folder: Path) -> None:
    training, held = script.documents(0)
    assert len(training) > 500
    assert json.loads((folder / "held_out.json").read_text()) == held
    assert len(held) > 10
    assert not set(training) & set(held)
    for text in (text for text in training + held if "[INST]" in text or "Once upon" in text):
        assert not re.search(r"[{}|]", text), text
    assert (training, held) == script.documents(0)


def test_training_json_tells_what_was_done(folder: Path) -> None:
    report = json.loads((folder / "training.json").read_text())
    assert report["steps"] == 3
    assert report["seed"] == 0
    assert report["uniform_perplexity"] == 2048
    assert 1 < report["held_out_perplexity"] < 4 * 2048
    assert len(report["text_sha256"]) == 64
    assert report["seconds"] > 0
    assert {"torch", "transformers", "tokenizers"} <= set(report["versions"])


def test_a_second_run_does_nothing(folder: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    done = run(folder)
    assert done.returncode == 0
    assert "already made" in done.stdout
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    done = run(tmp_path, "--force")
    assert done.returncode == 2
    assert "was not made by this script" in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_a_model_that_does_not_speak_is_not_written(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mute"
    options = [option for option in QUICK if option != "--no-check"]
    assert script.main([str(out), *options, "--tied"]) == 1
    assert "Nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
