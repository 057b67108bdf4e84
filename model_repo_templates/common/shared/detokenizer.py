"""Ids -> text when the ids arrive in pieces: no lost spaces, no half characters.

Two facts make this harder than ``decode``. Many tokenizers drop a leading space from whatever they decode, so a piece
is decoded behind an anchor (a token whose text is known) and the anchor's text is taken off again. And a character may
span several tokens, so that the text so far ends in U+FFFD until its last byte is there. It knows nothing of Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
_PENDING_LIMIT = 16
"""Tokens to wait for the rest of a character. UTF-8 needs at most four bytes, so four tokens; more are rubbish."""


class Decoder(Protocol):
    """What is needed of a tokenizer; ``tokenizer.Tokenizer`` fits."""

    bos_id: int | None

    def encode(self, text: str, *, special: bool) -> list[int]: ...

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str: ...


class Anchor:
    """A few ids with a text of their own, behind which other ids decode as they would inside a sentence."""

    def __init__(self, tokenizer: Decoder) -> None:
        for letter in ("a", "x", "1", "."):
            ids = tokenizer.encode(letter, special=False)
            text = tokenizer.decode(ids)
            if ids and text.strip() and tokenizer.decode(ids + ids).startswith(text):
                self.ids, self.text = ids, text
                return
        self.ids, self.text = [], ""

    def decode(self, tokenizer: Decoder, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of ``ids`` as the continuation of something. Ids that begin with BOS are a beginning: decoded as
        they are."""
        if tokenizer.bos_id is not None and list(ids[:1]) == [tokenizer.bos_id]:
            return tokenizer.decode(list(ids), skip_special=skip_special)
        text = tokenizer.decode([*self.ids, *ids], skip_special=skip_special)
        return text[len(self.text) :] if text.startswith(self.text) else text


class Stream:
    """The text of one growing sequence. What ``push`` and ``finish`` return, put together, is the text of the whole.

    Only a short window is decoded each time: the ids of the last piece that was given out and those after it. Of a
    piece that ends inside a character, the ids up to that character are given out.
    """

    def __init__(self, tokenizer: Decoder, anchor: Anchor, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._ids = list(anchor.ids)
        self._given = 0
        """Where the window begins."""
        self._read = len(self._ids)
        """How many ids are already given out as text."""

    def push(self, ids: Sequence[int]) -> str:
        """The text that is now certain; may be empty."""
        self._ids.extend(ids)
        end = len(self._ids)
        text = self._text_until(end)
        while text.endswith(REPLACEMENT) and end > max(self._read, len(self._ids) - _PENDING_LIMIT):
            end -= 1
            text = self._text_until(end)
        if text.endswith(REPLACEMENT):
            if len(self._ids) - self._read <= _PENDING_LIMIT:
                return ""
            end, text = len(self._ids), self._text_until(len(self._ids))
        return self._give(end, text)

    def finish(self) -> str:
        """What is left, half characters as U+FFFD."""
        return self._give(len(self._ids), self._text_until(len(self._ids)))

    def _give(self, end: int, text: str) -> str:
        if text:
            self._given, self._read = self._read, end
        return text

    def _text_until(self, end: int) -> str:
        """The text of the ids that are not given out yet, up to ``end``."""
        old = self._decode(self._ids[self._given : self._read])
        return self._decode(self._ids[self._given : end])[len(old) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=self._skip_special) if ids else ""
