"""conformance: the same questions at every door of a running service -> what held and what did not.

Doors: KServe over HTTP and over gRPC (Triton itself), OpenAI's API, FEDML's ``/predict``. Nothing is known of the
model but, where it is given, its chat template: answers are compared with one another, streamed with whole, and with
what each of them says about itself. Every check is greedy or has a seed, so it can be repeated.
"""

from __future__ import annotations

import operator
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.chat import ChatTemplate, Message
from toolchain.errors import EndpointError, RejectedError
from toolchain.measuring.conformance_doors import Door, Poster, Reply

_PROMPT = "The capital of France is"
_UNICODE = "日本の首都は😀🎉 Zürich"
_TOKENS = 24
_LONG_TOKENS = 256
_REGEX = "[a-z]{2,9}"
_TOLD_S = 1.0
"""Until ``/status`` tells of what was: engines and gateways look a few times a second."""


@dataclass
class Finding:
    """One check."""

    check: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class Beside:
    """What is there besides the doors that are compared; None: its checks are left out."""

    chat: Poster | None = None
    """``/v1/chat/completions``."""
    predict: Poster | None = None
    """``/predict``, for FEDML's classic body; together with ``chat``."""
    template: ChatTemplate | None = None
    """The model's own, to be compared with ``chat``."""
    kv_blocks: Callable[[], list[int] | None] | None = None
    """Blocks in use, by replica."""
    freed_s: float = 10.0
    """Until those of cancelled requests must be free; other clients' requests may end meanwhile."""


def conformance(doors: Sequence[Door], beside: Beside | None = None) -> Iterator[Finding]:
    """Each check as it is done. Raises EndpointError where a door does not answer at all."""
    beside = beside or Beside()
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
    yield from _cancelled(doors, answer.text, beside)
    if beside.chat and beside.template:
        yield _templated(doors, beside.chat, beside.template)
    if beside.chat and beside.predict:
        yield _classic(beside.predict, beside.chat)


def _cancelled(doors: Sequence[Door], answer: str, beside: Beside) -> Iterator[Finding]:
    """Streams that are left after their first piece, then the same answer and no more KV blocks than before."""
    before = beside.kv_blocks() if beside.kv_blocks else None
    for _ in range(8):
        for door in doors:
            _leave(door)
    after = [door.ask(_PROMPT, _TOKENS, stream=False).text for door in doors]
    yield _same("after cancelled streams the answer is as before", doors, after, answer)
    check = "cancelled streams free the KV cache"
    left = _settled(beside.kv_blocks, before, beside.freed_s) if beside.kv_blocks and before is not None else None
    if left is None or before is None:
        yield Finding(check, True, "not tried: the service has no /status that counts KV blocks")
    else:
        freed = _no_more(left, before)
        yield Finding(check, freed, "" if freed else f"{left} blocks in use, and {before} before")


def _leave(door: Door) -> None:
    """In the middle of a long answer: where it may be, the model is kept from ending it early. Triton 2.51 can crash
    when a gRPC stream is cancelled at the moment at which its answer ends
    (https://github.com/triton-inference-server/server/pull/7840).
    """
    try:
        door.begin(_PROMPT, _LONG_TOKENS, min_tokens=_LONG_TOKENS)
    except RejectedError:
        door.begin(_PROMPT, _LONG_TOKENS)


def _settled(blocks: Callable[[], list[int] | None], before: list[int], most_s: float) -> list[int] | None:
    """Blocks in use when they are as few as ``before``, or when the time for that is over."""
    until = time.monotonic() + most_s
    while True:
        time.sleep(min(_TOLD_S, most_s / 2))
        found = blocks()
        if found is None or _no_more(found, before) or time.monotonic() > until:
            return found


def _no_more(now: Sequence[int], before: Sequence[int]) -> bool:
    return len(now) == len(before) and all(map(operator.le, now, before))


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
    check = "an answer keeps to a regex"
    guide = {"guided_decoding_guide_type": "regex", "guided_decoding_guide": _REGEX}
    told = [_or_refusal(door, _PROMPT, **guide) for door in doors]
    if told[0] is not None and not re.fullmatch(_REGEX, told[0]):
        return Finding(check, False, f"{doors[0].name}: {told[0]!r} does not match {_REGEX}")
    if set(told) == {None}:
        return Finding(check, True, "not tried: every door refuses it; its recipe has no guided_decoding")
    return _same(check, doors, told)


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


def _templated(doors: Sequence[Door], chat: Poster, template: ChatTemplate) -> Finding:
    """A conversation over OpenAI's chat is the text that the model's template makes of it, sent to every door."""
    turns: list[Message] = [
        {"role": "user", "content": _PROMPT}, {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": _UNICODE},
    ]  # fmt: skip
    found = chat.post({"model": chat.model, "messages": turns, "max_tokens": _TOKENS, "temperature": 0})
    choice, used = found["choices"][0], found["usage"]
    prompt = template.render(turns)
    asked = [door.ask(prompt, _TOKENS, stream=False) for door in doors]
    told = [(one.text, one.prompt_tokens) for one in asked]
    expected = choice["message"]["content"], used["prompt_tokens"]
    return _same("a chat is what the model's template writes", doors, told, expected)


def _classic(predict: Poster, chat: Poster) -> Finding:
    """FEDML's ``{"text": ...}`` is one turn of a chat, or, without a chat template of the model, the bare prompt."""
    text = predict.post({"text": _PROMPT, "max_tokens": _TOKENS}).get("generated_text")
    turn = {"messages": [{"role": "user", "content": _PROMPT}], "max_tokens": _TOKENS, "temperature": 0}
    templated = chat.post({"model": chat.model, **turn})["choices"][0]["message"]["content"]
    bare = predict.post({"prompt": _PROMPT, "max_tokens": _TOKENS, "temperature": 0})["choices"][0]["text"]
    passed = text in (templated, bare)
    return Finding("/predict with a text answers as the chat", passed, "" if passed else f"{text!r}, {templated!r}")


def _counts(reply: Reply) -> tuple[int | None, int | None]:
    return reply.prompt_tokens, reply.answer_tokens
