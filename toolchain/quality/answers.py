"""Answers of a running engine against the checkpoint that it was built from, token by token.

The checkpoint computes what comes after the prompt and the engine's own tokens so far, so one pass over the layers
judges every token, and a token behind a first difference still counts. It does not ask the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from toolchain.checkpoint import Checkpoint
from toolchain.errors import EndpointError
from toolchain.progress import Progress
from toolchain.quality.measures import Measure, mean_of
from toolchain.quality.need import choose_chunk
from toolchain.quality.passes import Passes, Way
from toolchain.quantizers.place import Place, open_device, resident
from toolchain.quantizers.samples import Samples


@dataclass(frozen=True)
class Answer:
    """What the engine gave for one prompt, greedily."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    ended: bool
    """Whether it ended by itself, before the tokens that were asked for."""
    log_probs: tuple[float, ...] | None = None
    """Of its tokens, as far as it says them."""


@dataclass(frozen=True)
class Compared:
    """One answer beside the checkpoint's choices. An end counts as a token."""

    count: int
    """Tokens that were compared."""
    agree: int
    """Tokens that the checkpoint would give too."""
    leading: int
    """Tokens before the first other one: as far as both would go together by themselves."""
    regret: float
    """Nats by which the checkpoint prefers its own choice to the engine's, summed over the tokens."""
    log_prob_error: float | None
    """|engine's log-probability - checkpoint's|, summed over the tokens that the engine gave one for."""


@torch.no_grad()
def compare_answers(
    checkpoint: Checkpoint,
    answers: Sequence[Answer],
    folder: Path,
    *,
    kv: str | None,
    rounds_inputs: bool,
    progress: Progress,
    place: Place,
) -> list[Compared]:
    """``folder`` takes hidden states meanwhile; ``kv`` and ``rounds_inputs`` as of ``passes``.

    Raises EndpointError where the engine gave tokens that the model does not have.
    """
    words = checkpoint.config.vocab_size
    rows = [(*one.prompt, *one.tokens) for one in answers]
    if any(not 0 <= token < words for row in rows for token in row):
        raise EndpointError(f"the server gave a token that {checkpoint.path} does not have, of {words}")
    longest = max(map(len, rows)) + 1  # one more, for what comes behind the last
    ids = np.zeros((len(rows), longest), dtype=np.int32)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    way = Way("checkpoint", quantized=True, kv=kv)
    chunk = choose_chunk(checkpoint.config, len(rows), longest, 1, max_ram=place.max_ram, base=resident())
    passes = Passes(
        checkpoint,
        checkpoint,
        [way],
        Samples(ids, "", "the answers"),
        folder,
        chunk_tokens=chunk,
        rounds_inputs=rounds_inputs,
        device=open_device(place),
    )
    sums = passes.sums(progress)[0]
    shape = ids.shape
    choice, target, total = (one.view(shape) for one in (sums.word, sums.target - sums.top, sums.total.log()))
    ends = checkpoint.config.eos_token_ids
    found = []
    for number, one in enumerate(answers):
        first = len(one.prompt) - 1
        part = slice(first, first + len(one.tokens))
        same = [int(a) == b for a, b in zip(choice[number, part], one.tokens, strict=True)]
        if one.ended:
            same.append(int(choice[number, part.stop]) in ends)
        leading = same.index(False) if False in same else len(same)
        regret = -target[number, part]
        wrong = None
        if one.log_probs is not None and len(one.log_probs) == len(one.tokens):
            own = torch.tensor(one.log_probs, dtype=torch.float64)
            wrong = float((own - (target - total)[number, part]).abs().sum())
        found.append(Compared(len(same), sum(same), leading, float(regret.sum()), wrong))
    passes.clear()
    return found


def measures(compared: Sequence[Compared]) -> dict[str, Measure]:
    """``greedy_agreement``, ``agreement_length`` (tokens), ``regret`` and ``log_prob_error`` (nats a token)."""
    counts = [one.count for one in compared]
    found = {
        "greedy_agreement": mean_of([one.agree for one in compared], counts),
        "agreement_length": mean_of([one.leading for one in compared], [1] * len(compared)),
        "regret": mean_of([one.regret for one in compared], counts),
    }
    told = [(one.log_prob_error, one.count) for one in compared if one.log_prob_error is not None]
    if told:
        found["log_prob_error"] = mean_of([error for error, _ in told], [count for _, count in told])
    return found
