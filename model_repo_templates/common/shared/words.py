"""Stop and bad words as TensorRT-LLM takes them: flattened ids and where each word ends.

    ["</s>", "END"]  ->  [[2, 7, 8, 9], [1, 4, -1, -1]]      int32 [2, n]

It knows nothing of Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detokenizer import Anchor, Decoder


def flatten(words: Sequence[Sequence[int]]) -> np.ndarray:
    """Words as id lists -> int32 [2, n]: row 0 all ids in a row, row 1 the end of each word, then -1. No words: [2, 0].

    Source of the layout: TensorRT-LLM, tensorrt_llm/runtime/generation.py ``to_word_list_format`` (2024-08).
    """
    ids = [token for word in words for token in word]
    ends = list(np.cumsum([len(word) for word in words], dtype=np.int64)) if words else []
    table = np.full((2, len(ids)), -1, dtype=np.int32)
    table[0] = ids
    table[1, : len(ends)] = ends
    return table


def unflatten(table: np.ndarray) -> list[list[int]]:
    """The reverse of ``flatten``; [..., 2, n] -> id lists. Empty words and padding are dropped."""
    rows = np.asarray(table).reshape(2, -1)
    words, start = [], 0
    for end in rows[1].tolist():
        if end <= start:
            break
        words.append(rows[0, start:end].tolist())
        start = end
    return words


def spellings(tokenizer: Decoder, anchor: Anchor, word: str) -> list[list[int]]:
    """The ids that a model writes ``word`` with: in the middle of a text, and as a new word behind a space.

    A word whose letters the model cuts in yet another way is not found by ids; ``tensorrt_llm_bls`` also looks at the
    text.
    """
    found: list[list[int]] = []
    for text in (word, f" {word}"):
        ids = _continuing(tokenizer, anchor, text)
        if ids and ids not in found:
            found.append(ids)
    return found


def _continuing(tokenizer: Decoder, anchor: Anchor, text: str) -> list[int]:
    """The ids of ``text`` as a continuation: encoded behind the anchor, which is then taken off."""
    letter = anchor.text.strip()
    ids = tokenizer.encode(f"{letter}\n{text}", special=False)
    head = tokenizer.encode(f"{letter}\n", special=False)
    if head and ids[: len(head)] == head:
        return ids[len(head) :]
    return tokenizer.encode(text, special=False)
