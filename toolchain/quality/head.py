"""The last step of several models at once: logits over the vocabulary, piece by piece, and what differs between them.

A piece of the head is multiplied with all rows, so neither the head nor the logits are ever whole in memory. It knows
no quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from toolchain.quality.measures import Predictions
from toolchain.quality.need import PIECE_WORDS, ROWS
from toolchain.quantizers import forward
from toolchain.quantizers.source import Source


@dataclass
class Sums:
    """Of every row: what a softmax over pieces of the vocabulary needs. float64 but for the word."""

    top: torch.Tensor
    """Largest logit."""
    total: torch.Tensor
    """sum exp(logit - top)."""
    word: torch.Tensor
    """Which word has the largest logit; the first of equals."""
    target: torch.Tensor
    """The logit of the word that comes."""
    cross: torch.Tensor
    """sum exp(a - top) * (a - b), ``a`` the first model's logits, ``top`` its largest, ``b`` this one's."""

    @classmethod
    def empty(cls, rows: int) -> Sums:
        zeros = torch.zeros(rows, dtype=torch.float64)
        return cls(zeros - torch.inf, zeros.clone(), torch.zeros(rows, dtype=torch.int64), zeros.clone(), zeros.clone())

    @property
    def log_total(self) -> torch.Tensor:
        return self.top + self.total.log()


class Head:
    """The final norm and the head of a checkpoint."""

    def __init__(self, source: Source) -> None:
        self._source = source
        config = source.checkpoint.config
        self.words = config.vocab_size
        own = "lm_head.weight" in source.checkpoint.tensors and not config.tied_embeddings
        self._name = "lm_head.weight" if own else "model.embed_tokens.weight"
        self._norm = source.weight("model.norm.weight").float()
        self._eps = config.rms_norm_eps

    def piece(self, part: slice) -> torch.Tensor:
        """float32 [words, hidden] of some words."""
        return self._source.on_host(self._name)[part].to(self._source.device).float()

    def release(self) -> None:
        """Its pages in memory back to the system."""
        self._source.release(self._name)

    def logits(self, hidden: torch.Tensor, piece: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] -> float64 [rows, words of the piece] on the host."""
        normed = forward.norm(hidden.to(piece.device), self._norm, self._eps)
        return (normed @ piece.T).cpu().double()


@torch.no_grad()
def compare(
    heads: Sequence[Head],
    chunks: Callable[[int], Iterator[torch.Tensor]],
    ids: torch.Tensor,
    advance: Callable[[int], None] = lambda _count: None,
) -> list[Predictions]:
    """What each model predicts of the tokens behind the first, against the first of the models.

    ``chunks(i)`` gives the hidden states behind the layers of model i, [samples, tokens, hidden] in order; ``ids`` is
    [samples, tokens]. ``advance`` gets the words that are done.
    """
    sums = all_sums(heads, chunks, ids, advance)
    samples, tokens = ids.shape
    first = sums[0]
    found = []
    for one in sums:
        nats = one.log_total - one.target
        kl = one.cross / first.total - (first.log_total - one.log_total)
        agree = (one.word == first.word).long()
        by_row = [values.view(samples, tokens)[:, :-1].sum(1).tolist() for values in (nats, kl, agree)]
        found.append(Predictions(*(tuple(row) for row in by_row)))
    return found


def all_sums(
    heads: Sequence[Head],
    chunks: Callable[[int], Iterator[torch.Tensor]],
    ids: torch.Tensor,
    advance: Callable[[int], None] = lambda _count: None,
) -> list[Sums]:
    """The sums of every position of every model; at the last of a row, ``target`` is that of its own first token."""
    targets = ids.roll(-1, 1).reshape(-1).long()
    sums = [Sums.empty(targets.numel()) for _ in heads]
    for start in range(0, heads[0].words, PIECE_WORDS):
        part = slice(start, min(start + PIECE_WORDS, heads[0].words))
        pieces = [head.piece(part) for head in heads]
        place = 0
        for together in zip(*(chunks(number) for number in range(len(heads))), strict=True):
            flat = [one.flatten(0, 1) for one in together]
            for low in range(0, len(flat[0]), ROWS):
                rows = slice(place + low, place + min(low + ROWS, len(flat[0])))
                logits = [
                    head.logits(one[low : low + ROWS], piece)
                    for head, one, piece in zip(heads, flat, pieces, strict=True)
                ]
                _add(sums, logits, rows, targets, start)
            place += len(flat[0])
        del pieces  # before the next ones are made
        advance(part.stop - part.start)
    for head in heads:
        head.release()
    return sums


def _add(sums: list[Sums], logits: list[torch.Tensor], rows: slice, targets: torch.Tensor, start: int) -> None:
    """One piece of the vocabulary for some rows of all models."""
    own = targets[rows] - start
    here = (own >= 0) & (own < logits[0].shape[1])
    first = sums[0]
    best = torch.maximum(first.top[rows], logits[0].amax(1))
    weight = (logits[0] - best[:, None]).exp()
    shrink = (first.top[rows] - best).exp()
    for one, values in zip(sums, logits, strict=True):
        one.cross[rows] = one.cross[rows] * shrink + (weight * (logits[0] - values)).sum(1)
    for one, values in zip(sums, logits, strict=True):
        largest, word = values.max(1)
        top = torch.maximum(one.top[rows], largest)
        one.word[rows] = torch.where(largest > one.top[rows], word + start, one.word[rows])
        one.total[rows] = one.total[rows] * (one.top[rows] - top).exp() + (values - top[:, None]).exp().sum(1)
        one.top[rows] = top
        picked = values.gather(1, own.clamp(0, values.shape[1] - 1)[:, None])[:, 0]
        one.target[rows] = torch.where(here, picked, one.target[rows])
