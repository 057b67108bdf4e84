"""Promises about calibration text: where it comes from, how a conversation is written, what is told when it lacks."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.chatml import END, PAD, SPECIAL, START, write_chatml_tokenizer
from toolchain.chat import llama2_chat
from toolchain.errors import ArtifactError, PlanError, RecipeError
from toolchain.quantizers.conversations import BUILTIN_FILE, data_digest
from toolchain.quantizers.samples import Samples, load_samples

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello there!"},
    {"role": "assistant", "content": "Good morning."},
]
TEMPLATE = "{% for m in messages %}<s>[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}{% endfor %}"
)


@pytest.fixture
def plain(random_llama) -> Path:
    """A folder with a byte tokenizer that puts <s> in front and has no chat template."""
    return random_llama()


@pytest.fixture
def with_template(plain: Path, tmp_path: Path):
    from transformers import AutoTokenizer

    def make(template: str) -> Path:
        tokenizer = AutoTokenizer.from_pretrained(plain)
        tokenizer.chat_template = template
        folder = tmp_path / "templated"
        tokenizer.save_pretrained(folder)
        return folder

    return make


def load(data: object, folder: Path, samples: int = 1, tokens: int = 32, **settings: Any) -> Samples:
    settings = {"chat_template": True} | settings
    return load_samples(str(data), folder, samples=samples, tokens=tokens, **settings)


def jsonl(folder: Path, *rows: object) -> Path:
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def decoded(folder: Path, ids: np.ndarray) -> str:
    from transformers import AutoTokenizer

    return str(AutoTokenizer.from_pretrained(folder).decode(ids.reshape(-1).tolist()))


# -- the built-in conversations ---------------------------------------------------------------------------------------


def _builtin() -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in BUILTIN_FILE.read_text(encoding="utf-8").splitlines()]


def test_builtin_set_holds_several_hundred_different_conversations() -> None:
    talks = _builtin()
    assert len(talks) >= 300
    assert len({json.dumps(talk) for talk in talks}) == len(talks)
    assert 150_000 <= BUILTIN_FILE.stat().st_size <= 250_000
    words = re.findall(r"[a-z']+", " ".join(turn["content"] for talk in talks for turn in talk).lower())
    assert len(set(words)) > 4000


def test_builtin_conversations_take_turns_and_end_with_an_answer() -> None:
    for talk in _builtin():
        roles = [turn["role"] for turn in talk]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2), talk
        assert turns
        assert all(turn["content"] == turn["content"].strip() != "" for turn in talk)


def test_builtin_set_has_role_play_code_lists_and_letters() -> None:
    texts = ["\n".join(turn["content"] for turn in talk) for talk in _builtin()]
    assert sum("```" in text for text in texts) >= 20
    asked = re.compile(r"(^You are|act as|role-play|Character card|Take the part|From now on you)")
    assert sum(asked.search(text) is not None for text in texts) >= 48
    assert sum(re.search(r"^(1\.|- )", text, re.MULTILINE) is not None for text in texts) >= 30
    assert sum("Dear " in text for text in texts) >= 5
    assert sum(len(talk) > 3 for talk in _builtin()) >= 30


def test_builtin_set_fills_the_default_samples(plain: Path) -> None:
    found = load("builtin", plain, samples=64, tokens=256)
    assert found.token_ids.shape == (64, 256)
    assert found.token_ids.dtype == np.int32
    assert found.source == "built-in conversations"


# -- rows -------------------------------------------------------------------------------------------------------------


def test_same_data_and_settings_give_the_same_rows_and_digest(plain: Path) -> None:
    one, two = load("builtin", plain, 8), load("builtin", plain, 8)
    assert np.array_equal(one.token_ids, two.token_ids)
    assert one.digest == two.digest
    assert len(one.digest) == 64


def test_another_seed_or_setting_or_text_gives_another_digest(plain: Path, tmp_path: Path) -> None:
    one = load("builtin", plain, 8)
    assert not np.array_equal(load("builtin", plain, 8, seed=1).token_ids, one.token_ids)
    others = [load("builtin", plain, 8, seed=1), load("builtin", plain, 9), load("builtin", plain, 8, tokens=31),
              load("builtin", plain, 8, chat_template=False)]  # fmt: skip
    file = tmp_path / "copy.jsonl"
    file.write_bytes(BUILTIN_FILE.read_bytes())
    assert load(file, plain, 8).digest == one.digest
    file.write_bytes(BUILTIN_FILE.read_bytes() + b"\n")
    digests = {one.digest, load(file, plain, 8).digest, *(other.digest for other in others)}
    assert len(digests) == 6


def test_rows_are_texts_put_behind_one_another_without_padding(plain: Path, tmp_path: Path) -> None:
    file = jsonl(tmp_path, {"text": "abcdefg"}, {"text": "hijklmn"})
    found = load(file, plain, samples=2, tokens=8)
    assert sorted(decoded(plain, row) for row in found.token_ids) == ["<s>abcdefg", "<s>hijklmn"]


def test_too_little_text_says_how_far_it_goes(plain: Path, tmp_path: Path) -> None:
    file = jsonl(tmp_path, *[{"text": "0123456"}] * 12)
    with pytest.raises(PlanError, match=r"chats\.jsonl: its text makes 12 of 64 samples of 8 tokens") as caught:
        load(file, plain, samples=64, tokens=8)
    assert caught.value.hint == "Give more text or fewer samples: calibration: {samples: 12}"
    assert load(file, plain, samples=12, tokens=8).token_ids.shape == (12, 8)


# -- conversations ----------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_template_gets_llama_2s_and_bos_once(plain: Path, tmp_path: Path) -> None:
    file = jsonl(tmp_path, {"messages": TALK})
    text = "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHello there! [/INST] Good morning. </s>"
    size = len(text) - len("<s></s>") + 2
    assert decoded(plain, load(file, plain, tokens=size).token_ids) == text


def test_llama_2s_format_has_bos_and_eos_around_each_pair_of_turns() -> None:
    turns = [("user", "a "), ("assistant", " b"), ("user", "c"), ("assistant", "d")]
    assert llama2_chat(turns, bos="<s>", eos="</s>") == "<s>[INST] a [/INST] b </s><s>[INST] c [/INST] d </s>"


def test_the_tokenizers_own_template_is_used_with_bos_once_in_front(with_template, tmp_path: Path) -> None:
    folder = with_template(TEMPLATE)
    file = jsonl(tmp_path, {"messages": TALK})
    found = decoded(folder, load(file, folder, tokens=62).token_ids)
    assert found == "<s>[system] Be kind.</s><s>[user] Hello there!</s><s>[assistant] Good morning.</s>"[: len(found)]
    assert found.startswith("<s>[system]")


def test_bos_is_added_where_the_template_leaves_it_out(with_template, tmp_path: Path) -> None:
    folder = with_template("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}")
    found = load(jsonl(tmp_path, {"messages": TALK}), folder)
    assert decoded(folder, found.token_ids).startswith("<s>[system] Be kind.")


def test_a_tokenizer_without_bos_gets_none_with_and_without_its_template(tmp_path: Path) -> None:
    write_chatml_tokenizer(tmp_path, ["Be kind. Hello there! Good morning."])
    file = jsonl(tmp_path, *[{"messages": TALK}] * 40)
    text = decoded(tmp_path, load(file, tmp_path).token_ids)
    assert text.startswith("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello there!<|im_end|>")
    assert SPECIAL[PAD] not in text
    ids = load(file, tmp_path, chat_template=False).token_ids
    assert not {PAD, START, END} & set(ids.reshape(-1).tolist())


def test_a_template_without_system_role_gets_its_text_in_front_of_the_user(with_template, tmp_path: Path) -> None:
    folder = with_template(NO_SYSTEM)
    found = load(jsonl(tmp_path, {"messages": TALK}), folder)
    assert decoded(folder, found.token_ids).startswith("<s>[user] Be kind.\n\nHello there!")


def test_a_conversation_that_the_template_refuses_is_named_with_its_line(with_template, tmp_path: Path) -> None:
    folder = with_template(NO_SYSTEM)
    file = jsonl(tmp_path, {"messages": [TALK[1], TALK[0], TALK[2]]})
    with pytest.raises(
        RecipeError, match=r"chats\.jsonl:1: the model's chat template refuses.*no system role"
    ) as caught:
        load(file, folder)
    assert "chat_template: false" in caught.value.hint
    assert load(file, folder, chat_template=False).token_ids.size


def test_without_the_template_a_conversation_is_its_plain_turns(plain: Path, tmp_path: Path) -> None:
    found = load(jsonl(tmp_path, {"messages": TALK}), plain, chat_template=False)
    assert decoded(plain, found.token_ids).startswith("<s>Be kind.\n\nHello there!\n\nGood mo")


def test_a_template_that_states_the_date_gives_the_same_rows_every_day(with_template, tmp_path: Path) -> None:
    template = "{{ date_string if date_string is defined else strftime_now('%H:%M:%S %f') }}" + TEMPLATE
    folder = with_template(template)
    found = load(jsonl(tmp_path, {"messages": TALK}), folder)
    assert decoded(folder, found.token_ids).startswith("<s>26 Jul 2024<s>[system]")


# -- files ------------------------------------------------------------------------------------------------------------


def test_paragraphs_of_a_text_file_are_texts(plain: Path, tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("\n\nfirst\nline\n\n\n  \nother one\n")
    found = load(file, plain, samples=1, tokens=21)
    assert decoded(plain, found.token_ids) in ("<s>first\nline<s>other one"[:27], "<s>other one<s>first\nline"[:27])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{not json", r"chats\.jsonl:2: not valid JSON"),
        ('["a"]', r"chats\.jsonl:2: an entry is"),
        ('{"messages": []}', r"chats\.jsonl:2: an entry is"),
        ('{"prompt": "a"}', r"chats\.jsonl:2: an entry is"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', r"chats\.jsonl:2: each message has a role"),
        ('{"messages": [{"role": "user", "content": 3}]}', r"chats\.jsonl:2: each message has a role"),
        ('{"messages": ["a"]}', r"chats\.jsonl:2: each message has a role"),
    ],
)
def test_a_broken_entry_is_refused_with_its_line(plain: Path, tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(RecipeError, match=said):
        load(file, plain)


def test_a_file_that_is_missing_or_empty_or_not_text_is_refused_by_name(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no file .*gone\.txt") as caught:
        load(tmp_path / "gone.txt", plain)
    assert "data: builtin" in caught.value.hint
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(RecipeError, match=r"empty\.txt: there is no text in it"):
        load(empty, plain)
    empty.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"empty\.txt: not a text file in UTF-8"):
        load(empty, plain)
    with pytest.raises(RecipeError, match=r"must end in \.jsonl, \.txt, \.parquet"):
        load(tmp_path / "a.csv", plain)


def test_a_file_that_is_damaged_in_its_middle_is_refused_by_place(plain: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"messages": TALK}).encode()] * 400
    file = tmp_path / "chats.jsonl"
    file.write_bytes(b"\n".join([*lines[:200], b'{"messages": [{"role": "us', *lines[200:]]))
    with pytest.raises(RecipeError, match=rf"{re.escape(str(file))}:201: not valid JSON"):
        load(str(file), plain)
    place = len(b"\n".join(lines[:200]))
    file.write_bytes(b"\n".join(lines[:200]) + b"\xff\xfe" + b"\n".join(lines[200:]))
    with pytest.raises(RecipeError, match=rf"{re.escape(str(file))}: not a text file in UTF-8 \(byte {place}\)"):
        load(str(file), plain)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"there is no tokenizer\.json or tokenizer\.model"):
        load("builtin", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load("builtin", tmp_path)


def test_parquet_and_the_hub_name_the_package_that_is_missing(plain: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as Python itself marks what cannot be imported
    monkeypatch.setitem(sys.modules, "datasets", None)
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1")
    with pytest.raises(PlanError, match="needs pyarrow") as caught:
        load(file, plain)
    assert "pip install 'pyarrow<26'" in caught.value.hint
    with pytest.raises(PlanError, match=r"calibration\.data hf:some/set: .* needs datasets") as caught:
        load("hf:some/set", plain)
    assert "pip install datasets" in caught.value.hint


def test_parquet_columns_are_read_like_lines(plain: Path, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"id": [1], "messages": [TALK]}), file)
    same = load(jsonl(tmp_path, {"messages": TALK}), plain)
    assert np.array_equal(load(file, plain).token_ids, same.token_ids)
    parquet.write_table(arrow.table({"id": [1]}), file)
    with pytest.raises(RecipeError, match="no column messages or text; its columns are id"):
        load(file, plain)
    file.write_bytes(b"no parquet at all")
    with pytest.raises(RecipeError, match="cannot be read as parquet"):
        load(file, plain)


def test_a_data_set_of_the_hub_is_read_like_lines(plain: Path, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")
    same = load(jsonl(tmp_path, {"messages": TALK}), plain)
    assert np.array_equal(load("hf:./set", plain).token_ids, same.token_ids)


def test_data_digest_is_of_the_file_and_unknown_for_the_hub(tmp_path: Path) -> None:
    assert data_digest("builtin") == hashlib.sha256(BUILTIN_FILE.read_bytes()).hexdigest()
    assert data_digest("hf:some/set") is None
    assert data_digest(str(tmp_path / "gone.txt")) is None
