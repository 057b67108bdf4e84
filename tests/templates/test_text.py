"""The pure parts of pre- and postprocessing and BLS, checked against the tokenizers of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from answers import Answers
from detokenizer import Anchor, Stream
from hypothesis import given
from hypothesis import strategies as st
from prompts import Prompts
from stop_text import StopText
from tensors import RefusedError
from texts import detokenize
from tokenizer import Tokenizer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from words import flatten, spellings, unflatten

from tests.chatml import END, PAD, START, write_chatml_tokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog", "stop words cross token borders", "a b c d e f g 1 2 3 . , !"]
TEXTS = ["the quick fox", "日本の首都は東京です", "😀🎉🚀 done", "a\n\nb  c", "é à ü", "x"]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE as in Llama 3."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    return _saved(backend, trainer, tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BPE with a space mark and byte tokens, as in Llama 2: it drops a leading space of whatever it decodes."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    return _saved(backend, trainer, tmp_path_factory.mktemp("byte_fallback"), bytes_special=True)


def _saved(backend: Backend, trainer: trainers.BpeTrainer, folder: Path, *, bytes_special: bool = False) -> Path:
    backend.train_from_iterator(CORPUS, trainer)
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    if bytes_special:  # The byte tokens must be ordinary ones, or decoding would skip them.
        raw = json.loads(backend.to_str())
        raw["added_tokens"] = [token for token in raw["added_tokens"] if not token["content"].startswith("<0x")]
        backend = Backend.from_str(json.dumps(raw))
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["byte_level", "byte_fallback"])
def folder(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_texts_are_those_of_transformers(folder: Path, tokenizer: Tokenizer, text: str) -> None:
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = tokenizer.encode(text, special=True)
    assert ids == theirs.encode(text)
    assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == text
    assert (tokenizer.bos_id, tokenizer.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert tokenizer.pad_id == theirs.eos_token_id
    assert tokenizer.vocab_size == len(theirs)


def test_bos_is_there_exactly_once(tokenizer: Tokenizer) -> None:
    plain = tokenizer.encode("the fox", special=True)
    assert plain.count(tokenizer.bos_id) == 1
    assert tokenizer.encode("<s>the fox", special=True).count(tokenizer.bos_id) == 1
    assert tokenizer.bos_id not in tokenizer.encode("the fox", special=False)


def test_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("text", [*TEXTS, "日本 😀 the quick brown fox " * 4])
def test_streamed_text_is_the_whole_text_for_every_cut(tokenizer: Tokenizer, text: str, size: int) -> None:
    prompt = tokenizer.encode("the quick", special=True)
    whole = tokenizer.encode(f"the quick {text}", special=True)
    assert whole[: len(prompt)] == prompt
    expected = f" {text}"
    ids = whole[len(prompt) :]
    stream = Stream(tokenizer, Anchor(tokenizer))
    pieces = [stream.push(ids[start : start + size]) for start in range(0, len(ids), size)]
    assert "\ufffd" not in "".join(pieces)
    assert "".join([*pieces, stream.finish()]) == expected
    lengths = np.array([[len(ids)]])
    assert detokenize(tokenizer, Anchor(tokenizer), np.array([[ids]]), lengths) == [expected]


def test_half_character_at_the_end_is_given_out_as_such(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x 東", special=False)[:-1]
    stream = Stream(tokenizer, Anchor(tokenizer))
    assert "\ufffd" not in stream.push(ids)
    assert set(stream.finish()) == {"\ufffd"}
    assert stream.finish() == ""


def test_endless_rubbish_is_not_held_back_for_ever(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("x 東", special=False)[-2]
    stream = Stream(tokenizer, Anchor(tokenizer))
    assert "\ufffd" in "".join(stream.push([half]) for _ in range(100))


def test_prompt_with_bos_is_decoded_as_a_beginning(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the fox", special=True)
    assert Anchor(tokenizer).decode(tokenizer, ids) == "the fox"


@pytest.mark.parametrize("word", ["fox", "\n", "stop words", "。", "zzz"])
def test_stop_word_ids_are_found_in_what_a_model_writes(tokenizer: Tokenizer, word: str) -> None:
    prompt = tokenizer.encode("the quick", special=False)
    for text in (f"the quick {word}", f"the quick\n{word}"):
        ids = tokenizer.encode(text, special=False)[len(prompt) :]
        assert any(
            ids[start : start + len(found)] == found
            for found in spellings(tokenizer, Anchor(tokenizer), word)
            for start in range(len(ids))
        )


def test_words_are_laid_out_as_tensorrt_llm_takes_them() -> None:
    table = flatten([[2], [7, 8, 9]])
    assert table.dtype == np.int32
    assert table.tolist() == [[2, 7, 8, 9], [1, 4, -1, -1]]
    assert flatten([]).shape == (2, 0)


@given(st.lists(st.lists(st.integers(0, 1000), min_size=1, max_size=5), max_size=6))
def test_words_come_back_as_they_went_in(words: list[list[int]]) -> None:
    padded = np.pad(flatten(words), ((0, 0), (0, 2)), constant_values=-1)
    assert unflatten(flatten(words)) == words
    assert unflatten(padded) == words


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_text_is_cut_at_the_first_stop_word_for_every_cut(text: str, words: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    stop = StopText(words)
    given_out, ends = "", []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        given_out += stop.push(text[start:end])
        ends += [place + len(word) for word in words if (place := text.find(word)) >= 0]
    found = [word for word in words if word in text]
    if not found:
        assert (given_out + stop.finish(), stop.stopped) == (text, False)
        return
    assert stop.stopped
    assert any(text.startswith(given_out + word) for word in found)
    assert not any(word in given_out for word in words)


def prompts(tokenizer: Tokenizer) -> Prompts:
    return Prompts(tokenizer, max_input_len=16, special=True, vocab_size=tokenizer.vocab_size)


def query(*texts: str, **more: np.ndarray) -> dict[str, np.ndarray]:
    rows = np.array([[text.encode()] for text in texts], dtype=object)
    return {"QUERY": rows, "REQUEST_OUTPUT_LEN": np.full((len(texts), 1), 5, dtype=np.int32), **more}


def test_batch_of_prompts_is_padded_and_measured(tokenizer: Tokenizer) -> None:
    out = prompts(tokenizer).prepare(query("the fox", "the quick brown fox"))
    lengths = out["REQUEST_INPUT_LEN"].reshape(-1).tolist()
    assert out["INPUT_ID"].shape == (2, max(lengths))
    for row, length, text in zip(out["INPUT_ID"], lengths, ["the fox", "the quick brown fox"], strict=True):
        assert row[:length].tolist() == tokenizer.encode(text, special=True)
    assert out["OUT_END_ID"].tolist() == [[tokenizer.eos_id]] * 2
    assert out["STOP_WORDS_IDS"].shape == (2, 2, 0)


def test_prompt_that_is_too_long_is_refused_with_both_numbers(tokenizer: Tokenizer) -> None:
    with pytest.raises(RefusedError, match=r"text_input: .* \d\d tokens, .* at most 16"):
        prompts(tokenizer).prepare(query("1 2 3 " * 20))


@pytest.mark.parametrize("name", ["IMAGE_URL", "DECODER_QUERY", "IMAGES"])
def test_images_and_encoders_are_refused_by_name(tokenizer: Tokenizer, name: str) -> None:
    with pytest.raises(RefusedError, match=name):
        prompts(tokenizer).prepare(query("x", **{name: np.array([[b"y"]], dtype=object)}))
    prompts(tokenizer).prepare(query("x", **{name: np.array([[b""]], dtype=object)}))


def test_bias_goes_to_the_single_token_of_a_word(tokenizer: Tokenizer) -> None:
    words = np.array([[b"x"]], dtype=object)
    out = prompts(tokenizer).prepare(
        query("x", EMBEDDING_BIAS_WORDS=words, EMBEDDING_BIAS_WEIGHTS=np.array([[2.5]], dtype=np.float32))
    )["EMBEDDING_BIAS"]
    assert out.shape == (1, tokenizer.vocab_size)
    assert tokenizer.decode([int(out.argmax())]).strip() == "x"
    assert out.sum() == 2.5
    with pytest.raises(RefusedError, match="not a single token"):
        prompts(tokenizer).prepare(
            query(
                "x",
                EMBEDDING_BIAS_WORDS=np.array([[b"zqzq"]], dtype=object),
                EMBEDDING_BIAS_WEIGHTS=np.array([[1.0]], dtype=np.float32),
            )
        )


def test_answers_keep_sequences_apart_and_gather_log_probs(tokenizer: Tokenizer) -> None:
    answers = Answers(tokenizer, Anchor(tokenizer), ["dog"], True)
    fox, dog = (tokenizer.encode(text, special=False) for text in ("the quick fox", "lazy dog the"))
    for index, ids in ((0, fox), (1, dog)):
        for token in ids:
            answers.push(
                {
                    "output_ids": np.array([[[token]]]),
                    "sequence_length": np.array([[1]]),
                    "sequence_index": np.array([[index]]),
                    "output_log_probs": np.array([[[-1.0]]]),
                }
            )
    answers.finish()
    assert not answers.all_stopped
    (first,), extra = answers.take(0)
    (second,), _ = answers.take(1)
    assert first.strip() == "the quick fox"
    assert second.strip() == "lazy"
    assert extra["output_log_probs"].shape == (1, 1, len(fox))
    assert extra["output_ids"].reshape(-1).tolist() == fox


def test_an_answer_ends_by_length_only_when_all_tokens_were_given_and_nothing_stopped_it(tokenizer: Tokenizer) -> None:
    def ending(text: str, max_tokens: int, end_id: int = -1, stop: str = "dog") -> tuple[str, int]:
        answers = Answers(tokenizer, Anchor(tokenizer), [stop], True)
        ids = tokenizer.encode(text, special=False)
        answers.push({"output_ids": np.array([[ids]]), "sequence_length": np.array([[len(ids)]])})
        answers.finish()
        found = answers.summary(0, max_tokens, end_id)
        return found["finish_reason"][0].decode(), int(found["num_output_tokens"][0, 0])

    fox, dog = (tokenizer.encode(text, special=False) for text in ("the quick fox", "the lazy dog"))
    assert ending("the quick fox", len(fox)) == ("length", len(fox))
    assert ending("the quick fox", len(fox) + 1) == ("stop", len(fox))
    assert ending("the quick fox", len(fox), end_id=fox[-1]) == ("stop", len(fox))
    assert ending("the lazy dog", len(dog)) == ("stop", len(dog))


@pytest.fixture(scope="module", params=["plain", "bos in the configuration of the model"])
def chatml(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2's kind of tokenizer; its models name a BOS all the same, which prompts never have."""
    folder = tmp_path_factory.mktemp("chatml")
    write_chatml_tokenizer(folder, CORPUS)
    if request.param != "plain":
        names = {"model_type": "qwen2", "bos_token_id": PAD, "eos_token_id": END}
        (folder / "config.json").write_text(json.dumps(names))
        (folder / "generation_config.json").write_text(json.dumps({**names, "eos_token_id": [END, PAD]}))
    return folder


