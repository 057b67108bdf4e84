"""The hidden states of the calibration samples between two decoder layers, in files.

They are written once, front to back, and read in chunks. The system's page cache keeps them in memory as long as there
is room, and gives it back when there is none, so no limit has to be set; and a file that is fsynced and hashed is what
an interrupted run continues from. It does no arithmetic and knows no layer and no device.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from toolchain.quantizers.budget import MOST_TOKENS
from toolchain.quantizers.source import as_bytes


class Activations:
    """Hidden states [samples, tokens, hidden] at several ``places``: 0 is the first layer's input, 1 the second's.

    At most three of them lie in ``folder`` at a time, when the caller drops those that are behind.
    """

    def __init__(
        self, folder: Path, shape: tuple[int, int, int], dtype: torch.dtype, chunk_tokens: int = MOST_TOKENS
    ) -> None:
        self._folder = folder
        self._shape = shape
        self._dtype = dtype
        self._chunk_tokens = chunk_tokens

    @property
    def nbytes(self) -> int:
        """The size of one place."""
        samples, tokens, hidden = self._shape
        return samples * tokens * hidden * self._dtype.itemsize

    def chunks(self) -> list[slice]:
        """Whole samples in pieces of ``chunk_tokens`` tokens at most, if one sample is not longer.

        The bits of a product depend on how many rows it has, so an interrupted run goes on with the same pieces.
        """
        samples, tokens, _ = self._shape
        step = max(1, self._chunk_tokens // tokens)
        return [slice(start, min(start + step, samples)) for start in range(0, samples, step)]

    def read(self, place: int) -> Iterator[torch.Tensor]:
        """The chunks of ``place``, in order, each in memory of its own."""
        _, tokens, hidden = self._shape
        row_bytes = tokens * hidden * self._dtype.itemsize
        with self._file(place).open("rb") as stream:
            for part in self.chunks():
                data = np.fromfile(stream, np.uint8, (part.stop - part.start) * row_bytes)
                yield torch.from_numpy(data).view(self._dtype).view(-1, tokens, hidden)

    def write(self, place: int, chunks: Iterator[torch.Tensor]) -> str:
        """Store the chunks as ``place``. -> their sha256, once they are on the disk."""
        digest, path = hashlib.sha256(), self._file(place)
        try:
            with path.open("wb", buffering=0) as stream:
                for chunk in chunks:
                    data = memoryview(as_bytes(chunk.contiguous()))  # type: ignore[arg-type]
                    digest.update(data)
                    while data:  # less than all is taken just before the disk is full
                        data = data[stream.write(data) :]
                os.fsync(stream.fileno())
        except OSError as error:
            error.filename = error.filename or str(path)
            raise
        return digest.hexdigest()

    def holds(self, place: int, sha256: str, advance: Callable[[int], None] = lambda _count: None) -> bool:
        """Whether ``place`` is there, whole and undamaged; ``advance`` gets the bytes that are read for it."""
        path = self._file(place)
        if not path.is_file() or path.stat().st_size != self.nbytes:
            return False
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while piece := stream.read(2**20):
                digest.update(piece)
                advance(len(piece))
        return digest.hexdigest() == sha256

    def drop_before(self, place: int) -> None:
        """Remove every place below ``place``."""
        for path in self._folder.glob("hidden-states-*.bin"):
            if int(path.stem.rpartition("-")[2]) < place:
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        for path in self._folder.glob("hidden-states-*.bin"):
            path.unlink(missing_ok=True)

    def _file(self, place: int) -> Path:
        return self._folder / f"hidden-states-{place:05}.bin"
