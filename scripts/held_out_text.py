"""Text that a small Llama of make_tiny_llama.py was never trained on, in rows of tokens. It knows no quantization."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import make_tiny_llama

SEQUENCE_TOKENS = 512  # at most; a document is cut at its paragraphs
LEAST_TOKENS = 8  # a shorter piece says nothing
OTHER_SEED, ONE_IN = 1000, 3  # of the new words, and how many of the documents that they make


def untrained_documents(model: Path) -> dict[str, list[str]]:
    """`held_out`: what make_tiny_llama.py held out, and what it left over of Python's documentation.

    A paragraph whose beginning stands in the training text, under whatever title, is left out. `new_words`: documents
    of the kinds that the model was trained on, with other words in them; it knows their sentences, not their words.
    """
    training = json.loads((model / "training.json").read_text(encoding="utf-8"))
    known, held = make_tiny_llama.documents(training["seed"])
    if held != json.loads((model / "held_out.json").read_text(encoding="utf-8")):
        raise SystemExit(f"{model}: its held-out text is not what this make_tiny_llama.py makes: train it again")
    seen = {paragraph for text in known + held for paragraph in text.removesuffix("</s>").split("\n\n")}
    left: list[str] = []
    for _title, text in sorted(python_topics().items()):
        fresh = [p for p in text.split("\n\n") if p[: make_tiny_llama.TOPIC_CHARS] not in seen]
        seen.update(fresh)
        if fresh:
            left.append("\n\n".join(fresh))
    other = make_tiny_llama.documents(training["seed"] + OTHER_SEED)[0]
    new = sorted(set(other) - set(known) - {text for text in other if text.count("\n\n") > 3})
    return {"held_out": held + left, "new_words": new[::ONE_IN]}


def python_topics() -> dict[str, str]:
    """Python's documentation of its language, the paragraphs that are sentences: whole, where training has a cut."""
    limit, make_tiny_llama.TOPIC_CHARS = make_tiny_llama.TOPIC_CHARS, sys.maxsize
    try:
        return {title: text for title, text in make_tiny_llama.python_topics().items() if text}
    finally:
        make_tiny_llama.TOPIC_CHARS = limit


def sequences(tokenizer: Any, documents: Sequence[str], most: int = SEQUENCE_TOKENS) -> list[list[int]]:
    """Documents -> rows of at most `most` token ids, each beginning with <s>, cut between paragraphs if it can be."""
    rows = []
    for document in documents:
        row: list[int] = []
        for paragraph in document.split("\n\n"):
            ids = tokenizer.encode(("\n\n" if row else "") + paragraph, add_special_tokens=False)
            if len(row) + len(ids) >= most and row:
                rows.append(row)
                row, ids = [], tokenizer.encode(paragraph, add_special_tokens=False)
            row += ids
        rows.append(row)
    return [[tokenizer.bos_token_id, *row[: most - 1]] for row in rows if len(row) + 1 >= LEAST_TOKENS]


def training_documents(model: Path) -> list[str]:
    """What the model was trained on."""
    seed = json.loads((model / "training.json").read_text(encoding="utf-8"))["seed"]
    return make_tiny_llama.documents(seed)[0]
