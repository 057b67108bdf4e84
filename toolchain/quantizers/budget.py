"""How much memory quantizing a model takes at its peak, and how many tokens may go through a layer at once for that.

An upper bound from the model's shape, the scheme and the calibration rows; the tests hold it against the kernel's
figures. Mapped pages of the model's files and the page cache are not counted: the system takes them back. Pure
arithmetic: it allocates nothing and imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from toolchain import family
from toolchain.errors import PlanError
from toolchain.family import LlamaConfig
from toolchain.quantizers.layout import Scheme
from toolchain.units import MIB, format_bytes

MOST_TOKENS = 2048
"""Tokens that go through a layer at once where memory allows it: a GEMM's full speed, some hundred MB even for a wide
MLP."""

FLOAT64_FACTOR_BYTES = 1024 * MIB
"""How large a float64 matrix GPTQ may try when float32 does not do."""

_LEAST_TOKENS = 64
_IMPORTED = 160 * MIB  # torch, numpy and our own modules, where it cannot be measured (CPU build 2.13: 148 MiB)
_LIBRARIES = 48 * MIB  # buffers of oneDNN, MKL and the allocator's arenas, per device
_THREAD = 28 * MIB  # a worker's scratch: seven buffers of 768 Ki float32 and what a block returns
_DEVICE_SCRATCH = 6 * 2**24 * 4  # the same on a GPU, where a block has 2^24 elements
_WAITING = 4  # results in memory: one in hand, two in the queue, one being written (shards._JOBS_AHEAD)
_PIECE = 16 * MIB  # source.pieces: what is copied goes through the same queue
_KEPT_ROWS = 1024  # statistics.SAMPLE_ROWS
_SLAB = 2**24 * 4  # awq.apply's float32 rows
_GPTQ_ROWS = 1024  # a row block of gptq.quantize on a CPU


@dataclass(frozen=True)
class Work:
    """One run of quantize, as far as its memory depends on it."""

    config: LlamaConfig
    scheme: Scheme
    weight_bytes: int
    """Bytes per element of the stored weights."""
    copied: bool
    """Whether they have another dtype than the computation, so that it takes a copy of each layer."""
    rows: int = 0
    """Calibration samples; 0: nothing is calibrated."""
    row_tokens: int = 0
    threads: int = 1
    on_gpu: bool = False
    quantizes: bool = True
    """False where the weights stay as they are and only K and V are observed."""

    @property
    def element(self) -> int:
        """Bytes of a number of the computation: bfloat16, or float32 for a float32 model."""
        return 4 if self.weight_bytes == 4 and not self.copied else 2


@dataclass(frozen=True)
class Need:
    """Bytes at the peak."""

    ram: int
    """Anonymous memory of this process, with what it holds already."""
    vram: int
    """On the GPU; 0 without one."""


def need(work: Work, chunk_tokens: int, base: int | None = None) -> Need:
    """What ``work`` takes with ``chunk_tokens`` tokens at once; ``base``: what the process holds before it begins."""
    computing = max(_phases(work, chunk_tokens))
    host = (base or _IMPORTED) + _WAITING * max(_largest_result(work), _PIECE)
    chunk = 3 * chunk_tokens * work.config.hidden_size * work.element if work.rows else 0
    if work.on_gpu:
        return Need(host + chunk + _LIBRARIES, computing + _DEVICE_SCRATCH + _LIBRARIES + _largest_result(work))
    products = _LIBRARIES if work.rows else 0  # plain rounding has none
    return Need(host + computing + products + work.threads * _THREAD, 0)


def least_need(work: Work) -> Need:
    """What ``work`` takes with the fewest tokens at once, with which it still runs."""
    return need(work, list(_chunks(work))[-1])


def choose_chunk(
    work: Work,
    *,
    max_ram: int | None = None,
    max_vram: int | None = None,
    base: int | None = None,
    recorded: int | None = None,
) -> int:
    """Tokens that go through a layer at once: ``recorded`` by an earlier run if that fits, else the most that fit.

    Whole samples only, 2048 tokens at most but for longer samples. PlanError, naming the flag and by how much, when
    not even the fewest fit.
    """
    sizes = list(_chunks(work))
    fitting = [size for size in sizes if not _excess(need(work, size, base), max_ram, max_vram)]
    if fitting:
        return recorded if recorded in fitting else fitting[0]
    least = need(work, sizes[-1], base)
    flag, wanted, given = _excess(least, max_ram, max_vram)[0]
    method = work.scheme.method if work.scheme.weights == "int4" else work.scheme.weights
    raise PlanError(
        f"quantize needs at least {format_bytes(wanted)} for one layer of this model with {method}, "
        f"{format_bytes(wanted - given)} more than {flag} {format_bytes(given)}",
        hint=f"{flag} {-(-wanted // MIB)}MiB" + _cheaper(work),
    )


def _excess(need: Need, max_ram: int | None, max_vram: int | None) -> list[tuple[str, int, int]]:
    pairs = (("--max-ram", need.ram, max_ram), ("--max-vram", need.vram, max_vram))
    return [(flag, wanted, given) for flag, wanted, given in pairs if given is not None and wanted > given]


def _cheaper(work: Work) -> str:
    if work.scheme.weights == "int4" and work.scheme.method == "gptq" and work.quantizes:
        return ", or method: awq, which keeps no Hessians"
    return ", or shorter samples: calibration: {tokens: 128}" if work.row_tokens > _LEAST_TOKENS else ""


def _chunks(work: Work) -> Iterator[int]:
    """Chunk sizes to choose from, largest first; each a whole number of samples."""
    if not work.rows:
        yield 0
        return
    size, last = MOST_TOKENS, 0
    while True:
        tokens = min(max(1, size // work.row_tokens), work.rows) * work.row_tokens
        if tokens != last:
            yield tokens
            last = tokens
        if tokens == work.row_tokens or size <= _LEAST_TOKENS:
            return
        size //= 2


def _shapes(config: LlamaConfig) -> list[tuple[int, int]]:
    return [family.linear_shape(config, linear) for linear in family.LINEARS]


def _inputs(config: LlamaConfig) -> list[int]:
    """The width of the input of each group of ``family.SHARED_INPUT``."""
    return [family.linear_shape(config, group[0])[1] for group in family.SHARED_INPUT]


def _largest_result(work: Work) -> int:
    """Bytes of the largest quantized matrix with its scales."""
    rows, columns = max(_shapes(work.config), key=lambda shape: shape[0] * shape[1])
    if not work.quantizes:
        return 0
    if work.scheme.weights != "int4":
        return rows * columns
    return rows * columns // 2 + 4 * rows * columns // work.scheme.group_size


def _layer(work: Work) -> int:
    """Bytes of the layer's weights that the forward pass holds in copies: on a GPU both as stored and as computed."""
    elements = sum(rows * columns for rows, columns in _shapes(work.config))
    largest = max(rows * columns for rows, columns in _shapes(work.config))
    if work.on_gpu:
        return elements * work.element + (largest * work.weight_bytes if work.copied else 0)
    if not work.quantizes and work.weight_bytes == 1:  # restored from its codes by way of float32
        return elements * work.element + 9 * largest
    return elements * work.element if work.copied else 0


