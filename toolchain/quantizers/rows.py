"""Row blocks that stay in a core's cache, spread over threads.

An elementwise kernel over a whole matrix is bound by memory and by fresh pages; over blocks of a few 10^5 elements with
buffers that are allocated once it runs several times faster. Results come back in the order of the rows, whatever
thread computed them, so that sums over them are reproducible. It knows nothing of quantization.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

import torch

from toolchain.quantizers.place import usable_cores

_CPU_BLOCK, _GPU_BLOCK = 768 * 1024, 2**24
"""Elements: what stays in a core's cache; what fills a GPU."""

T = TypeVar("T")


class Scratch(threading.local):
    """Buffers of one thread, allocated at first use and then handed out again under the same name."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def __call__(self, name: str, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialized contiguous tensor of ``like``'s shape and device."""
        key = (name, dtype, like.device)
        found = self._buffers.get(key)
        if found is None or found.numel() < like.numel():
            found = self._buffers[key] = torch.empty(like.numel(), dtype=dtype, device=like.device)
        return found[: like.numel()].view(like.shape)


class Workers:
    """A few threads, each running torch on one core; use as a context. ``threads`` defaults to the cores we may use."""

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or usable_cores()
        self._scratch = Scratch()

    def __enter__(self) -> Self:
        self._intra_op = torch.get_num_threads()
        # torch splits one operation over its own threads by default, which costs more than it brings on small blocks.
        self._pool = ThreadPoolExecutor(self.threads, "rows", initializer=torch.set_num_threads, initargs=(1,))
        everyone = threading.Barrier(self.threads)
        list(self._pool.map(lambda _: everyone.wait(), range(self.threads)))
        # Sums in a GEMM or a Cholesky factor depend on how they are split: the same machine must always split alike,
        # whatever OMP_NUM_THREADS says, so that resumed work gives the same bits. After the threads have started,
        # because a part of what each of them sets (MKL's threads) holds for the whole process.
        torch.set_num_threads(usable_cores())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._intra_op)

    def over_rows(self, matrix: torch.Tensor, work: Callable[[slice, Scratch], T]) -> list[T]:
        """``work(rows, scratch)`` for blocks of rows of ``matrix`` [out, in]; an even number of rows but for the last.

        On a GPU by this thread alone: one block fills it, and threads would only multiply the buffers.

        Raises what the first failing block raised; blocks behind it may not be computed then.
        """
        rows, columns = matrix.shape
        on_cpu = matrix.device.type == "cpu"
        step = max(2, (_CPU_BLOCK if on_cpu else _GPU_BLOCK) // columns & ~1)
        blocks = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
        over = self._pool.map if on_cpu else map
        return list(over(lambda block: work(block, self._scratch), blocks))
