"""A checked body -> the prompt and the inputs of ``tensorrt_llm_bls``. It sends nothing.

OpenAI samples unless told otherwise (temperature 1, top_p 1), TensorRT-LLM decodes greedily unless told otherwise and
takes seed 0 each time; so both are always said here, and a request without a seed gets a random one.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.errors import RejectedError
from toolchain.gateway.bodies import Asked, ChatBody, CompletionBody, PredictBody
from toolchain.gateway.failures import invalid
from toolchain.gateway.guides import GUIDE, TYPE, guide_of
from toolchain.gateway.settings import Limits, Model
from toolchain.gateway.tokens import Tokenizer

_COMPLETION_TOKENS = 16
"""``max_tokens`` of a completion that names none. Source: OpenAI's API reference of completions."""
_MOST_STOPS = 16
"""OpenAI takes four."""
_SEED_BITS = 62
"""Of Triton's 64: each further answer gets the next seed, which must be one too."""


@dataclass(frozen=True)
class Request:
    """One request to a Triton."""

    inputs: Mapping[str, Any]
    answers: int
    stops: tuple[str, ...] = ()
    """Texts that end an answer; the gateway looks for them itself."""

    @property
    def prompt(self) -> str:
        return str(self.inputs["text_input"])


async def of_chat(body: ChatBody, model: Model, limits: Limits) -> Request:
    """A conversation, written as the model's chat template does. Raises ApiError."""
    names = {"developer": "system"}
    messages = [
        {"role": names.get(turn.role, turn.role), "content": turn.text, **({"name": turn.name} if turn.name else {})}
        for turn in body.messages
    ]
    try:
        prompt = model.template.render(messages)
    except RejectedError as error:
        raise invalid(f"messages: {error.message}", "messages") from None
    tokens = body.limit or await _room(model, prompt, limits.default_tokens)
    return _request(body, prompt, tokens, model, limits, _logprobs(body.wants_logprobs))


def of_completion(body: CompletionBody, model: Model, limits: Limits) -> list[Request]:
    """One request for each prompt. Raises ApiError."""
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if not 1 <= len(prompts) * body.answers <= limits.max_answers:
        raise invalid(f"prompt: 1 to {limits.max_answers} answers in one request, over all prompts", "prompt")
    tokens = body.limit or _COMPLETION_TOKENS
    more = _logprobs(body.wants_logprobs)
    return [_request(body, prompt, tokens, model, limits, more) for prompt in prompts]


async def of_predict(body: PredictBody, model: Model, limits: Limits) -> Request:
    """FEDML's classic body: the text as one turn of a chat where the model has a chat template of its own, else as it
    is. Greedy, unless sampling is asked for. Raises ApiError.
    """
    prompt = body.text
    if model.template.own:
        try:
            prompt = model.template.render([{"role": "user", "content": body.text}])
        except RejectedError as error:
            raise invalid(f"text: {error.message}", "text") from None
    temperature = body.temperature
    if temperature is None:
        temperature = 1.0 if body.top_p is not None or body.top_k is not None else 0.0
    tokens = body.max_tokens or body.max_new_tokens
    asked = Asked(
        model=body.model or model.name,
        temperature=temperature,
        **body.model_dump(include={"top_p", "top_k", "seed", "stop", "repetition_penalty"}),
    )
    tokens = tokens or min(limits.predict_tokens, await _room(model, prompt, limits.predict_tokens))
    guides = body.model_dump(include={TYPE, GUIDE}, exclude_none=True)
    return _request(asked, prompt, tokens, model, limits, guides)


def _request(body: Asked, prompt: str, tokens: int, model: Model, limits: Limits, more: Mapping[str, Any]) -> Request:
    if body.answers > limits.max_answers:
        raise invalid(f"n: {body.answers}, this server gives at most {limits.max_answers} answers", "n")
    inputs = {
        "text_input": prompt,
        "max_tokens": tokens,
        "stream": True,
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
        **_sampling(body),
        **_penalties(body),
        **guide_of(body),
        **_adapter(body.model, model),
        **(_bias(body.logit_bias, model.tokenizer) if body.logit_bias else {}),
        **more,
    }
    if body.answers > 1:
        inputs["num_return_sequences"] = body.answers
    if body.min_tokens:
        inputs["min_tokens"] = body.min_tokens
    return Request(inputs, body.answers, _stops(body.stop_words))


def _sampling(body: Asked) -> dict[str, Any]:
    if body.temperature == 0 or body.top_p == 0 or body.top_k == 1:
        return {"top_k": 1}
    seed = secrets.randbits(_SEED_BITS) if body.seed is None else body.seed & (2**_SEED_BITS - 1)
    return {
        "temperature": 1.0 if body.temperature is None else float(body.temperature),
        "top_p": 1.0 if body.top_p is None else float(body.top_p),
        "seed": seed,
        **({"top_k": body.top_k} if body.top_k else {}),
    }


def _penalties(body: Asked) -> dict[str, float]:
    """Only those that change something: an engine may lack one."""
    found = {
        "presence_penalty": (body.presence_penalty, 0.0),
        "frequency_penalty": (body.frequency_penalty, 0.0),
        "repetition_penalty": (body.repetition_penalty, 1.0),
    }
    return {name: float(value) for name, (value, none) in found.items() if value is not None and value != none}


def _stops(words: Sequence[str]) -> tuple[str, ...]:
    if len(words) > _MOST_STOPS:
        raise invalid(f"stop: {len(words)} texts, this server takes {_MOST_STOPS}", "stop")
    if not all(words):
        raise invalid("stop: an empty text would stop every answer at once", "stop")
    return tuple(words)


def _adapter(name: str, model: Model) -> dict[str, int]:
    """KServe counts adapters from 1; ``check_model`` has refused names of others."""
    number = model.names.index(name) if name in model.names else 0
    return {"lora_task_id": number} if number else {}


def _logprobs(wanted: bool) -> dict[str, bool]:
    return {"return_log_probs": True} if wanted else {}


def _bias(bias: Mapping[str, float], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """OpenAI names tokens by their ids, Triton by their text; an id whose text is another token's is refused."""
    if tokenizer is None:
        raise invalid("logit_bias is not supported: this gateway does not know the model's tokenizer", "logit_bias")
    words = [_word(tokenizer, token) for token in bias]
    return {"embedding_bias_words": words, "embedding_bias_weights": [float(one) for one in bias.values()]}


def _word(tokenizer: Tokenizer, token: str) -> str:
    """A token's text in the middle of other text, checked by the way back."""
    head = tokenizer.encode("a\n", special=False)
    if token.isdecimal() and len(token) < 10:
        try:
            text = tokenizer.decode([*head, int(token)], skip_special=False)
        except (IndexError, OverflowError, ValueError):
            text = ""
        word = text[len(tokenizer.decode(head, skip_special=False)) :]
        if word and tokenizer.encode(f"a\n{word}", special=False) == [*head, int(token)]:
            return word
    raise invalid(f"logit_bias: {token} is not a token of this model that can be named by its text", "logit_bias")


async def _room(model: Model, prompt: str, otherwise: int) -> int:
    """Tokens that are left for an answer behind ``prompt``; at least 1, for the engine then says what is too long."""
    if model.tokenizer is None or model.max_seq_len is None:
        return otherwise
    ids = await asyncio.to_thread(model.tokenizer.encode, prompt, special=True)
    return max(1, model.max_seq_len - len(ids))
