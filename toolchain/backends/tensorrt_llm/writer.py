"""A checkpoint in the unified layout -> a TensorRT-LLM checkpoint, without rounding anything a second time.

Each tensor of the source is read once, through the mapped files, and goes in pieces to all ranks of its pipeline stage;
each file is written front to back with its header first. So memory is bounded by the pages of one tensor and the pieces
in hand. ``config.json`` comes last: a folder without it is no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from toolchain import workspace
from toolchain.backends.tensorrt_llm.checks import check
from toolchain.backends.tensorrt_llm.document import config_document
from toolchain.backends.tensorrt_llm.export import RESTORED, Export
from toolchain.backends.tensorrt_llm.numbers import Bytes, narrow
from toolchain.backends.tensorrt_llm.split import Split
from toolchain.backends.tensorrt_llm.tensors import Constant, Part, Restored, Slice, Tensor, rank_tensors
from toolchain.checkpoint import DTYPE_BYTES, Checkpoint
from toolchain.errors import ArtifactError
from toolchain.progress import Progress, Silent
from toolchain.units import format_bytes

_PIECE_BYTES = 4 * 2**20
_ROOM_BYTES = 2**20  # headers and config.json


def write(
    checkpoint: Checkpoint,
    out: Path,
    *,
    tp: int = 1,
    pp: int = 1,
    kv: str = "fp16",
    int8_form: str = RESTORED,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Fill the folder ``out``, a draft's, with ``config.json``, ``rank{N}.safetensors`` for tp x pp ranks, and the
    tokenizer's files. -> file -> sha256 of the ranks' files.

    ``kv``: "fp16" for the model's own dtype, "int8" (from the ranges that calibration left) or "fp8". ``int8_form``:
    see ``export.Export``. Raises PlanError with every reason why the checkpoint cannot be exported so, ArtifactError
    for too little room; an OSError of the disk is left to ``workspace.draft``.
    """
    export = Export(checkpoint, Split(tp, pp), kv, int8_form)
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
                    _release(parallel, checkpoint)
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
    """A rank's file, fsynced when it is left. Format: https://huggingface.co/docs/safetensors (2026-11)."""

    def __init__(self, path: Path, tensors: Sequence[Tensor]) -> None:
        self._stream = path.open("wb")
        self._digest = hashlib.sha256()
        self._put(np.frombuffer(_header(tensors), np.uint8))

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, tensor: Tensor, checkpoint: Checkpoint) -> None:
        """The next tensor, in the header's order."""
        written = sum(self._put(piece) for part in tensor.parts for piece in _pieces(part, checkpoint))
        assert written == tensor.nbytes, f"{tensor.name}: {written} bytes, where its header says {tensor.nbytes}"

    def _put(self, data: Bytes) -> int:
        view = memoryview(data)  # type: ignore[arg-type]  # numpy's stubs of 1.26 know no Buffer
        self._digest.update(view)
        self._stream.write(view)
        return data.nbytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stream as stream:
            stream.flush()
            os.fsync(stream.fileno())


def _header(tensors: Sequence[Tensor]) -> bytes:
    entries: dict[str, Any] = {}
    offset = 0
    for tensor in tensors:
        place = [offset, offset + tensor.nbytes]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": place}
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(part: Part, checkpoint: Checkpoint) -> Iterator[Bytes]:
    """The bytes of a part, flat, in pieces of bounded size."""
    if isinstance(part, Constant):
        yield np.frombuffer(part.data * part.count, np.uint8)
        return
    for block, row in _blocks(part, checkpoint):
        if isinstance(part, Restored):
            scales = checkpoint.bytes_of(part.scale).view("<f4")[row : row + len(block)]
            yield narrow(block.view(np.int8) * scales[:, None], part.dtype)
        else:
            yield np.ascontiguousarray(block).reshape(-1)


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


def _release(tensors: Sequence[Tensor], checkpoint: Checkpoint) -> None:
    """Give the pages of what was read back to the system."""
    sources = {part.source for tensor in tensors for part in tensor.parts if not isinstance(part, Constant)}
    for source in sources:
        checkpoint.release(source)
