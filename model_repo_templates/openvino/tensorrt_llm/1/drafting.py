"""Drafted tokens: what OpenVINO GenAI is told of them, which requests they exclude, and how they are counted.

Checked with GenAI 2026.4.1: greedy and sampled answers, penalized or not, are those of plain decoding, token for token.
What is not in ``_SAME`` is refused, because it differs (``min_new_tokens`` is ignored) or was never compared. It knows
nothing of Triton, and imports no OpenVINO.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tensors import RefusedError

_SAME = frozenset(
    {"max_new_tokens", "stop_token_ids", "logprobs", "do_sample", "temperature", "top_p", "top_k", "rng_seed"}
    | {"repetition_penalty"}
)
_BLOCK_TOKENS = 32
"""Tokens in one block of the paged cache on a CPU (GenAI 2026.4.1)."""
_TENSORS = {"num_beams": "beam_width", "min_new_tokens": "min_tokens"}
"""GenAI's names -> the tensors that ask for them, where those are called otherwise."""


@dataclass(frozen=True)
class Drafting:
    """A draft model's tokens, or those that followed the same words earlier in the sequence."""

    tokens: int
    """In one step, at most."""
    ngram: int = 0
    """Tokens that are looked for in the sequence; 0 with a draft model."""

    @classmethod
    def of(cls, runtime: Mapping[str, Any]) -> Drafting | None:
        """From an engine's passport; None where nothing is drafted."""
        if "lookup" in runtime:
            return cls(runtime["lookup"]["tokens"], runtime["lookup"]["ngram"])
        return cls(runtime["draft"]["tokens"]) if "draft" in runtime else None

    def check(self, options: Mapping[str, Any]) -> None:
        """Raises RefusedError, naming the tensor, for an option with which the answer could be another one."""
        for name in options:
            if name not in _SAME:
                tensor = _TENSORS.get(name, name)
                raise RefusedError(f"{tensor}: not supported together with this server's speculative decoding")

    def told(self, options: Mapping[str, Any]) -> dict[str, int]:
        """What GenerationConfig needs besides.

        GenAI's own way to sample with a draft model loses tokens and ends the process (openvino.genai issue 4190, open
        in July 2026). With a ``max_ngram_size`` it compares the sampled token with the drafted one instead, as it does
        for prompt lookup: the same text as without a draft, whatever the seed.
        """
        found = {"num_assistant_tokens": self.tokens}
        ngram = self.ngram or (1 if options.get("do_sample") else 0)
        return {**found, "max_ngram_size": ngram} if ngram else found


class Count:
    """One request's drafts. A step gives one token of the model's own, and the drafted ones before it."""

    def __init__(self, drafting: Drafting, prompt: int, max_tokens: int) -> None:
        self._drafting, self._max_tokens = drafting, max_tokens
        self.blocks = -(-(prompt + max_tokens + drafting.tokens) // _BLOCK_TOKENS)
        """Of the cache: the most that the request takes."""
        self._tokens = 0
        self.drafted = 0
        """Places for drafted tokens: of each step but the first as many as there may be. GenAI does not say how many of
        them its draft left empty, as it does after an end id."""
        self.accepted = 0

    def step(self, tokens: int) -> None:
        """A step gave so many tokens."""
        if not tokens:
            return
        if self._tokens:
            self.drafted += min(self._drafting.tokens, self._max_tokens - self._tokens - 1)
        self._tokens += tokens
        self.accepted += tokens - 1
