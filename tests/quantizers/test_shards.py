"""The safetensors writer: read back by Hugging Face's own library, continued after every possible interruption."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from toolchain.checkpoint import read_header
from toolchain.quantizers.shards import Shard, ShardWriter, Unit, index_document, plan_shards
from toolchain.safetensors_file import TensorPlan

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}


def units(count: int) -> list[Unit]:
    return [
        Unit(
            f"unit {place}",
            (
                TensorPlan(f"{place}.weight", "F16", (3, 40 + place)),
                TensorPlan(f"{place}.scale", "F32", ()),
                TensorPlan(f"{place}.packed", "U8", (7,)),
            ),
        )
        for place in range(count)
    ]


def content(tensor: TensorPlan) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(tensor.name.encode()).digest()[:4], "little")
    return np.random.default_rng(seed).integers(0, 60, tensor.nbytes).astype(np.uint8)


def write(folder: Path, shards: list[Shard], journal: list[Any], stop_after: int = 10**9) -> ShardWriter:
    with ShardWriter(folder, shards, list(journal), journal.append) as writer:
        for unit in writer.units_left[:stop_after]:
            for tensor in unit.tensors:
                data = content(tensor)
                writer.put(tensor.name, data[:5])
                if data.nbytes > 5:
                    writer.put(tensor.name, data[5:])
            writer.end_unit(note=unit.name)
    return writer


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def test_huggingface_reads_what_we_write(tmp_path: Path) -> None:
    shards = plan_shards(units(5), 700)
    assert len(shards) > 1
    assert shards[0].file == f"model-00001-of-{len(shards):05}.safetensors"
    writer = write(tmp_path, shards, [])
    for shard in shards:
        loaded = load_file(tmp_path / shard.file)
        for tensor in (tensor for unit in shard.units for tensor in unit.tensors):
            assert loaded[tensor.name].dtype == DTYPES[tensor.dtype]
            assert loaded[tensor.name].shape == tensor.shape
            raw = loaded[tensor.name].reshape(-1).view(torch.uint8).numpy()
            assert np.array_equal(raw, content(tensor))
        assert set(read_header(tmp_path / shard.file)) == set(loaded)
    assert writer.hashes == digests(tmp_path)


def test_one_shard_has_the_plain_name() -> None:
    assert [shard.file for shard in plan_shards(units(3), 10**6)] == ["model.safetensors"]


def test_a_unit_larger_than_a_shard_is_not_split() -> None:
    assert [len(shard.units) for shard in plan_shards(units(3), 1)] == [1, 1, 1]


def test_index_names_every_tensor_and_the_whole_size() -> None:
    shards = plan_shards(units(4), 700)
    index = json.loads(index_document({shard.file: shard.tensor_bytes for shard in shards}))
    assert index["metadata"]["total_size"] == sum(unit.nbytes for unit in units(4))
    assert index["weight_map"]["2.scale"] in {shard.file for shard in shards}
    assert len(index["weight_map"]) == 12


@pytest.mark.parametrize("max_shard_bytes", [1, 700, 10**6])
@pytest.mark.parametrize("stop", range(6))
def test_an_interrupted_write_continues_bit_for_bit(tmp_path: Path, max_shard_bytes: int, stop: int) -> None:
    shards = plan_shards(units(5), max_shard_bytes)
    whole, part = tmp_path / "whole", tmp_path / "part"
    whole.mkdir()
    part.mkdir()
    write(whole, shards, [])
    journal: list[Any] = []
    write(part, shards, journal, stop_after=stop)
    again = ShardWriter(part, shards, journal)
    assert [unit.name for unit in again.units_left] == [f"unit {place}" for place in range(stop, 5)]
    assert [entry["note"] for entry in again.finished] == [f"unit {place}" for place in range(stop)]
    writer = write(part, shards, journal)
    assert digests(part) == digests(whole) == writer.hashes


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 4), st.data())
def test_a_damaged_or_cut_file_is_written_again_from_there(
    tmp_path_factory: pytest.TempPathFactory, stop: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damage")
    shards = plan_shards(units(5), 700)
    journal: list[Any] = []
    write(folder, shards, journal)
    expected = digests(folder)
    victim = folder / data.draw(st.sampled_from(sorted(expected)))
    raw = bytearray(victim.read_bytes())
    place = data.draw(st.integers(0, len(raw) - 1))
    if data.draw(st.booleans()):
        raw[place] ^= 0xFF
    else:
        del raw[place:]
    victim.write_bytes(raw)
    assert digests(folder) != expected
    write(folder, shards, journal)
    assert digests(folder) == expected


def test_bytes_of_an_unfinished_unit_are_dropped(tmp_path: Path) -> None:
    shards = plan_shards(units(5), 10**6)
    journal: list[Any] = []
    write(tmp_path, shards, journal, stop_after=2)
    with (tmp_path / "model.safetensors").open("ab") as stream:
        stream.write(b"half a layer")
    write(tmp_path, shards, journal)
    (tmp_path / "other").mkdir()
    write(tmp_path / "other", shards, [])
    assert digests(tmp_path) == digests(tmp_path / "other")


def test_the_wrong_tensor_and_too_many_bytes_are_refused(tmp_path: Path) -> None:
    shards = plan_shards(units(2), 10**6)
    with pytest.raises(ValueError, match=r"0\.weight"), ShardWriter(tmp_path, shards) as writer:
        writer.put("0.scale", np.zeros(4, np.uint8))
    with pytest.raises(ValueError, match="where the plan has"), ShardWriter(tmp_path, shards) as writer:
        writer.put("0.weight", np.zeros(1000, np.uint8))
    with ShardWriter(tmp_path, shards) as writer:
        writer.put("0.weight", content(shards[0].units[0].tensors[0]))
        with pytest.raises(ValueError, match="was not written"):
            writer.end_unit()


def test_nothing_is_journaled_behind_a_failed_write(tmp_path: Path) -> None:
    """/dev/full takes no byte: the error names the file, and no unit counts as finished."""
    shards = plan_shards(units(3), 10**6)
    (tmp_path / "model.safetensors").symlink_to("/dev/full")
    journal: list[Any] = []
    with pytest.raises(OSError, match=r"model\.safetensors"):
        write(tmp_path, shards, journal)
    assert journal == []
