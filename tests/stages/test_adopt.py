"""The import itself: what it writes, that it goes on where it was stopped, and that nothing half made is left."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.quantizers.foreign.adopted import adopt
from tests.quantizers.foreign.folders import AWQ, Written, awq, write
from toolchain import workspace
from toolchain.checkpoint import Checkpoint
from toolchain.errors import ArtifactError
from toolchain.progress import Silent
from toolchain.quantizers import foreign
from toolchain.stages import adopt as stage


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Written:
    found = write(tmp_path_factory.mktemp("models") / "awq", awq(), AWQ)
    (found.path / "tokenizer_config.json").write_text('{"model_max_length": 2048}')
    return found


def digests(folder: Path) -> dict[str, str]:
    stamp = json.loads((folder / "stamp.json").read_text())
    return {name: record["sha256"] for name, record in stamp["files"].items()}


def test_the_folder_is_stamped_and_keeps_the_tokenizer_and_every_key_of_config_json(tmp_path, source):
    target = adopt(source.path, tmp_path / "out")
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (target, source.path))
    assert config.pop("quantization_config")["quant_method"] == "modelopt"
    assert before.pop("quantization_config")["quant_method"] == "awq"
    assert config == before
    assert (target / "tokenizer_config.json").read_text() == '{"model_max_length": 2048}'
    for name, digest in digests(target).items():
        assert hashlib.sha256((target / name).read_bytes()).hexdigest() == digest
    assert workspace.require(target, "imported").inputs["importer_version"] == foreign.VERSION


def test_several_shards_have_an_index(tmp_path, source):
    whole = adopt(source.path, tmp_path / "whole")
    target = adopt(source.path, tmp_path / "out", max_shard_bytes=400_000)
    assert len(list(target.glob("*.safetensors"))) > 1
    one, many = Checkpoint.open(whole), Checkpoint.open(target)
    assert set(one.tensors) == set(many.tensors)
    assert all((one.bytes_of(name) == many.bytes_of(name)).all() for name in one.tensors)


class Stop(BaseException):
    """What Ctrl-C is to Python."""


def stop_after(units: int, source: Path, target: Path) -> None:
    """An import that ends once so many units are in the journal."""
    model = foreign.open_foreign(source)
    with workspace.draft(target, "imported", stage.inputs(model)) as draft:
        record, entries = draft.record, []

        def stop(entry):
            record(entry)
            entries.append(entry)
            if len(entries) == units:
                raise Stop

        draft.record = stop
        stage.adopt(model, draft, progress=Silent())


@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_interrupted_import_goes_on_and_gives_the_same_bytes(tmp_path, source, after):
    whole = adopt(source.path, tmp_path / "whole")
    with pytest.raises(Stop):
        stop_after(after, source.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    reads: list[str] = []
    model = foreign.open_foreign(source.path)
    read = model.read
    model.read = lambda plan: reads.append(plan.name) or read(plan)
    with workspace.draft(tmp_path / "out", "imported", stage.inputs(model)) as draft:
        stage.adopt(model, draft, progress=Silent())
        draft.commit(versions={}, recipe="")
    assert "model.embed_tokens.weight" not in reads
    assert digests(tmp_path / "out") == digests(whole)


def test_a_full_disk_is_told_and_finished_work_kept(tmp_path, source, monkeypatch):
    real = os.fsync
    calls: list[int] = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match="No space left on device"):
        adopt(source.path, tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob("out.partial-*"))
    adopt(source.path, tmp_path / "out")
    assert not list(tmp_path.glob("out.partial-*"))


@pytest.mark.parametrize("damage", ["truncated", "missing", "wrong shape"])
def test_a_damaged_folder_is_named_and_nothing_is_written(tmp_path, source, damage):
    folder = tmp_path / "damaged"
    shutil.copytree(source.path, folder)
    file = folder / "model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-7])
    elif damage == "missing":
        rest = {name: tensor for name, tensor in source.tensors.items() if "1.mlp.up_proj.scales" not in name}
        save_file(rest, file)
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 768}))
    words = {"truncated": "truncated", "missing": r"up_proj\.scales is missing", "wrong shape": "where this format has"}
    with pytest.raises(ArtifactError, match=words[damage]):
        adopt(folder, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
