"""Triton's events -> OpenAI's answers. The objects are those of the ``openai`` package, so their shape is its own.

A ``Piece`` is what one event says of one answer. ``Chat`` and ``Completion`` write pieces as server-sent events or the
whole as one object. They know nothing of HTTP.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from openai.types import Completion as CompletionObject
from openai.types import CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from openai.types.completion_choice import Logprobs

from toolchain.gateway.settings import Model

DONE = b"data: [DONE]\n\n"
_NO_CHOICES = '"choices":[]'
Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Token:
    """A generated token as text, and the logarithm of its probability."""

    text: str
    logprob: float


@dataclass(frozen=True)
class Piece:
    """A part of one answer. The last one of each has a ``finish``."""

    index: int
    text: str
    tokens: tuple[Token, ...] = ()
    finish: Finish | None = None
    prompt_tokens: int = 0
    answer_tokens: int = 0
    """So far."""


@dataclass
class Answer:
    """One answer, put together."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: Finish | None = None
    prompt_tokens: int = 0
    answer_tokens: int = 0

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish = piece.finish or self.finish
        self.prompt_tokens = piece.prompt_tokens or self.prompt_tokens
        self.answer_tokens = max(self.answer_tokens, piece.answer_tokens)


def read_event(event: Mapping[str, Any], model: Model, first_index: int = 0) -> Piece:
    """One event of ``tensorrt_llm_bls``; ``first_index``: what its sequence 0 is called in this request."""
    ids, logs = _listed(event.get("output_ids")), _listed(event.get("output_log_probs"))
    tokens = tuple(Token(_spelled(model, token), float(log)) for token, log in zip(ids, logs, strict=False))
    finish = event.get("finish_reason")
    return Piece(
        index=first_index + int(event.get("sequence_index", 0)),
        text=str(event.get("text_output", "")),
        tokens=tokens,
        finish=finish if finish in ("stop", "length") else None,
        prompt_tokens=int(event.get("num_input_tokens", 0)),
        answer_tokens=int(event.get("num_output_tokens", 0)),
    )


