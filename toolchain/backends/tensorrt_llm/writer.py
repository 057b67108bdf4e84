"""A checkpoint in the unified layout -> a TensorRT-LLM checkpoint, without quantizing anything a second time.

Each tensor of the source is read once, through the mapped files, and goes in pieces to all ranks of its pipeline stage;
each file is written front to back with its header first. So memory is bounded by the pages of one tensor and the pieces
in hand. ``config.json`` comes last: a folder without it is no checkpoint.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from toolchain import workspace
from toolchain.backends.tensorrt_llm.checks import check
from toolchain.backends.tensorrt_llm.document import config_document
from toolchain.backends.tensorrt_llm.export import DTYPE_NAMES, RESTORED, Export
from toolchain.backends.tensorrt_llm.numbers import LARGEST, Floats, floats, narrow, restored
from toolchain.backends.tensorrt_llm.split import Split
from toolchain.backends.tensorrt_llm.tensors import Constant, Part, Restored, Slice, Tensor, rank_tensors
from toolchain.checkpoint import Checkpoint
from toolchain.errors import ArtifactError
from toolchain.progress import Progress, Silent
from toolchain.safetensors_file import DTYPE_BYTES, Behind, Bytes, HashedFile, header
from toolchain.units import format_bytes

_PIECE_BYTES = 4 * 2**20
_PIECES_AHEAD = 4
"""Pieces of each rank's file that may wait for the disk; with the one in hand they bound the memory."""
_ROOM_BYTES = 2**20  # headers and config.json


