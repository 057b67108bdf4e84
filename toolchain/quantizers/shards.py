"""Safetensors files written once, front to back, and continued after an interruption.

All names, dtypes and shapes are known beforehand, so the header comes first and the data follow in order. A unit (one
decoder layer, say) is finished when its bytes are fsynced and the journal holds the file's sha256 up to its end; a
restart checks the finished units against those digests and goes on behind the last good one. Hashing, writing and
fsync run on a thread of their own. It knows nothing of quantization.

File and index names are those of transformers' ``save_pretrained``.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from toolchain.safetensors_file import Behind, Bytes, HashedFile, TensorPlan, header

INDEX = "model.safetensors.index.json"
_PIECE = 2**20
_JOBS_AHEAD = 2
"""Tensors that may wait for the disk; with the one in hand and the one being written they bound the memory."""


@dataclass(frozen=True)
class Unit:
    """What is done, or not done, as a whole: the tensors of one decoder layer, or those before or behind the layers."""

    name: str
    tensors: tuple[TensorPlan, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class Shard:
    """One file: some units in a row."""

    file: str
    units: tuple[Unit, ...]

    @property
    def header(self) -> bytes:
        return header((tensor for unit in self.units for tensor in unit.tensors), {"format": "pt"})

    @property
    def tensor_bytes(self) -> dict[str, int]:
        return {tensor.name: tensor.nbytes for unit in self.units for tensor in unit.tensors}


def plan_shards(units: Sequence[Unit], max_shard_bytes: int) -> list[Shard]:
    """Fill files up to ``max_shard_bytes`` of data; a unit is never split, however large it is."""
    groups: list[list[Unit]] = []
    for unit in units:
        if groups and sum(other.nbytes for other in groups[-1]) + unit.nbytes <= max_shard_bytes:
            groups[-1].append(unit)
        else:
            groups.append([unit])
    return [Shard(file_name(place, len(groups)), tuple(group)) for place, group in enumerate(groups)]


def file_name(place: int, count: int) -> str:
    """(0, 1) -> ``model.safetensors``; (0, 3) -> ``model-00001-of-00003.safetensors``."""
    return "model.safetensors" if count == 1 else f"model-{place + 1:05}-of-{count:05}.safetensors"


def index_document(files: Mapping[str, Mapping[str, int]]) -> str:
    """File -> {tensor: bytes} of every shard -> the text of ``model.safetensors.index.json``."""
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    size = sum(nbytes for tensors in files.values() for nbytes in tensors.values())
    document = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(document, indent=2) + "\n"


def scalars(values: Mapping[str, float]) -> bytes:
    """Name -> number: a whole safetensors file of float32 scalars, in that order."""
    unit = Unit("scalars", tuple(TensorPlan(name, "F32", ()) for name in values))
    return Shard("", (unit,)).header + np.array(list(values.values()), "<f4").tobytes()


class ShardWriter:
    """Writes the units of ``shards`` in order into ``folder``; a context.

    ``journal`` is what ``record`` was given by earlier runs, oldest first; ``advance`` gets the bytes that are checked
    for it. Errors of the disk surface as OSError in a later ``put`` or ``end_unit``, or on leaving the context.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Shard],
        journal: Sequence[Mapping[str, Any]] = (),
        record: Callable[[Mapping[str, Any]], None] = lambda _entry: None,
        advance: Callable[[int], None] = lambda _count: None,
    ) -> None:
        self._folder = folder
        self._record = record
        self._sink = HashedFile()
        self._behind = Behind("shards", _JOBS_AHEAD)
        self._to_come: deque[tuple[Shard, Unit]] = deque((shard, unit) for shard in shards for unit in shard.units)
        self._todo: deque[TensorPlan] = deque()
        self._left = 0
        self.hashes: dict[str, str] = {}
        """File -> sha256; of whole files once all units are written and the context is left."""
        self.finished: list[Mapping[str, Any]] = []
        """The journal's entries of the units that need not be written again."""
        entries = {entry["unit"]: entry for entry in journal if "unit" in entry}
        for shard in shards:
            if self._continue(shard, entries, advance) < len(shard.units):
                break

    @property
    def units_left(self) -> list[Unit]:
        return [unit for _, unit in self._to_come]

    def __enter__(self) -> Self:
        self._behind.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._behind.__exit__(kind, error, trace)
        finally:
            self._sink.close()

    def put(self, name: str, data: Bytes) -> None:
        """The next bytes of the tensor ``name``, flat uint8; a tensor may come in several pieces.

        ``data`` must not change afterwards. ValueError when the plan has another tensor, or fewer bytes, here.
        """
        if not self._todo:
            self._begin_unit()
        if self._todo[0].name != name or data.nbytes > self._left:
            raise ValueError(f"{name}: {data.nbytes} bytes, where the plan has {self._left} of {self._todo[0].name}")
        self._behind.submit(lambda: self._sink.write(data))
        self._left -= data.nbytes
        if not self._left:
            self._todo.popleft()
            self._left = self._todo[0].nbytes if self._todo else 0

    def end_unit(self, **extra: Any) -> None:
        """Close the unit in hand: fsync, then journal ``{"unit", "file", "end", "sha256", **extra}``."""
        shard, unit = self._to_come.popleft()
        if self._todo:
            raise ValueError(f"{unit.name}: {self._todo[0].name} was not written")

        def seal() -> None:
            end, digest = self._sink.sync()
            self._record({"unit": unit.name, "file": shard.file, "end": end, "sha256": digest, **extra})
            self.hashes[shard.file] = digest

        self._behind.submit(seal)

    def _begin_unit(self) -> None:
        shard, unit = self._to_come[0]
        self._todo.extend(unit.tensors)
        self._left = unit.tensors[0].nbytes
        if unit is shard.units[0]:
            self._behind.submit(lambda: self._sink.start(self._folder / shard.file, shard.header))

    def _continue(self, shard: Shard, entries: Mapping[str, Mapping[str, Any]], advance: Callable[[int], None]) -> int:
        """Take over the units of one file whose bytes agree with the journal, up to the first that do not; how many?"""
        path, header = self._folder / shard.file, shard.header
        if shard.units[0].name not in entries or not path.is_file():
            return 0
        digest, end, count = hashlib.sha256(header), len(header), 0
        with path.open("rb") as stream:
            if stream.read(len(header)) != header:
                return 0
            for unit in shard.units:
                probe = digest.copy()
                for size in _pieces(unit.nbytes):
                    probe.update(stream.read(size))
                    advance(size)
                if probe.hexdigest() != entries.get(unit.name, {}).get("sha256"):
                    break
                digest, end, count = probe, end + unit.nbytes, count + 1
                self.finished.append(entries[unit.name])
                self._to_come.popleft()
        if count:
            self.hashes[shard.file] = digest.hexdigest()
        if 0 < count < len(shard.units):
            self._sink.go_on(path, digest, end)
        return count


def _pieces(nbytes: int) -> Iterator[int]:
    return (min(_PIECE, nbytes - start) for start in range(0, nbytes, _PIECE))