def _phases(work: Work, tokens: int) -> Iterator[int]:
    """What the device holds in each phase of a layer, beyond scratch, results and what was there before."""
    if work.rows:
        yield _forward(work, tokens)
    if work.quantizes:
        yield _quantizing(work)


def _forward(work: Work, tokens: int) -> int:
    config, e = work.config, work.element
    hidden, query, inner = config.hidden_size, config.q_size, config.intermediate_size
    key = config.kv_size
    watched = work.quantizes
    hessian = watched and work.scheme.weights == "int4" and work.scheme.method == "gptq"

    def seen(width: int) -> int:  # |x|, and its float32 copy for a sum or for X^T X
        return (e + 4) * width if watched else 0

    states = 3 * hidden * e  # before the layer, between attention and MLP, behind it
    norm = states + 12 * hidden + seen(hidden)
    attention = states + (6 * query + 4 * key + 2 * hidden) * e + seen(query)
    mlp = states + (3 * inner + hidden) * e + seen(inner)
    statistics = sum(4 * width * width for width in _inputs(config)) if hessian else 0
    return _layer(work) + _kept(work) + statistics + _quantized_copy(work) + tokens * max(norm, attention, mlp)


def _kept(work: Work) -> int:
    """The rows of activations that AWQ's search looks at."""
    if not work.scheme.smoothed or not work.quantizes:
        return 0
    return min(_KEPT_ROWS, work.rows * work.row_tokens) * sum(_inputs(work.config)) * work.element


def _quantized_copy(work: Work) -> int:
    """The layer as its codes stand for it, which ``propagate: quantized`` sends the samples through."""
    if work.scheme.propagate != "quantized" or not work.quantizes:
        return 0
    return sum(rows * columns for rows, columns in _shapes(work.config)) * work.element


def _quantizing(work: Work) -> int:
    shapes, scheme = _shapes(work.config), work.scheme
    widest = max(_inputs(work.config))
    on_device = max(rows * columns for rows, columns in shapes) * work.weight_bytes if work.on_gpu else 0
    found = _kept(work) + _quantized_copy(work) + on_device
    if _quantized_copy(work):
        found += 9 * max(rows * columns for rows, columns in shapes)
    if scheme.smoothed:
        # A group's rows once more in one piece, then in float32, divided, and in the order of the groups; their Gram
        # matrices; the clips; a slab of the scaled weights, and the parts of the result beside the whole.
        rows = min(_KEPT_ROWS, work.rows * work.row_tokens)
        searching = rows * widest * (work.element + 12) + 4 * widest * scheme.group_size
        clips = sum(4 * one * other // scheme.group_size for one, other in shapes)
        together = 3 * max(shapes)[0] * widest * work.weight_bytes if work.on_gpu else 0
        return found + clips + max(searching + together, _SLAB + _largest_result(work))
    if scheme.weights == "int4" and scheme.method == "gptq":
        whole = sum(4 * width * width for width in _inputs(work.config))
        rows = max(one for one, _ in shapes) if work.on_gpu else _GPTQ_ROWS * work.threads
        errors = 4 * rows * widest + 12 * rows * scheme.group_size
        return found + max(whole + max(_factoring(width) for width in _inputs(work.config)), 4 * widest**2 + errors)
    return found


def _factoring(width: int) -> int:
    """Beside the Hessian: half of it, kept for a second attempt, or the float64 matrix of that attempt."""
    wide = 8 * width * width
    return max(2 * width * width + 8 * MIB, wide if wide <= FLOAT64_FACTOR_BYTES else 0)
