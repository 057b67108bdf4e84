"""What goes between the gateway's side and a worker: token ids, and the other tensors of ``tensorrt_llm`` as they are.

Request: Dynamo's ``PreprocessedRequest``. Dynamo itself reads and changes ``token_ids`` and
``stop_conditions.max_tokens``: after a worker was lost, the next one gets the prompt and the tokens so far, and
``max_tokens`` less by as many. Everything else travels in ``extra_args``, which it passes on.
Item: Dynamo's ``LLMEngineOutput``; one without tokens only says that the worker lives, and the first one of a worker
also its replica's name, in ``extra_args``: so the gateway knows whose tokens follow. A refusal is one item with
``extra_args`` and a finish reason, since it must not be tried on another worker.
Source of the names: ai-dynamo-runtime 1.6.1, read 2026-11. It knows nothing of Dynamo's objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Item = dict[str, Any]
_GUIDED = ("guided_decoding_guide_type", "guided_decoding_guide")
_METRICS = "return_perf_metrics"
_STUCK = "cannot_continue"
_TOLD = {"id", "model_name", "model_version", "output_ids", "sequence_length", "output_log_probs", "cum_log_probs"}
_TOLD |= {"batch_index", "sequence_index", "num_input_tokens", "num_output_tokens"}
"""Of an event of ``tensorrt_llm``: what is no metric."""


@dataclass(frozen=True)
class Ask:
    """One answer that is wanted: one sequence."""

    ids: tuple[int, ...]
    """The prompt; after a failover with the tokens so far behind it."""
    max_tokens: int
    tensors: Mapping[str, Any] = field(default_factory=dict)
    """The other inputs of ``tensorrt_llm`` by its newest names; plain values, flat lists."""
    prompt_tokens: int = 0
    """How many of the ids the client sent."""
    draft_tokens: int = 0
    """How many a draft engine may write for one step, where the replica has one beside its engine."""

    @property
    def so_far(self) -> int:
        """Tokens that another worker has already given."""
        return len(self.ids) - self.prompt_tokens

    @property
    def end_id(self) -> int:
        """The id that ends the answer, -1 for none."""
        return int(listed(self.tensors.get("end_id", -1))[0])

    @property
    def can_continue(self) -> bool:
        """Whether another worker may go on in the middle: a guide can only be followed from the beginning."""
        return not any(self.tensors.get(name) for name in _GUIDED)


def request(ask: Ask, model: str) -> dict[str, Any]:
    """Dynamo's request for it."""
    return {
        "model": model,
        "token_ids": list(ask.ids),
        "stop_conditions": {"max_tokens": ask.max_tokens, "ignore_eos": True},
        "sampling_options": {},
        "output_options": {},
        "eos_token_ids": [],
        "annotations": [],
        "extra_args": {
            "tensors": dict(ask.tensors),
            "prompt_tokens": ask.prompt_tokens,
            "draft_tokens": ask.draft_tokens,
        },
    }


def ask_of(found: Mapping[str, Any]) -> Ask:
    """The reverse, in the worker. Raises ValueError for what this release did not send."""
    try:
        extra = found["extra_args"]
        return Ask(
            ids=tuple(found["token_ids"]),
            max_tokens=int(found["stop_conditions"]["max_tokens"]),
            tensors=dict(extra["tensors"]),
            prompt_tokens=int(extra["prompt_tokens"]),
            draft_tokens=int(extra["draft_tokens"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"this request is not of this scalellm's gateway: {error!r}") from error


def inputs(ask: Ask) -> dict[str, Any]:
    """The inputs of ``tensorrt_llm`` for it, as JSON for ``generate_stream``. A least number of tokens counts those
    that another worker gave.
    """
    found = {
        **ask.tensors,
        "input_ids": list(ask.ids),
        "input_lengths": len(ask.ids),
        "request_output_len": ask.max_tokens,
        "streaming": True,
    }
    if ask.so_far and "min_tokens" in found:
        found["min_tokens"] = max(0, int(listed(found["min_tokens"])[0]) - ask.so_far)
    return found


def tokens(event: Mapping[str, Any]) -> tuple[list[int], list[float] | None]:
    """One event of ``tensorrt_llm`` -> ids, and their log probabilities where it gives them."""
    count = int(listed(event.get("sequence_length", 0))[0])
    ids = [int(one) for one in listed(event.get("output_ids"))[:count]]
    logs = event.get("output_log_probs")
    return ids, None if logs is None else [float(one) for one in listed(logs)[:count]]


def metrics(ask: Ask, event: Mapping[str, Any]) -> dict[str, Any]:
    """What one event tells besides, where the client asked for it or it was drafted: drafts, blocks of the cache,
    times.
    """
    if not (ask.tensors.get(_METRICS) or ask.draft_tokens):
        return {}
    return {name: value for name, value in event.items() if name not in _TOLD}


def item(
    ids: Sequence[int],
    logs: Sequence[float] | None = None,
    finish: str | None = None,
    told: Mapping[str, Any] | None = None,
) -> Item:
    """Tokens on their way back; ``told``: ``metrics`` that came with them."""
    found: Item = {"token_ids": list(ids)}
    if logs is not None:
        found["log_probs"] = list(logs)
    if told:
        found["extra_args"] = {"metrics": dict(told)}
    if finish is not None:
        found["finish_reason"] = finish
    return found


def begun(replica: str) -> Item:
    """A worker's first item: this replica has taken the request."""
    return {"token_ids": [], "extra_args": {"replica": replica}}


def replica_of(found: Mapping[str, Any]) -> str | None:
    """What ``begun`` says, or None."""
    told = (found.get("extra_args") or {}).get("replica")
    return told if isinstance(told, str) else None


def refusal(status: int, message: str, param: str | None = None, code: str | None = None) -> Item:
    """The engine does not take this request; no other one would, or (429) it has no room."""
    told = {"status": status, "message": message, "param": param, "code": code}
    return {"token_ids": [], "finish_reason": "stop", "extra_args": {"refusal": told}}


def stuck(message: str) -> Item:
    """No engine can go on with this answer where it was lost; from its beginning one can."""
    return refusal(502, f"the engine was lost, and the answer cannot be continued: {message}", code=_STUCK)


def is_stuck(told: Mapping[str, Any]) -> bool:
    """Whether what is ``refused`` was ``stuck``."""
    return bool(told["code"] == _STUCK)


def refused(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """What ``refusal`` says, or None."""
    told = (found.get("extra_args") or {}).get("refusal")
    return dict(told) if told else None


def metrics_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """The ``told`` of an item."""
    return dict((found.get("extra_args") or {}).get("metrics") or {})


def listed(value: Any) -> list[Any]:
    """Triton writes a tensor of one element as that element."""
    return value if isinstance(value, list) else [] if value is None else [value]
