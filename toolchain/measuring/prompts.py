"""Prompts of exact token lengths, and prompts from a user's file. Reads files; talks to no server.

What a token is, the tokenizer says that is given. A prompt's length is what the server will see: with the tokens that
its tokenizer puts before it, and with the chat template around it where the door is a chat.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain import workspace
from toolchain.errors import ArtifactError, RejectedError

LENGTHS = (512, 1024, 2048, 3584)
TOTAL = 4096
"""Prompt and output together in FEDML's published comparison ("total sequence length 4K")."""
_FILLERS = (" so", " and", " now", " still", ".", "!", ",", " a", " I", "a", "e", "o", "\n", " ", "é", "\u6c34")

Count = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is sent, how long it is, and how many tokens are asked for."""

    text: str
    input_tokens: int
    max_tokens: int


@dataclass(frozen=True)
class Tokens:
    """A model's own tokenizer. ``chat``: prompts are counted inside its chat template."""

    tokenizer: Any
    sha256: str
    chat: bool = False

    @classmethod
    def load(cls, folder: Path, *, chat: bool = False) -> Tokens:
        """From a folder in Hugging Face's layout, without network. ArtifactError where it holds no tokenizer."""
        from transformers import AutoTokenizer

        files = [folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()]
        if not files:
            raise ArtifactError(
                f"{folder}: no tokenizer.json and no tokenizer.model", hint="--tokenizer DIR: the model's folder"
            )
        try:
            found = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ArtifactError(f"{folder}: the tokenizer cannot be read: {error}") from error
        if chat and not found.chat_template:
            raise RejectedError(
                f"{folder}: this tokenizer has no chat template, so a chat's length cannot be told",
                hint="ask the completions: --door openai-completions",
            )
        return cls(found, workspace.sha256_of(files[0]), chat)

    def of_prompt(self, text: str) -> int:
        """Tokens that the server computes for this prompt."""
        if self.chat:
            asked = [{"role": "user", "content": text}]
            said = self.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
            return len(self.tokenizer(said, add_special_tokens=False)["input_ids"])
        return len(self.tokenizer(text)["input_ids"])

    def of_answer(self, text: str) -> int:
        """Tokens of what was generated, without a start token."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def roleplay(count: Count, length: int, number: int, max_tokens: int, *, seed: object = 0) -> list[Prompt]:
    """``number`` different prompts of exactly ``length`` tokens. RejectedError where the tokenizer allows none."""
    return [
        Prompt(_exactly(count, length, random.Random(f"{seed} {length} {index}"), index), length, max_tokens)
        for index in range(number)
    ]


def _exactly(count: Count, length: int, chance: random.Random, index: int) -> str:
    words, size = list[str](), 0
    for paragraph in _scene(chance, index):
        words += paragraph.split(" ")
        words[-1] += "\n\n"
        size += count(paragraph)  # a little too many: each counts its own start token
        if size > 1.2 * length + 64:
            break
    low, high = 0, len(words)  # the longest beginning that is not too long
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(" ".join(words[:middle])) <= length else (low, middle - 1)
    text = " ".join(words[:low]).rstrip()
    return _filled(count, length, text)


def _filled(count: Count, length: int, text: str) -> str:
    """Words and letters behind the text until it is exactly as long; dropping words where none leads there."""
    for dropped in range(8):
        made = text.rsplit(" ", dropped)[0] if dropped else text
        here = count(made)
        while here < length:
            longer = ((count(made + filler), made + filler) for filler in _FILLERS)
            step = next((one for one in longer if here < one[0] <= length), None)
            if step is None:
                break
            here, made = step
        if here == length:
            return made
    raise RejectedError(f"no prompt of exactly {length} tokens can be made with this tokenizer", hint="a longer one?")


def _scene(chance: random.Random, index: int) -> Iterator[str]:
    """A character, a place, rules, and a conversation without end."""
    facts = workspace.facts("roleplay")
    mine, yours = chance.sample(facts["names"], 2)
    yield f"Scene {index + 1}, {chance.randrange(100000)}. You are {yours}, {chance.choice(facts['characters'])}."
    yield f"We meet in {chance.choice(facts['places'])}. I am {mine}. {' '.join(chance.sample(facts['rules'], 3))}"
    while True:
        for position, line in enumerate(chance.sample(facts["lines"], len(facts["lines"]))):
            yield f"{(mine, yours)[position % 2]}: {line}"


def from_file(path: Path, count: Count, max_tokens: int | None, limit: int) -> list[Prompt]:
    """Prompts of a JSONL file or of ShareGPT's JSON, in the order of the file, at most ``limit``.

    JSONL: one object a line with ``prompt`` (or ``text``) and perhaps ``max_tokens``. ShareGPT: a list of objects with
    ``conversations``, each turn ``from`` and ``value``: the first human turn is asked, and the answer's length is
    what is asked for, unless ``max_tokens`` is given. ArtifactError, naming the line, for anything else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: {error}") from None
    rows = _sharegpt(path, text, count) if text.lstrip().startswith("[") else _jsonl(path, text)
    made = []
    for said, own, where in rows:
        tokens = max_tokens or own
        if not tokens:
            raise ArtifactError(f"{path}: {where} has no max_tokens", hint="--output-tokens N")
        made.append(Prompt(said, count(said), tokens))
        if len(made) == limit:
            break
    if not made:
        raise ArtifactError(f"{path}: no prompts in it", hint='one JSON object a line: {"prompt": "..."}')
    return made


def _jsonl(path: Path, text: str) -> Iterator[tuple[str, int | None, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            said = row["prompt"] if "prompt" in row else row["text"]
            own = row.get("max_tokens")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ArtifactError(f'{path}:{number}: not an object with "prompt"') from None
        if not isinstance(said, str) or not said or not (own is None or (isinstance(own, int) and own > 0)):
            raise ArtifactError(f"{path}:{number}: prompt must be a text, max_tokens a positive number")
        yield said, own, f"line {number}"


def _sharegpt(path: Path, text: str, count: Count) -> Iterator[tuple[str, int | None, str]]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise ArtifactError(f"{path}: not JSON: {error}") from None
    for number, row in enumerate(rows):
        turns = row.get("conversations") if isinstance(row, Mapping) else None
        if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
            raise ArtifactError(f"{path}: entry {number} has no conversations", hint="ShareGPT's format")
        said = [(str(turn.get("from")), str(turn.get("value"))) for turn in turns]
        asked = next((at for at, (who, what) in enumerate(said) if who in ("human", "user") and what), None)
        if asked is None:
            continue
        answer = said[asked + 1][1] if asked + 1 < len(said) else ""
        yield said[asked][1], (count(answer) if answer else None), f"entry {number}"


def digest(prompts: Sequence[Prompt]) -> str:
    """sha256 of the texts and of what is asked of each."""
    told = json.dumps([(one.text, one.max_tokens) for one in prompts], ensure_ascii=False)
    return hashlib.sha256(told.encode()).hexdigest()
