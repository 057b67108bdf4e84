"""Chat prompts as a model sees them: its own chat template around what a user says, up to where the answer begins.

``builtin`` are the role-play prompts that the project wrote for ``bench``, of exact lengths, which no calibration has
seen. It knows no weights and no server.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.chat import ChatTemplate
from toolchain.errors import PlanError, RecipeError, RejectedError
from toolchain.measuring.prompts import roleplay
from toolchain.quality.held_out import held_out_records
from toolchain.quantizers.conversations import BUILTIN, Record
from toolchain.quantizers.samples import DATE, open_tokenizer


@dataclass(frozen=True)
class Chats:
    """Prompts, as text and as token ids."""

    texts: tuple[str, ...]
    """As a server takes them: without the token that its tokenizer puts in front."""
    ids: tuple[tuple[int, ...], ...]
    source: str
    digest: str
    """sha256 (hex) of the texts."""


class _Writer:
    """A tokenizer with its chat template."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = open_tokenizer(folder)
        self._template = ChatTemplate(self._tokenizer.chat_template or None, self._tokenizer.special_tokens_map)
        bos = self._tokenizer.bos_token_id
        puts_it = bos is not None and list(self._tokenizer.encode("a"))[:1] == [bos]
        self._bos = str(self._tokenizer.bos_token) if puts_it else ""

    def text(self, messages: Sequence[dict[str, str]]) -> str:
        return self._template.render(messages, answer=True, date_string=DATE).removeprefix(self._bos)

    def ids(self, text: str) -> tuple[int, ...]:
        return tuple(int(one) for one in self._tokenizer.encode(text))


def chats(text: str, folder: Path, *, samples: int, tokens: int, calibration: str | None) -> Chats:
    """``samples`` prompts of ``tokens`` tokens (``builtin``), or of at most as many (a file's conversations).

    ``folder`` has the tokenizer; ``calibration`` as of ``held_out_rows``. Of a conversation everything before its last
    answer is the prompt, a plain text is what the user says. Raises RecipeError for a file that cannot be used,
    PlanError where it has too few, RejectedError where no prompt of that length can be made.
    """
    writer = _Writer(folder)
    found = _roleplay(writer, samples, tokens) if text == BUILTIN else _of_file(writer, text, tokens, calibration)
    texts = tuple(one for _, one in zip(range(samples), found, strict=False))
    if len(texts) < samples:
        raise PlanError(
            f"--text {text}: holds {len(texts)} of {samples} chat prompts of at most {tokens} tokens",
            hint=f"--samples {max(1, len(texts))}, or longer ones: --tokens",
        )
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    source = "role-play prompts" if text == BUILTIN else text
    return Chats(texts, tuple(map(writer.ids, texts)), source, digest)


def _roleplay(writer: _Writer, samples: int, tokens: int) -> Iterator[str]:
    def count(said: str) -> int:
        return len(writer.ids(writer.text(_asked(said))))

    for prompt in roleplay(count, tokens, samples, 1, seed="greedy"):
        yield writer.text(_asked(prompt.text))


def _of_file(writer: _Writer, text: str, tokens: int, calibration: str | None) -> Iterator[str]:
    for record in held_out_records(text, calibration)[0]:
        if messages := _before_answer(record):
            try:
                said = writer.text(messages)
            except RejectedError as error:
                raise RecipeError(f"{record.where}: {error.message}", hint=error.hint) from error
            if len(writer.ids(said)) <= tokens:
                yield said


def _before_answer(record: Record) -> list[dict[str, str]]:
    """The turns up to the last one of the user; empty where there is none."""
    if not record.messages:
        return _asked(record.text)
    last = max((at for at, (role, _) in enumerate(record.messages) if role == "user"), default=-1)
    return [{"role": role, "content": content} for role, content in record.messages[: last + 1]]


def _asked(said: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": said}]
