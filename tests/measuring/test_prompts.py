"""Promises about prompts: exact lengths by the model's own tokenizer, no two alike, and files read or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.parrot import write_tokenizer
from toolchain.errors import ArtifactError, RejectedError
from toolchain.measuring.prompts import Prompt, Tokens, digest, from_file, roleplay


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(made)
    return made


@pytest.fixture(scope="module")
def tokens(folder: Path) -> Tokens:
    return Tokens.load(folder)


@pytest.mark.parametrize("length", [64, 512, 3584])
def test_role_play_prompts_have_exactly_the_length_that_transformers_counts(
    folder: Path, tokens: Tokens, length: int
) -> None:
    from transformers import AutoTokenizer

    made = roleplay(tokens.of_prompt, length, 4, 32)
    judge = AutoTokenizer.from_pretrained(folder)
    assert [len(judge(one.text)["input_ids"]) for one in made] == [length] * 4
    assert len({one.text[:40] for one in made}) == 4


@pytest.mark.parametrize(
    "count", [lambda text: len(text.split()), lambda text: 1 + len(text), lambda text: 3 + len(text.encode())]
)
def test_exact_lengths_with_words_letters_or_bytes_as_tokens(count) -> None:
    made = roleplay(count, 600, 3, 32)
    assert [count(one.text) for one in made] == [600] * 3


def test_the_same_seed_makes_the_same_prompts(tokens: Tokens) -> None:
    made = [digest(roleplay(tokens.of_prompt, 128, 3, 8, seed=seed)) for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]


def test_a_length_that_no_text_has_is_refused() -> None:
    with pytest.raises(RejectedError, match="exactly 101 tokens"):
        roleplay(lambda text: 2 * len(text), 101, 1, 8)


def test_jsonl(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "one two", "max_tokens": 7}\n\n{"text": "three"}\n')
    count = lambda text: len(text.split())  # noqa: E731
    assert from_file(file, count, 9, 10) == [Prompt("one two", 2, 9), Prompt("three", 1, 9)]
    with pytest.raises(ArtifactError, match="line 3 has no max_tokens"):
        from_file(file, count, None, 10)
    assert from_file(file, count, None, 1) == [Prompt("one two", 2, 7)]


def test_sharegpt_asks_the_first_human_turn_for_as_much_as_was_answered(tmp_path: Path) -> None:
    file = tmp_path / "share.json"
    turns = [{"from": "system", "value": "x"}, {"from": "human", "value": "a b"}, {"from": "gpt", "value": "c d e"}]
    file.write_text(json.dumps([{"conversations": [{"from": "gpt", "value": "alone"}]}, {"conversations": turns}]))
    assert from_file(file, lambda text: len(text.split()), None, 5) == [Prompt("a b", 2, 3)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no prompts in it"),
        ('{"prompt": "a"}\n{"prompt": 3}', ":2: prompt must be a text"),
        ('{"prompt": "a"}\nnonsense', ":2: not an object"),
        ('[{"turns": []}]', "entry 0 has no conversations"),
        ("[1, ", "not JSON"),
    ],
)
def test_a_file_that_is_neither_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad"
    file.write_text(text)
    with pytest.raises(ArtifactError, match=message):
        from_file(file, len, 5, 10)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no tokenizer\.json"):
        Tokens.load(tmp_path)


def test_a_chat_needs_a_template(folder: Path) -> None:
    with pytest.raises(RejectedError, match="no chat template"):
        Tokens.load(folder, chat=True)
