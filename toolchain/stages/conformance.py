"""conformance: the same questions at every door of a running service -> what held and what did not.

Doors: KServe over HTTP and over gRPC (Triton itself), OpenAI's API, FEDML's ``/predict``. Nothing is known of the
model: answers are compared with one another, streamed with whole, and with what each of them says about itself. Every
check is greedy or has a seed, so it can be repeated.
"""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from toolchain.endpoint import Endpoint
from toolchain.errors import EndpointError, RejectedError

_PROMPT = "The capital of France is"
_UNICODE = "日本の首都は😀🎉 Zürich"
_TOKENS = 24
_LONG_TOKENS = 256
_REGEX = "[a-z]{2,9}"
_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Reply:
    """A whole answer, or the pieces of a streamed one."""

    pieces: tuple[str, ...]
    finish: str | None = None
    prompt_tokens: int | None = None
    answer_tokens: int | None = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclass
class Finding:
    """One check."""

    check: str
    passed: bool
    detail: str = ""


class Door(Protocol):
    """One way to ask. Raises RejectedError for what is refused, EndpointError for what is broken."""

    name: str

    def ask(self, prompt: str, max_tokens: int, *, stream: bool, **sampling: Any) -> Reply:
        """``sampling`` as KServe names it: ``temperature``, ``top_p``, ``seed``, ``stop_words``, a guide."""

    def begin(self, prompt: str, max_tokens: int) -> None:
        """Take the first piece of a streamed answer and go away."""


class Kserve:
    """Triton's ``tensorrt_llm_bls``."""

    def __init__(self, endpoint: Endpoint, protocol: Literal["http", "grpc"]) -> None:
        self.name = f"KServe {'HTTP' if protocol == 'http' else 'gRPC'}"
        self._endpoint, self._protocol = endpoint, protocol

    def ask(self, prompt: str, max_tokens: int, *, stream: bool, **sampling: Any) -> Reply:
        counts = {"return_num_input_tokens": True, "return_num_output_tokens": True}
        pieces: list[str] = []
        told: dict[str, Any] = {}
        for chunk in self._endpoint.generate(
            prompt, max_tokens=max_tokens, protocol=self._protocol, stream=stream, **counts, **sampling
        ):
            pieces.append(chunk.text)
            told |= {name: _plain(value) for name, value in chunk.outputs.items()}
        counts_told = told.get("num_input_tokens"), told.get("num_output_tokens")
        return Reply(tuple(pieces), told.get("finish_reason"), *counts_told)

    def begin(self, prompt: str, max_tokens: int) -> None:
        with closing(self._endpoint.generate(prompt, max_tokens=max_tokens, protocol=self._protocol)) as chunks:
            next(iter(chunks))


