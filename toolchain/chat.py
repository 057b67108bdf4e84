"""A conversation as the one text that the model was trained on: its own chat template, else Llama-2's.

Templates are Jinja2 programs that come with the model, so they run in Jinja2's sandbox, which lets them change nothing
and reach nothing but what they are given. The names that they may use are those of transformers
(https://huggingface.co/docs/transformers/chat_templating, 2026). It knows no tokenizer library, no server and no data
set: text in, text out. BOS in front is the tokenizer's business: it puts it there once, also before a template's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from toolchain.errors import ArtifactError, RejectedError

Message = Mapping[str, Any]
"""``{"role": "user", "content": "..."}``; further keys are for templates that know them."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template, None for Llama-2's format, and the special tokens that it may write (``{"bos_token": "<s>"}``)."""

    source: str | None
    tokens: Mapping[str, str] = field(default_factory=dict)

    @property
    def own(self) -> bool:
        """Whether it came with the model."""
        return self.source is not None

    @classmethod
    def of(cls, folder: Path) -> ChatTemplate:
        """The template of a tokenizer folder: ``chat_template.jinja``, else the key in ``tokenizer_config.json``.

        Raises ArtifactError for a file that cannot be read or a template that is not one.
        """
        config = {**_read(folder / "special_tokens_map.json"), **_read(folder / "tokenizer_config.json")}
        file = folder / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.is_file() else _named(config.get("chat_template"))
        tokens = {name: _token(value) for name, value in config.items() if name.endswith("_token")}
        template = cls(source, {name: text for name, text in tokens.items() if text})
        if source is not None:
            try:
                _compiled(source)
            except Exception as error:  # jinja2's errors
                raise ArtifactError(f"{folder}: the chat template is not valid: {error}") from error
        return template

    def render(self, messages: Sequence[Message], *, answer: bool = True, **variables: Any) -> str:
        """The text of ``messages``; with ``answer``, up to the place where the model's answer begins.

        A system message that the template refuses goes in front of what the user says first. ``variables`` are for
        the template, such as ``date_string``. Raises RejectedError with the template's own words.
        """
        if self.source is None:
            turns = [(str(message["role"]), str(message["content"])) for message in messages]
            return llama2_chat(turns, bos=self.tokens.get("bos_token", ""), eos=self.tokens.get("eos_token", ""))
        try:
            return self._run(messages, answer, variables)
        except Exception as refused:  # jinja2's errors, or whatever a template's own code makes of a message
            merged = without_system(messages)
            if merged is None:
                raise _refused(refused) from refused
            try:
                return self._run(merged, answer, variables)
            except Exception as error:
                raise _refused(error) from error

    def _run(self, messages: Sequence[Message], answer: bool, variables: Mapping[str, Any]) -> str:
        assert self.source is not None
        given = {"tools": None, "documents": None, "bos_token": "", "eos_token": "", **self.tokens, **variables}
        plain = [dict(message) for message in messages]
        return str(_compiled(self.source).render(messages=plain, add_generation_prompt=answer, **given))


def llama2_chat(messages: Iterable[tuple[str, str]], *, bos: str, eos: str) -> str:
    """(role, content) of each turn -> Llama-2's prompt format, each pair of turns between ``bos`` and ``eos``.

    Source: https://github.com/meta-llama/llama llama/generation.py, chat_completion (2023-07).
    """
    text, system = "", ""
    open_turn = False
    for role, content in messages:
        if role == "system":
            system = f"<<SYS>>\n{content.strip()}\n<</SYS>>\n\n"
        elif role == "user":
            text += f"{bos}[INST] {system}{content.strip()} [/INST]"
            system, open_turn = "", True
        else:
            text += f"{'' if open_turn else bos} {content.strip()} {eos}"
            open_turn = False
    return text


def without_system(messages: Sequence[Message]) -> list[Message] | None:
    """For templates that know no system role: its text in front of what the user says first; None where it is not so
    that a user follows a system message.
    """
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return None
    first = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *messages[2:]]


def _refused(error: Exception) -> RejectedError:
    return RejectedError(
        f"the model's chat template refuses this conversation: {error}",
        hint="Most templates want user and assistant to take turns, the user first.",
    )


@lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: object) -> None:
        raise jinja2.TemplateError(str(message))

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_block(), loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment.from_string(source)


def _generation_block() -> Any:
    """``{% generation %} ... {% endgeneration %}`` marks the model's own turns for training; here it is its content."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  # the library's own declaration

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return Generation


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja2's own filter writes HTML entities, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _named(template: Any) -> str | None:
    """A template as ``tokenizer_config.json`` holds it: a text, or several with names, of which "default" counts."""
    if isinstance(template, list):
        names = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = names.get("default")
    return template if isinstance(template, str) and template else None


def _token(token: Any) -> str:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read as JSON: {error}") from error
    return found if isinstance(found, dict) else {}