def write(
    checkpoint: Checkpoint,
    out: Path,
    *,
    tp: int = 1,
    pp: int = 1,
    kv: str = "fp16",
    dtype: str | None = None,
    int8_form: str = RESTORED,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Fill the folder ``out``, a draft's, with ``config.json``, ``rank{N}.safetensors`` for tp x pp ranks, and the
    tokenizer's files. -> file -> sha256 of the ranks' files.

    ``kv``: "fp16" for the engine's dtype, "int8" (from the ranges that calibration left) or "fp8". ``dtype``: float16
    or bfloat16, what the engine computes in, and all that is not quantized is cast to; None: the model's own.
    ``int8_form``: see ``export.Export``. Raises PlanError with every reason why the checkpoint cannot be exported so,
    ArtifactError for too little room or a number that the dtype does not reach; an OSError of the disk is left to
    ``workspace.draft``.
    """
    export = Export(checkpoint, Split(tp, pp), kv, int8_form, dtype)
    check(export)
    stages = [[rank_tensors(export, stage, rank) for rank in range(tp)] for stage in range(pp)]
    total = sum(tensor.nbytes for stage in stages for rank in stage for tensor in rank)
    out.mkdir(parents=True, exist_ok=True)
    _check_room(out, total)
    hashes: dict[str, str] = {}
    with (progress or Silent()).task("TensorRT-LLM checkpoint", total, "bytes") as task:
        for stage, ranks in enumerate(stages):
            with ExitStack() as stack:
                names = [export.split.file(stage, rank) for rank in range(tp)]
                files = [stack.enter_context(_RankFile(out / names[rank], ranks[rank])) for rank in range(tp)]
                for parallel in zip(*ranks, strict=True):
                    for file, tensor in zip(files, parallel, strict=True):
                        file.write(tensor, checkpoint)
                        task.advance(tensor.nbytes)
                    checkpoint.release_all()
            hashes |= {name: file.sha256 for name, file in zip(names, files, strict=True)}
    for side in checkpoint.side_files:
        workspace.write_durably(out / side.name, side.read_bytes())
    document = json.dumps(config_document(export), indent=4) + "\n"
    workspace.write_durably(out / "config.json", document.encode())
    return hashes


def _check_room(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if free < needed + _ROOM_BYTES:
        raise ArtifactError(
            f"{out}: {format_bytes(needed)} are to be written here and {format_bytes(free)} are free",
            hint="Make room, or choose another place: --work DIR",
        )


class _RankFile:
    """A rank's file: it is hashed and written on a thread of its own, and fsynced when it is left without an error."""

    def __init__(self, path: Path, tensors: Sequence[Tensor]) -> None:
        self._path, self._header = path, header(tensors)
        self._file, self._behind = HashedFile(), Behind(path.name, _PIECES_AHEAD)
        self.sha256 = ""
        """Of the whole file, once it is left."""

    def write(self, tensor: Tensor, checkpoint: Checkpoint) -> None:
        """The next tensor, in the header's order."""
        written = 0
        for part in tensor.parts:
            for piece in _pieces(part, checkpoint):
                self._behind.submit(partial(self._file.write, piece))
                written += piece.nbytes
        assert written == tensor.nbytes, f"{tensor.name}: {written} bytes, where its header says {tensor.nbytes}"

    def __enter__(self) -> Self:
        self._behind.__enter__()
        self._behind.submit(lambda: self._file.start(self._path, self._header))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._behind.submit(self._seal)
            self._behind.__exit__(kind, error, trace)
        finally:
            self._file.close()

    def _seal(self) -> None:
        _, self.sha256 = self._file.sync()


def _pieces(part: Part, checkpoint: Checkpoint) -> Iterator[Bytes]:
    """The bytes of a part in its own dtype, flat, in pieces of bounded size."""
    if isinstance(part, Constant):
        yield np.frombuffer(part.data * part.count, np.uint8)
        return
    if isinstance(part, Slice) and part.dtype in ("", checkpoint.tensors[part.source].dtype):
        for block, _ in _blocks(part, checkpoint):
            yield np.ascontiguousarray(block).reshape(-1)
        return
    for numbers in _numbers(part, checkpoint):
        if not _largest(numbers) <= LARGEST[part.dtype]:
            raise _beyond(part, checkpoint)
        yield narrow(numbers, part.dtype)


def _numbers(part: Slice | Restored, checkpoint: Checkpoint) -> Iterator[Floats]:
    """What a part holds, as float32."""
    stored = checkpoint.tensors[part.source].dtype
    for block, row in _blocks(part, checkpoint):
        flat = np.ascontiguousarray(block).reshape(-1)
        if isinstance(part, Restored):
            scales = checkpoint.bytes_of(part.scale).view("<f4")[row : row + len(block)]
            yield restored(flat.view(np.int8).reshape(len(block), -1), scales, part.dtype)
        else:
            yield floats(flat, stored)


def _largest(numbers: Floats) -> float:
    """The largest magnitude; NaN where there is one."""
    return float(np.abs(numbers).max(initial=0))


def _beyond(part: Slice | Restored, checkpoint: Checkpoint) -> ArtifactError:
    """The error for numbers that the part's dtype does not reach: it would make infinities of them."""
    info, dtype = checkpoint.tensors[part.source], DTYPE_NAMES[part.dtype]
    whole = replace(part, axis=0, start=0, stop=info.shape[0])
    largest = max(_largest(numbers) for numbers in _numbers(whole, checkpoint))
    if math.isfinite(largest):
        hint = "Such a model needs bfloat16: store it so, and take a GPU that has it (SM 8.0 and newer)."
    else:
        hint = "Is the model damaged? Download or make it again."
    return ArtifactError(
        f"{info.file}: {part.source} goes up to {largest:g}, and {dtype} ends at {LARGEST[part.dtype]:g}", hint=hint
    )


def _blocks(part: Slice | Restored, checkpoint: Checkpoint) -> Iterator[tuple[Bytes, int]]:
    """The slice's rows, [n, bytes of a row] with their first row's number; views of the mapped file."""
    info = checkpoint.tensors[part.source]
    width = info.nbytes // info.shape[0]
    rows = checkpoint.bytes_of(part.source).reshape(info.shape[0], width)
    first, last, columns = part.start, part.stop, slice(None)
    if part.axis == 1:
        size = DTYPE_BYTES[info.dtype]
        first, last, columns = 0, info.shape[0], slice(part.start * size, part.stop * size)
    step = max(1, _PIECE_BYTES // width)
    for row in range(first, last, step):
        yield rows[row : min(row + step, last), columns], row