class Json:
    """OpenAI's completions, at ``/v1/completions`` or as a body of ``/predict``."""

    def __init__(self, name: str, url: str, model: str, key: str | None) -> None:
        self.name, self.model, self._url, self._key = name, model, url, key

    def ask(self, prompt: str, max_tokens: int, *, stream: bool, **sampling: Any) -> Reply:
        body = self._body(prompt, max_tokens, **sampling)
        if not stream:
            found = self.post(body)
            choice, used = found["choices"][0], found["usage"]
            return Reply((choice["text"],), choice["finish_reason"], used["prompt_tokens"], used["completion_tokens"])
        pieces, finish, used = [], None, None
        for event in self.events({**body, "stream": True, "stream_options": {"include_usage": True}}):
            used = event.get("usage") or used
            for choice in event["choices"]:
                pieces.append(choice["text"])
                finish = choice["finish_reason"] or finish
        counts = (used["prompt_tokens"], used["completion_tokens"]) if used else (None, None)
        return Reply(tuple(pieces), finish, *counts)

    def begin(self, prompt: str, max_tokens: int) -> None:
        with closing(self.events({**self._body(prompt, max_tokens), "stream": True})) as events:
            next(iter(events))

    def post(self, body: dict[str, Any]) -> dict[str, Any]:
        with self._open(body) as answer:
            return dict(json.loads(answer.read()))

    def events(self, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        with self._open(body) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise EndpointError(str(event["error"]["message"]))
                    yield event

    def _body(self, prompt: str, max_tokens: int, **sampling: Any) -> dict[str, Any]:
        stop = sampling.pop("stop_words", None)
        if sampling.pop("guided_decoding_guide_type", None):
            sampling["structured_outputs"] = {"regex": sampling.pop("guided_decoding_guide")}
        greedy = {} if "temperature" in sampling else {"temperature": 0}  # without a word of it OpenAI samples
        return {
            "model": self.model, "prompt": prompt, "max_tokens": max_tokens, **greedy, **sampling,
            **({"stop": stop} if stop else {}),
        }  # fmt: skip

    def _open(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        try:
            return urllib.request.urlopen(request, timeout=_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            try:
                message = str(json.loads(error.read())["error"]["message"])
            except (ValueError, KeyError, TypeError):
                message = f"HTTP {error.code}"
            raise (EndpointError if error.code >= 500 else RejectedError)(message) from None
        except OSError as error:
            raise EndpointError(f"nobody answers at {self._url}: {error}") from None


def model_at(url: str, key: str | None) -> str:
    """The name of the model that ``/v1/models`` lists first. Raises EndpointError."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            return str(json.loads(answer.read())["data"][0]["id"])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise EndpointError(f"{url} lists no model: {error}", hint="scalellm gateway --recipe RECIPE") from None


def conformance(doors: Sequence[Door], classic: tuple[Json, Json] | None = None) -> Iterator[Finding]:
    """Each check as it is done. ``classic``: (``/predict``, ``/v1/chat/completions``), to compare FEDML's classic body.

    Raises EndpointError where a door does not answer at all.
    """
    plain = [door.ask(_PROMPT, _TOKENS, stream=False) for door in doors]
    answer = plain[0]
    yield _same("the greedy answer is the same at every door", doors, [one.text for one in plain])
    yield _same("BOS and all: the prompt has as many tokens", doors, [one.prompt_tokens for one in plain])
    for name, prompt in (("a streamed answer is the whole one", _PROMPT), ("Unicode across tokens", _UNICODE)):
        whole = [door.ask(prompt, _TOKENS, stream=False).text for door in doors]
        streamed = [door.ask(prompt, _TOKENS, stream=True) for door in doors]
        yield _same(name, doors, [*whole, *(one.text for one in streamed)])
    yield _same("a streamed answer counts the same tokens", doors, [_counts(one) for one in streamed])
    short = [door.ask(_PROMPT, 1, stream=False) for door in doors]
    yield _same("max_tokens 1 is one token", doors, [one.answer_tokens for one in short], 1)
    told = [door.ask(_PROMPT, 1, stream=True).finish for door in doors]
    yield _same("and ends by length", doors, told, "length")
    yield _stop(doors, answer.text)
    sampled = [door.ask(_PROMPT, _TOKENS, stream=False, temperature=1.0, top_p=0.9, seed=7).text for door in doors]
    yield _same("a seed gives the same sampled answer", doors, sampled)
    yield _guided(doors)
    yield _refused("max_tokens 0 is refused", doors, lambda door: door.ask(_PROMPT, 0, stream=False))
    too_long = "word " * 200_000
    yield _refused("a prompt that is too long is refused", doors, lambda door: door.ask(too_long, 1, stream=False))
    yield _same("an empty prompt is the same for all", doors, [_or_refusal(door, "") for door in doors])
    for _ in range(8):
        for door in doors:
            door.begin(_PROMPT, _LONG_TOKENS)
    after = [door.ask(_PROMPT, _TOKENS, stream=False).text for door in doors]
    yield _same("after cancelled streams the answer is as before", doors, after, answer.text)
    if classic:
        yield _classic(*classic)


def _same(check: str, doors: Sequence[Door], values: Sequence[Any], expected: Any = None) -> Finding:
    """All values alike. There may be several rounds of doors."""
    wanted = values[0] if expected is None else expected
    wrong = [f"{doors[number % len(doors)].name}: {value!r}" for number, value in enumerate(values) if value != wanted]
    return Finding(check, not wrong, f"{'; '.join(wrong)}; expected {wanted!r}" if wrong else "")


def _stop(doors: Sequence[Door], answer: str) -> Finding:
    """At a text from the middle of the answer, in front of which no space stands: Triton takes that off with it."""
    check = "an answer ends before a stop text"
    places = [place for place in range(2, len(answer) - 3) if " " not in answer[place - 1 : place + 1]]
    if not places:
        return Finding(check, True, "not tried: the answer is too short")
    stop = answer[places[len(places) // 2] :][:3]
    cut = answer[: answer.index(stop)]
    values = [
        door.ask(_PROMPT, _TOKENS, stream=stream, stop_words=[stop]).text for stream in (False, True) for door in doors
    ]
    return _same(check, doors, values, cut)


def _guided(doors: Sequence[Door]) -> Finding:
    """A service without guided decoding refuses it everywhere."""
    guide = {"guided_decoding_guide_type": "regex", "guided_decoding_guide": _REGEX}
    told = [_or_refusal(door, _PROMPT, **guide) for door in doors]
    if told[0] is not None and not re.fullmatch(_REGEX, told[0]):
        return Finding("an answer keeps to a regex", False, f"{doors[0].name}: {told[0]!r} does not match {_REGEX}")
    return _same("an answer keeps to a regex", doors, told, None if told[0] is None else told[0])


def _refused(check: str, doors: Sequence[Door], ask: Callable[[Door], Reply]) -> Finding:
    wrong = []
    for door in doors:
        try:
            ask(door)
            wrong.append(f"{door.name}: answered")
        except RejectedError as error:
            if not error.message:
                wrong.append(f"{door.name}: gives no reason")
        except EndpointError as error:
            wrong.append(f"{door.name}: {error.message}")
    return Finding(check, not wrong, "; ".join(wrong))


def _or_refusal(door: Door, prompt: str, **sampling: Any) -> str | None:
    try:
        return door.ask(prompt, _TOKENS, stream=False, **sampling).text
    except RejectedError:
        return None


def _classic(predict: Json, chat: Json) -> Finding:
    """FEDML's ``{"text": ...}`` is one turn of a chat, or, without a chat template of the model, the bare prompt."""
    text = predict.post({"text": _PROMPT, "max_tokens": _TOKENS}).get("generated_text")
    turn = {"messages": [{"role": "user", "content": _PROMPT}], "max_tokens": _TOKENS, "temperature": 0}
    templated = chat.post({"model": chat.model, **turn})["choices"][0]["message"]["content"]
    bare = predict.post({"prompt": _PROMPT, "max_tokens": _TOKENS, "temperature": 0})["choices"][0]["text"]
    passed = text in (templated, bare)
    return Finding("/predict with a text answers as the chat", passed, "" if passed else f"{text!r}, {templated!r}")


def _counts(reply: Reply) -> tuple[int | None, int | None]:
    return reply.prompt_tokens, reply.answer_tokens


def _plain(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value
