"""Greedy answers of a checkpoint by itself: one layer in memory at a time, and the keys and values of every layer.

Each token takes a pass over all weights, read again from the files: that bounds the memory, and makes it something for
a few prompts and short answers. A journal keeps every token, so that an interrupted run goes on. It compares nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from toolchain.checkpoint import Checkpoint
from toolchain.errors import PlanError
from toolchain.family import LlamaConfig
from toolchain.progress import Progress
from toolchain.quality.answers import Answer
from toolchain.quality.head import Head
from toolchain.quality.layers import open_layer
from toolchain.quality.need import MOST_TOKENS, PIECE_WORDS, need
from toolchain.quantizers import forward
from toolchain.quantizers.place import Place, give_back, open_device, resident
from toolchain.quantizers.source import Source
from toolchain.units import MIB, format_bytes

Prompts = Sequence[Sequence[int]]


@torch.no_grad()
def continue_greedily(
    checkpoint: Checkpoint,
    prompts: Prompts,
    count: int,
    *,
    journal: Sequence[Mapping[str, Any]],
    record: Callable[[Mapping[str, Any]], None],
    progress: Progress,
    place: Place,
) -> list[Answer]:
    """``count`` tokens behind each prompt, or up to an end of text. -> in the order of the prompts.

    Raises PlanError where the keys and values of all prompts do not fit ``place.max_ram``.
    """
    known = [list(map(int, entry["tokens"])) for entry in journal if "tokens" in entry][:count]
    check_memory(checkpoint.config, prompts, count, place)
    model = _Model(Source(checkpoint, open_device(place)))
    rows = [[*prompt, *(step[number] for step in known)] for number, prompt in enumerate(prompts)]
    batches = [_Batch(model, rows, numbers, count - len(known)) for numbers in _by_length(rows)]
    if known:
        progress.note(f"verify: resumed at token {len(known)} of {count}")
    with progress.task("verify: greedy answers", count, "tokens") as task:
        task.advance(len(known))
        while len(known) < count and not _all_ended(known, checkpoint.config):
            step = model.step(batches)
            record({"unit": f"token {len(known)}", "tokens": step})
            known.append(step)
            task.advance(1)
            give_back()
    return [_answer(prompt, [step[number] for step in known], checkpoint) for number, prompt in enumerate(prompts)]


def check_memory(config: LlamaConfig, prompts: Prompts, count: int, place: Place) -> None:
    """PlanError where keys and values in float32, and one layer, are more than ``place.max_ram``."""
    token = 4 * 2 * config.kv_size * config.num_layers
    cache = token * sum(len(prompt) + count for prompt in prompts)
    longest = max(map(len, prompts)) + count
    states = 4 * config.hidden_size * sum(map(len, prompts))
    wanted = (
        cache
        + states
        + need(config, max(longest, min(MOST_TOKENS, longest * len(prompts))), len(prompts), 1, resident())
    )
    if place.max_ram is not None and wanted > place.max_ram:
        raise PlanError(
            f"greedy answers need {format_bytes(wanted)}, of which {format_bytes(cache)} are the keys and values of "
            f"{len(prompts)} prompts, more than --max-ram {format_bytes(place.max_ram)}",
            hint=f"--samples {max(1, len(prompts) // 2)}, shorter ones (--tokens), or --max-ram {-(-wanted // MIB)}MiB",
        )


def _by_length(rows: Prompts) -> list[list[int]]:
    """Numbers of the rows that are equally long, which go through a layer together."""
    found: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        found.setdefault(len(row), []).append(number)
    return list(found.values())


def _all_ended(steps: Sequence[Sequence[int]], config: LlamaConfig) -> bool:
    ends = set(config.eos_token_ids)
    return bool(steps) and all(ends & set(answer) for answer in zip(*steps, strict=True))


def _answer(prompt: Sequence[int], tokens: Sequence[int], checkpoint: Checkpoint) -> Answer:
    ends = checkpoint.config.eos_token_ids
    end = next((at for at, token in enumerate(tokens) if token in ends), None)
    return Answer(tuple(prompt), tuple(tokens[:end]), end is not None)


class _Batch:
    """Rows of one length, their keys and values, and what goes through the layers next."""

    def __init__(self, model: _Model, rows: Prompts, numbers: Sequence[int], count: int) -> None:
        config, device = model.config, model.source.device
        self.numbers = numbers
        self.ids = torch.tensor([list(rows[number]) for number in numbers], dtype=torch.int32)
        self.start = 0
        shape = (len(numbers), config.kv_size // config.head_dim, self.ids.shape[1] + count, config.head_dim)
        self.caches = [
            {name: torch.zeros(shape, dtype=torch.float32, device=device) for name in ("k", "v")}
            for _ in range(config.num_layers)
        ]

    def parts(self) -> list[slice]:
        """The rows that go through a layer at once."""
        rows, tokens = self.ids.shape
        step = max(1, MOST_TOKENS // tokens)
        return [slice(low, min(low + step, rows)) for low in range(0, rows, step)]


@dataclass(frozen=True)
class _Kept:
    """The ``Change`` of ``forward`` that puts keys and values behind those that are there, and gives them all."""

    cache: Mapping[str, torch.Tensor]
    rows: slice
    start: int

    def __call__(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if name not in self.cache:
            return x
        end = self.start + x.shape[2]
        self.cache[name][self.rows, :, self.start : end] = x
        return self.cache[name][self.rows, :, :end]


class _Model:
    """A checkpoint that gives the likeliest next token of each row."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.config = source.checkpoint.config
        self._head = Head(source)

    def step(self, batches: Sequence[_Batch]) -> list[int]:
        """All layers once for what is new in the batches. -> the next token of each row, by its number."""
        table = self.source.on_host("model.embed_tokens.weight")
        hidden = [forward.embed(table, batch.ids).float().to(self.source.device) for batch in batches]
        for number in range(self.config.num_layers):
            weights = open_layer(self.source, number, rounds_inputs=False).weights
            for batch, states in zip(batches, hidden, strict=True):
                self._layer(number, weights, batch, states)
            del weights  # before the next layer's are made
        last = torch.cat([states[:, -1] for states in hidden])
        chosen, found = self._choose(last), dict[int, int]()
        for batch in batches:
            words, chosen = chosen[: len(batch.numbers)], chosen[len(batch.numbers) :]
            batch.start += batch.ids.shape[1]
            batch.ids = words[:, None].to(torch.int32)
            found |= dict(zip(batch.numbers, words.tolist(), strict=True))
        return [found[number] for number in sorted(found)]

    def _layer(self, number: int, weights: Mapping[str, torch.Tensor], batch: _Batch, states: torch.Tensor) -> None:
        """In place of the states before it."""
        for rows in batch.parts():
            kept = _Kept(batch.caches[number], rows, batch.start)
            states[rows] = forward.decoder_layer(
                states[rows], weights, self.config, lambda _name, _x: None, kept, batch.start
            )

    def _choose(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] -> the likeliest word of each; the first of equals."""
        top = torch.full((len(hidden),), -torch.inf, dtype=torch.float64)
        word = torch.zeros(len(hidden), dtype=torch.int64)
        for start in range(0, self._head.words, PIECE_WORDS):
            piece = self._head.piece(slice(start, min(start + PIECE_WORDS, self._head.words)))
            largest, place = self._head.logits(hidden, piece).max(1)
            word = torch.where(largest > top, place + start, word)
            top = torch.maximum(top, largest)
            del piece
        return word
