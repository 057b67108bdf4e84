"""Stop texts, found in the text of the answer, wherever its tokens begin.

Triton's own ``stop_words`` also match as token ids, with the space that a model writes in front of a word, and cut that
space off; OpenAI's API keeps it. So the text decides here. The matcher is the one that ``tensorrt_llm_bls`` runs.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, cast

from toolchain.gateway.answers import Piece, Token
from toolchain.gateway.shared import load_shared


class StopText(Protocol):
    """Follows one text; what may be the beginning of a stop text is held back."""

    stopped: bool

    def push(self, text: str) -> str: ...

    def finish(self) -> str: ...


class Cut:
    """The pieces of one answer, without its stop text and what follows."""

    def __init__(self, words: Sequence[str]) -> None:
        self._text = _matcher()(words)
        self._tokens: deque[Token] = deque()
        self._room = 0
        """Characters that were given out, less those of the tokens that were."""

    def push(self, piece: Piece) -> Piece:
        """What is certain of it; with ``finish`` when a stop text has come. Log probabilities go with their text."""
        text = self._text.push(piece.text)
        stopped = self._text.stopped
        if piece.finish and not stopped:
            text += self._text.finish()
        self._tokens.extend(piece.tokens)
        self._room += len(text)
        everything = piece.finish is not None and not stopped
        return replace(
            piece, text=text, tokens=tuple(self._released(everything)), finish="stop" if stopped else piece.finish
        )

    def _released(self, everything: bool) -> list[Token]:
        found = []
        while self._tokens and (everything or len(self._tokens[0].text) <= self._room):
            found.append(self._tokens.popleft())
            self._room -= len(found[-1].text)
        return found


@functools.cache
def _matcher() -> Callable[[Sequence[str]], StopText]:
    return cast("Callable[[Sequence[str]], StopText]", load_shared("common/tensorrt_llm_bls/1/stop_text.py").StopText)
