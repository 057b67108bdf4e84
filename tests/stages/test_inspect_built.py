"""`scalellm inspect` of an engine, a repository, a TensorRT-LLM checkpoint: all that is known, and what disagrees."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.backends import conftest as trtllm
from tests.backends.trtllm_folders import Folders
from tests.engine_folder import write_engine
from toolchain import accuracy, workspace
from toolchain.backends import tensorrt_llm
from toolchain.checkpoint import Checkpoint
from toolchain.errors import ArtifactError
from toolchain.stages.inspect import Sheet, inspect
from toolchain.stages.package import package

quantized = trtllm.unified  # the fixture


def sheet_of(path: Path) -> Sheet:
    found = inspect(path)
    assert isinstance(found, Sheet)
    return found


def said(found: Sheet) -> dict[str, str]:
    return dict(found.rows)


class TestEngine:
    """The passport, and the files beside it."""

    @pytest.fixture
    def engine(self, tmp_path: Path) -> Path:
        made = {"checkpoint": "c" * 64, "model": "d" * 64, "recipe_sha256": "e" * 64, "argv": ("trtllm-build", "--x")}
        write_engine(tmp_path / "engine", "1.2.1", gate="advised", **made)
        return tmp_path / "engine"

    def test_everything_in_the_passport_is_told(self, engine: Path) -> None:
        found = sheet_of(engine)
        rows = said(found)
        assert (found.kind, found.warnings) == ("engine", ())
        assert rows["device"] == "rtx4090, SM 8.9"
        assert rows["release"] == "TensorRT-LLM 1.2.1, TensorRT 10.14.1.48, image tritonserver:26.07-trtllm-python-py3"
        assert rows["config.json says"] == "TensorRT-LLM 1.2.1"
        assert rows["weights"] == "int4 in groups of 128, fp16 cache"
        assert rows["limits"] == "8 sequences, 256 tokens each, 200 of a prompt, 1024 tokens a step"
        assert rows["made from"] == "checkpoint cccccccccccc, model dddddddddddd, recipe eeeeeeeeeeee"
        assert rows["built by"] == "trtllm-build --x"
        assert rows["accuracy"] == "not verified, and advised"
        assert rows["stamp"].endswith("intact")
        assert found.next == "scalellm package --recipe parrot"

    @pytest.mark.parametrize("passed", [True, False])
    def test_the_verdict_is_told(self, engine: Path, passed: bool) -> None:
        digest = accuracy.digest_of(workspace.require(engine, "engine").files)
        accuracy.write_verdict(engine, digest, passed=passed, summary="12 answers")
        assert said(sheet_of(engine))["accuracy"].startswith("passed" if passed else "FAILED")

    def change(self, file: Path, **values: Any) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    def test_a_version_that_differs_is_a_warning(self, engine: Path) -> None:
        self.change(engine / "config.json", version="1.1.0")
        found = sheet_of(engine)
        told = "\n".join(found.warnings)
        assert "version is 1.1.0, the passport says 1.2.1" in told
        assert "config.json is corrupted" in told  # and no file that was stamped changes without a word
        assert said(found)["config.json says"] == "TensorRT-LLM 1.1.0"
        assert said(found)["stamp"].endswith("damaged")
        assert found.next == "scalellm build --recipe parrot"

    def test_a_rank_that_is_missing_is_a_warning(self, engine: Path) -> None:
        (engine / "rank0.engine").unlink()
        assert any("rank0.engine is missing" in one for one in sheet_of(engine).warnings)

    def test_an_engine_without_a_stamp_is_told_to_be_unfinished(self, engine: Path) -> None:
        (engine / "stamp.json").unlink()
        assert any("no stamp" in one for one in sheet_of(engine).warnings)

    def test_an_engine_that_others_built_is_read_from_its_own_configuration(self, engine: Path) -> None:
        for name in ("stamp.json", "engine.json"):
            (engine / name).unlink()
        found = sheet_of(engine)
        assert said(found)["what"] == "TensorRT-LLM engine that scalellm did not build"
        assert said(found)["version"] == "TensorRT-LLM 1.2.1"
        assert found.facts["config"]["quant_algo"] == "W4A16_AWQ"
        assert "no passport" in found.warnings[0]

    def test_as_a_person_and_a_program_see_it(self, engine: Path, scalellm: Callable[..., Any]) -> None:
        told = scalellm("inspect", engine)
        assert told.returncode == 0, told.stderr
        assert "TensorRT 10.14.1.48" in told.stdout
        found = json.loads(scalellm("inspect", engine, "--json").stdout)
        assert (found["kind"], found["passport"]["sm"], found["engine_version"]) == ("engine", 89, "1.2.1")
        assert (found["accuracy"], found["intact"], found["warnings"]) == (None, True, [])

    def test_a_passport_of_another_program_is_an_error(self, engine: Path) -> None:
        (engine / "engine.json").write_text('{"limits": {}}')
        with pytest.raises(ArtifactError, match="not a passport"):
            inspect(engine)


def test_a_repository_shows_its_models_its_server_and_its_engine(tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "engine", "1.2.1", gate="required")
    with workspace.draft(tmp_path / "repository", "repository", {}) as draft:
        package(engine, draft.path, services=3)
        draft.commit(versions={}, recipe="")
    found = sheet_of(tmp_path / "repository")
    rows = said(found)
    assert (found.kind, found.warnings) == ("repository", ())
    assert "tensorrt_llm_bls" in rows["models"]
    assert rows["served by"] == "3 servers, nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"
    assert rows["device"] == "rtx4090, SM 8.9"
    assert rows["accuracy"] == "not verified, and required before it serves"
    assert found.next == f"scalellm serve --repository {tmp_path / 'repository'}"
    accuracy.write_verdict(engine.path, accuracy.digest_of(engine.stamp.files), passed=True, summary="same words")
    assert said(sheet_of(tmp_path / "repository"))["accuracy"].endswith("same words")


class TestCheckpoint:
    """A folder for ``trtllm-build``."""

    @pytest.fixture
    def folder(self, quantized: Folders, tmp_path: Path) -> Path:
        tensorrt_llm.write(Checkpoint.open(quantized("gqa", "fp8")), tmp_path / "out", tp=2, kv="fp8")
        return tmp_path / "out"

    def test_ranks_formats_and_scales_are_told(self, folder: Path) -> None:
        found = sheet_of(folder)
        rows = said(found)
        assert found.kind == "trtllm-checkpoint"
        assert rows["what"] == "TensorRT-LLM checkpoint for trtllm-build, tp 2 x pp 1"
        assert (rows["weights"], rows["cache"]) == ("FP8", "FP8")
        assert rows["cache scales"] == "1 to 1, one for each of 2 layers"
        assert rows["dtype"] == "bfloat16, logits float32"
        sizes = [sum(one.nbytes for one in load(folder, rank).values()) for rank in range(2)]
        assert found.facts["rank_bytes"] == sizes
        assert (found.facts["tp"], found.facts["pp"], found.facts["layers"]) == (2, 1, 2)
        assert found.warnings == ()

    def test_groups_and_an_int8_cache_are_told(self, quantized: Folders, tmp_path: Path) -> None:
        tensorrt_llm.write(Checkpoint.open(quantized("gqa", "awq", kv="int8")), tmp_path / "out", kv="int8")
        found = sheet_of(tmp_path / "out")
        assert said(found)["weights"] == "W4A16_AWQ, groups of 64"
        scales = found.facts["kv_scales"]
        assert len(scales) == 2
        assert all(0 < scale < 1 for scale in scales)

    def test_a_cache_scale_of_zero_is_a_warning(self, folder: Path) -> None:
        file = folder / "rank0.safetensors"
        raw = file.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        start, stop = header["transformer.layers.1.attention.kv_cache_scaling_factor"]["data_offsets"]
        data = bytearray(raw)
        data[8 + size + start : 8 + size + stop] = np.zeros(1, "<f4").tobytes()
        file.write_bytes(bytes(data))
        assert any("cache scale of layer 1 is 0.0" in one for one in sheet_of(folder).warnings)

    def test_a_rank_that_is_missing_is_an_error_that_names_it(self, folder: Path) -> None:
        (folder / "rank1.safetensors").unlink()
        with pytest.raises(ArtifactError, match=r"rank1\.safetensors: no such file, of 2 ranks"):
            inspect(folder)

    def test_one_that_modelopt_wrote_has_no_stamp_and_is_told_all_the_same(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps(config | {"producer": {"name": "modelopt", "version": "0.47.0"}})
        )
        rows = said(sheet_of(folder))
        assert rows["written by"] == "modelopt 0.47.0"
        assert rows["stamp"] == "none of scalellm's"


def load(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"rank{rank}.safetensors")