CHAT = "<|im_start|>user\nthe quick fox<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("text", [CHAT, *TEXTS])
def test_tokenizer_without_bos_gets_none(chatml: Path, text: str) -> None:
    ours, theirs = Tokenizer(chatml), AutoTokenizer.from_pretrained(chatml)
    assert ours.bos_id is None
    for special in (True, False):
        assert ours.encode(text, special=special) == theirs.encode(text, add_special_tokens=special)
    ids = ours.encode(text, special=True)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert (ours.eos_id, ours.pad_id) == (theirs.eos_token_id, theirs.pad_token_id) == (END, PAD)


def test_prompts_of_a_tokenizer_without_bos_begin_with_their_own_first_token(chatml: Path) -> None:
    tokenizer = Tokenizer(chatml)
    made = Prompts(tokenizer, max_input_len=90, special=True, vocab_size=tokenizer.vocab_size)
    out = made.prepare(query(CHAT, "fox"))
    assert out["INPUT_ID"][0, 0] == START
    assert out["INPUT_ID"][1, -1] == out["OUT_PAD_ID"][1, 0] == PAD
    assert out["OUT_END_ID"].tolist() == [[END], [END]]
    assert out["REQUEST_INPUT_LEN"][1, 0] == len(tokenizer.encode("fox", special=False))
    with pytest.raises(RefusedError, match="no BOS token"):
        made.prepare(query(""))


def test_streamed_answer_without_bos_is_the_whole_answer_and_shows_no_end_token(chatml: Path) -> None:
    tokenizer = Tokenizer(chatml)
    ids = [*tokenizer.encode(" 日本 😀 the lazy dog", special=False), END]
    stream = Stream(tokenizer, Anchor(tokenizer))
    assert "".join([*(stream.push([one]) for one in ids), stream.finish()]) == " 日本 😀 the lazy dog"
