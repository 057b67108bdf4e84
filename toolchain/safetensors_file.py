"""Safetensors files written front to back: the header, bytes that are hashed on the way, and a thread for both.

All names, dtypes and shapes are known beforehand, so the header comes first and the data follow in its order. It knows
neither models nor folders of several files.

Format: https://huggingface.co/docs/safetensors (2026-11): 8 bytes little-endian header length, JSON header, data
without holes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "U8": 1, "I8": 1, "I32": 4, "I64": 8, "F64": 8, "BOOL": 1}
"""Bytes per element by safetensors dtype name (https://huggingface.co/docs/safetensors, format, 2026-11-01)."""

_PIECE = 2**20

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class TensorPlan:
    """One tensor to be written; ``dtype`` is the safetensors name."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def header(tensors: Iterable[TensorPlan], metadata: Mapping[str, str] | None = None) -> bytes:
    """The length and the JSON of a file that holds ``tensors`` in that order; padded with spaces to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for tensor in tensors:
        place = [offset, offset + tensor.nbytes]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": place}
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class HashedFile:
    """A file that is written, with the digest of all that it holds; one after another may be started."""

    def __init__(self) -> None:
        self._file: FileIO | None = None
        self._digest = hashlib.sha256()
        self._end = 0

    def start(self, path: Path, header: bytes) -> None:
        """Begin a new file, with its header."""
        self.close()
        self._file, self._digest, self._end = FileIO(path, "w"), hashlib.sha256(), 0
        self.write(np.frombuffer(header, np.uint8))

    def go_on(self, path: Path, digest: hashlib._Hash, end: int) -> None:
        """Go on behind the first ``end`` bytes of a file, whose digest is ``digest``."""
        self.close()
        self._file, self._digest, self._end = FileIO(path, "r+"), digest, end
        self._file.truncate(end)
        self._file.seek(end)

    def write(self, data: Bytes) -> None:
        """Flat bytes behind those that are there."""
        assert self._file is not None
        view = memoryview(data)  # type: ignore[arg-type]  # numpy's stubs of 1.26 know no Buffer
        start = 0
        with self._named():
            while start < len(view):
                piece = view[start : start + _PIECE]
                written = self._file.write(piece)  # may be less than all, just before the disk is full
                self._digest.update(piece[:written])
                start += written
        self._end += len(view)

    def sync(self) -> tuple[int, str]:
        """-> (length, sha256) of the file so far, once it is on the disk."""
        assert self._file is not None
        with self._named():
            os.fsync(self._file.fileno())
        return self._end, self._digest.hexdigest()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    @contextmanager
    def _named(self) -> Iterator[None]:
        """An error of the disk says which file it was."""
        try:
            yield
        except OSError as error:
            error.filename = error.filename or (self._file and self._file.name)
            raise


class Behind:
    """Jobs that run one after another on a thread of their own; at most ``ahead`` of them wait.

    Errors surface in a later ``submit`` or on leaving the context. After one failure nothing more is done.
    """

    def __init__(self, name: str, ahead: int) -> None:
        self._name, self._limit = name, ahead
        self._waiting: deque[Future[None]] = deque()
        self._broken = False

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(1, self._name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while self._waiting and error is None:
                self._waiting.popleft().result()
        finally:
            self._pool.shutdown()  # what waits is finished work, and after a failure it does nothing

    def submit(self, job: Callable[[], None]) -> None:
        """Have the job done after those before it; waits while too many wait already."""
        self._waiting.append(self._pool.submit(self._guarded, job))
        while len(self._waiting) > self._limit:
            self._waiting.popleft().result()

    def _guarded(self, job: Callable[[], None]) -> None:
        if self._broken:
            return
        try:
            job()
        except BaseException:
            self._broken = True
            raise
