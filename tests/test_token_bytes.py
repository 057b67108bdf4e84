"""The bytes of tokens, against the tokenizers library's own decoding."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models
from tokenizers.decoders import ByteFallback, Fuse, Replace, Strip

from tests.conftest import _byte_tokenizer
from toolchain.errors import ArtifactError
from toolchain.token_bytes import parse, token_bytes, tokenizer_text, xgrammar_info


def sentencepiece() -> Tokenizer:
    """As Llama 2 has it: ``▁`` for spaces, ``<0x0A>`` for bytes, the first space of a text taken off."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁Hi", "▁", "日本", '"▁a']
    tokenizer = Tokenizer(models.BPE({word: place for place, word in enumerate(words)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([Replace("▁", " "), ByteFallback(), Fuse(), Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@pytest.mark.parametrize("make", [sentencepiece, lambda: _byte_tokenizer().backend_tokenizer])
def test_each_token_has_the_bytes_that_it_decodes_to(make: object) -> None:
    tokenizer: Tokenizer = make()  # type: ignore[operator]
    size = tokenizer.get_vocab_size()
    found = token_bytes(parse(tokenizer.to_str()), size + 3)
    assert found[size:] == [b""] * 3
    anchor = next(place for place in range(size) if found[place] == b"A")
    for token_id in range(size):
        text = tokenizer.decode([anchor, token_id], skip_special_tokens=True).removeprefix("A")
        if "\ufffd" not in text:
            assert found[token_id] == text.encode(), tokenizer.id_to_token(token_id)
    assert {bytes([byte]) for byte in range(256)} <= set(found), "every byte can be written"


def test_a_decoder_that_is_not_known_is_refused_by_name() -> None:
    tokenizer = Tokenizer(models.WordPiece({"a": 0, "##b": 1}, unk_token="a"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ArtifactError, match="WordPiece"):
        token_bytes(parse(tokenizer.to_str()), 2)


def test_what_tensorrt_llm_reads_has_the_tokens_in_order(tmp_path: Path) -> None:
    tokenizer = sentencepiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    info = xgrammar_info(tokenizer_text(tmp_path), (2,))
    assert info["encoded_vocab"] == [tokenizer.id_to_token(place) for place in range(tokenizer.get_vocab_size())]
    assert Tokenizer.from_str(info["tokenizer_str"]).get_vocab() == tokenizer.get_vocab()
    assert info["stop_token_ids"] == [2]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": {}}'])
def test_what_is_no_tokenizer_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="not a tokenizer"):
        parse(text)
