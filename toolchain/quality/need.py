"""The memory that measuring quality takes, as a sum of what is held at the same time. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from toolchain import family
from toolchain.errors import PlanError
from toolchain.family import LlamaConfig
from toolchain.units import MIB, format_bytes

PIECE_WORDS = 8192
"""Words of the vocabulary that are multiplied at once."""
ROWS = 512
"""Tokens whose logits are in memory at once."""
MOST_TOKENS = 2048
"""Tokens that go through a layer at once."""

_IMPORTED = 160 * MIB  # torch, numpy and our own modules, where it cannot be measured
_LIBRARIES = 64 * MIB  # buffers of oneDNN and MKL, and the allocator's arenas


def need(config: LlamaConfig, chunk_tokens: int, rows: int, models: int, base: int | None = None) -> int:
    """Bytes at the peak: a layer in float32 with what goes through it, or a piece of the head of each of ``models``.

    ``rows``: tokens of the text in all; ``base``: what the process holds before it begins.
    """
    shapes = [family.linear_shape(config, linear) for linear in family.LINEARS]
    layer = 4 * sum(map(prod, shapes)) + 12 * max(map(prod, shapes))  # codes become float32 by way of two copies
    hidden, inner = config.hidden_size, config.intermediate_size
    attention = 5 * hidden + 6 * config.q_size + 8 * config.kv_size
    mlp = 5 * hidden + 4 * inner
    through = layer + 4 * chunk_tokens * max(attention, mlp)
    words = min(PIECE_WORDS, config.vocab_size)
    pieces = models * 4 * (words * hidden + 2 * chunk_tokens * hidden)
    head = pieces + 8 * ROWS * words * (models + 5) + models * 40 * rows
    return (base or _IMPORTED) + _LIBRARIES + max(through, head)


def choose_chunk(
    config: LlamaConfig, samples: int, tokens: int, models: int, *, max_ram: int | None = None, base: int | None = None
) -> int:
    """Tokens that go through a layer at once, whole samples; PlanError where not even one sample fits ``max_ram``."""
    sizes = list(_sizes(samples, tokens))
    wanted = {size: need(config, size, samples * tokens, models, base) for size in sizes}
    fitting = [size for size in sizes if max_ram is None or wanted[size] <= max_ram]
    if fitting:
        return fitting[0]
    least = wanted[sizes[-1]]
    raise PlanError(
        f"verify needs at least {format_bytes(least)} for one layer of this model in float32, more than --max-ram "
        f"{format_bytes(max_ram or 0)}",
        hint=f"--max-ram {-(-least // MIB)}MiB, or shorter samples: --tokens {max(8, tokens // 2)}",
    )


def _sizes(samples: int, tokens: int) -> Iterator[int]:
    count = min(samples, max(1, MOST_TOKENS // tokens))
    while count:
        yield count * tokens
        count //= 2
