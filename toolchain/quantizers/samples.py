"""Calibration text -> rows of token ids.

Conversations are written as the model's own chat template does; a tokenizer without one gets Llama-2's. All texts are
put behind one another in a shuffled order that a seed fixes, and cut into full rows, so nothing is padded. It knows no
model weights, no layer and no recipe.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from toolchain.chat import ChatTemplate
from toolchain.errors import ArtifactError, PlanError, RecipeError, RejectedError
from toolchain.quantizers.conversations import BUILTIN, Record, read_records

DATE = "26 Jul 2024"
"""Llama-3's templates state a date; one that stays the same, and that Llama-3.1's own template falls back to."""


@dataclass(frozen=True)
class Samples:
    """What runs through the model."""

    token_ids: npt.NDArray[np.int32]
    """[samples, tokens], no padding."""
    digest: str
    """sha256 (hex) of the data and the settings; the tokenizer is part of the model and not in it."""
    source: str
    """In words: ``"built-in conversations"`` or what the recipe named."""


def load_samples(
    data: str, tokenizer_folder: Path, *, samples: int, tokens: int, chat_template: bool, seed: int = 0
) -> Samples:
    """``samples`` rows of ``tokens`` token ids of the texts that ``data`` names.

    ``data``: ``builtin``, a path that ends in .jsonl, .txt (paragraphs) or .parquet, or ``hf:NAME``. The same data,
    tokenizer and settings give the same rows. BOS stands before each text once, if this tokenizer uses one.

    Raises RecipeError for data that cannot be read, naming the line; PlanError where a library is missing or there is
    too little text; ArtifactError for a folder without a tokenizer.
    """
    records, content = read_records(data)
    source = "built-in conversations" if data == BUILTIN else data
    return cut_rows(
        records,
        content,
        tokenizer_folder,
        samples=samples,
        tokens=tokens,
        chat_template=chat_template,
        seed=seed,
        source=source,
        too_little=(f"calibration.data {data}", "calibration: {{samples: {}}}"),
    )


def cut_rows(
    records: Sequence[Record],
    content: str,
    tokenizer_folder: Path,
    *,
    samples: int,
    tokens: int,
    chat_template: bool,
    source: str,
    too_little: tuple[str, str],
    seed: int = 0,
) -> Samples:
    """``load_samples`` of records that are at hand; ``content`` is their sha256.

    ``too_little``: what to call the data in the message, and how to ask for ``{}`` samples in its hint.
    """
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)
    encode = _encoder(tokenizer_folder, chat_template)
    ids: list[int] = []
    for place in order:
        if len(ids) >= samples * tokens:
            break
        ids += encode(records[place])
    if len(ids) < samples * tokens:
        named, fewer = too_little
        raise PlanError(
            f"{named}: its text makes {len(ids) // tokens} of {samples} samples of {tokens} tokens",
            hint=f"Give more text or fewer samples: {fewer.format(max(1, len(ids) // tokens))}",
        )
    rows = np.array(ids[: samples * tokens], dtype=np.int32).reshape(samples, tokens)
    settings = {"samples": samples, "tokens": tokens, "chat_template": chat_template, "seed": seed}
    digest = hashlib.sha256(f"{content}\n{json.dumps(settings, sort_keys=True)}".encode()).hexdigest()
    return Samples(rows, digest, source)


def _encoder(folder: Path, chat_template: bool) -> Callable[[Record], list[int]]:
    """Record -> token ids, with the tokenizer of ``folder`` and, for conversations, its chat template."""
    tokenizer = open_tokenizer(folder)
    bos = tokenizer.bos_token_id
    uses_bos = bos is not None and list(tokenizer.encode("a"))[:1] == [bos]
    own = ChatTemplate(tokenizer.chat_template or None, tokenizer.special_tokens_map)
    render = functools.partial(_render, own) if chat_template else None

    def encode(record: Record) -> list[int]:
        templated = render is not None and bool(record.messages)
        text = render(record) if render and templated else record.plain
        ids = [int(one) for one in tokenizer.encode(text, add_special_tokens=not templated)]
        if templated and uses_bos:
            ids = [bos, *ids]
        while bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        return ids

    return encode


def open_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a folder. Raises ArtifactError without one, PlanError without transformers."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ArtifactError(
            f"{folder}: calibration needs the model's tokenizer, there is no tokenizer.json or tokenizer.model",
            hint="Copy the tokenizer's files beside the weights",
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise PlanError(
            "calibration needs transformers, for the model's tokenizer, which is not installed",
            hint="pip install 'scalellm-toolchain[quantize]'",
        ) from error
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a broken tokenizer.json raises a bare Exception of the Rust library
        raise ArtifactError(f"{folder}: the model's tokenizer cannot be loaded: {error}") from error


def _render(template: ChatTemplate, record: Record) -> str:
    """A conversation as the model was trained on it: its own template; else Llama-2's."""
    messages = [{"role": role, "content": content} for role, content in record.messages]
    try:
        return template.render(messages, answer=False, date_string=DATE)
    except RejectedError as error:
        raise RecipeError(
            f"{record.where}: {error.message}",
            hint=f"{error.hint}\nOr leave the template out: calibration: {{chat_template: false}}",
        ) from error