def usage(answers: Iterable[Answer], prompts: int = 1) -> CompletionUsage:
    """Each prompt counts once, whatever the number of its answers."""
    found = list(answers)
    step = max(1, len(found) // max(1, prompts))
    prompt = sum(answer.prompt_tokens for answer in found[::step])
    generated = sum(answer.answer_tokens for answer in found)
    return CompletionUsage(prompt_tokens=prompt, completion_tokens=generated, total_tokens=prompt + generated)


class Shape(Protocol):
    """How an answer is written."""

    def opening(self, indices: Iterable[int]) -> bytes:
        """Before the first pieces."""

    def piece(self, piece: Piece) -> bytes:
        """One server-sent event, or nothing."""

    def closing(self, used: CompletionUsage | None) -> bytes:
        """After the last piece; with ``used`` where the client wants it."""

    def whole(self, answers: Sequence[Answer], used: CompletionUsage) -> bytes:
        """All of it as one JSON object."""


class _OpenAi:
    """What both kinds of answers have in common."""

    prefix = ""

    def __init__(self, model: Model) -> None:
        self.id = f"{self.prefix}-{secrets.token_urlsafe(20)}"
        self.common: dict[str, Any] = {"id": self.id, "created": int(time.time()), "model": model.name}
        if model.fingerprint:
            self.common["system_fingerprint"] = model.fingerprint

    def _framed(self, empty: Any) -> tuple[bytes, bytes]:
        """A chunk without choices, written once, as what stands before and behind the choices of all that follow: to
        make and write the package's objects for each piece costs ten times as much as all else that is done for one.
        """
        before, choices, behind = str(empty.model_dump_json(exclude_unset=True)).partition(_NO_CHOICES)
        assert choices
        return f'data: {before}"choices":['.encode(), f"]{behind}\n\n".encode()


class Chat(_OpenAi):
    """``chat.completion`` and ``chat.completion.chunk``."""

    prefix = "chatcmpl"

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self._frame = self._framed(ChatCompletionChunk(choices=[], object="chat.completion.chunk", **self.common))

    def opening(self, indices: Iterable[int]) -> bytes:
        return b"".join(self._chunk(index, {"content": "", "role": "assistant"}) for index in indices)

    def piece(self, piece: Piece) -> bytes:
        text = b""
        if piece.text or piece.tokens:
            logprobs = ChunkLogprobs(content=_chat_logprobs(piece.tokens)) if piece.tokens else None
            text = self._chunk(piece.index, {"content": piece.text}, logprobs=logprobs)
        if piece.finish:
            text += self._chunk(piece.index, {}, piece.finish)
        return text

    def closing(self, used: CompletionUsage | None) -> bytes:
        if used is None:
            return DONE
        return _sse(ChatCompletionChunk(choices=[], usage=used, object="chat.completion.chunk", **self.common)) + DONE

    def whole(self, answers: Sequence[Answer], used: CompletionUsage) -> bytes:
        choices = [
            Choice(
                index=index,
                message=ChatCompletionMessage(role="assistant", content=answer.text, refusal=None),
                logprobs=ChoiceLogprobs(content=_chat_logprobs(answer.tokens)) if answer.tokens else None,
                finish_reason=answer.finish or "stop",
            )
            for index, answer in enumerate(answers)
        ]
        return _json(ChatCompletion(choices=choices, usage=used, object="chat.completion", **self.common))

    def _chunk(
        self,
        index: int,
        delta: dict[str, str],
        finish: Finish | None = None,
        logprobs: ChunkLogprobs | None = None,
    ) -> bytes:
        told = logprobs.model_dump(exclude_unset=True) if logprobs else None
        return _in_frame(self._frame, {"delta": delta, "finish_reason": finish, "index": index, "logprobs": told})


class Completion(_OpenAi):
    """``text_completion``, which is also what its chunks are."""

    prefix = "cmpl"

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self._offsets: dict[int, int] = {}
        self._frame = self._framed(CompletionObject(object="text_completion", choices=[], **self.common))

    def opening(self, indices: Iterable[int]) -> bytes:
        return b""

    def piece(self, piece: Piece) -> bytes:
        if not (piece.text or piece.tokens or piece.finish):
            return b""
        offset = self._offsets.get(piece.index, 0)
        self._offsets[piece.index] = offset + sum(len(token.text) for token in piece.tokens)
        told = _logprobs(piece.tokens, offset).model_dump(exclude_unset=True) if piece.tokens else None
        return _in_frame(
            self._frame,
            {"finish_reason": piece.finish, "index": piece.index, "logprobs": told, "text": piece.text},
        )

    def closing(self, used: CompletionUsage | None) -> bytes:
        if used is None:
            return DONE
        return _sse(CompletionObject(object="text_completion", choices=[], usage=used, **self.common)) + DONE

    def whole(self, answers: Sequence[Answer], used: CompletionUsage) -> bytes:
        choices = [
            CompletionChoice(
                index=index,
                text=answer.text,
                logprobs=_logprobs(answer.tokens, 0) if answer.tokens else None,
                finish_reason=answer.finish or "stop",
            )
            for index, answer in enumerate(answers)
        ]
        return _json(CompletionObject(object="text_completion", choices=choices, usage=used, **self.common))


class Predict:
    """FEDML's classic answer: ``{"generated_text": "..."}``; ``as_repr``: Python's repr of it in a JSON text, as
    FEDML's old template printed it.
    """

    def __init__(self, *, as_repr: bool = False) -> None:
        self._as_repr = as_repr

    def opening(self, indices: Iterable[int]) -> bytes:
        return b""

    def piece(self, piece: Piece) -> bytes:
        return b"data: " + self._written(piece.text) + b"\n\n" if piece.text else b""

    def closing(self, used: CompletionUsage | None) -> bytes:
        return DONE

    def whole(self, answers: Sequence[Answer], used: CompletionUsage) -> bytes:
        return self._written(answers[0].text)

    def _written(self, text: str) -> bytes:
        found = {"generated_text": text}
        return json.dumps(str(found) if self._as_repr else found, ensure_ascii=False).encode()


class PlainText(Predict):
    """The answer as a file, for an ``Accept`` that wants no JSON."""

    def whole(self, answers: Sequence[Answer], used: CompletionUsage) -> bytes:
        return answers[0].text.encode()


def _in_frame(frame: tuple[bytes, bytes], choice: dict[str, Any]) -> bytes:
    before, behind = frame
    return before + json.dumps(choice, ensure_ascii=False, separators=(",", ":")).encode(errors="replace") + behind


def _sse(one: Any) -> bytes:
    return b"data: " + _json(one) + b"\n\n"


def _json(one: Any) -> bytes:
    return str(one.model_dump_json(exclude_unset=True)).encode()


def _listed(value: Any) -> list[Any]:
    """Triton writes a tensor of one element as that element."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _spelled(model: Model, token: int) -> str:
    return model.tokenizer.decode([int(token)], skip_special=False) if model.tokenizer else f"token_id:{token}"


def _chat_logprobs(tokens: Sequence[Token]) -> list[ChatCompletionTokenLogprob]:
    return [
        ChatCompletionTokenLogprob(
            token=token.text, logprob=token.logprob, bytes=list(token.text.encode()), top_logprobs=[]
        )
        for token in tokens
    ]


def _logprobs(tokens: Sequence[Token], offset: int) -> Logprobs:
    offsets = [offset]
    for token in tokens[:-1]:
        offsets.append(offsets[-1] + len(token.text))
    return Logprobs(
        tokens=[token.text for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[{token.text: token.logprob} for token in tokens],
        text_offset=offsets,
    )
