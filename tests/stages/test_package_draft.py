"""Promises about repositories with a draft model: a second engine model, and two engines that fit together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from tests.engine_folder import DRAFTED, write_engine, write_pair
from toolchain.errors import ArtifactError
from toolchain.release import releases
from toolchain.repository import CONTENTS
from toolchain.stages.package import package


def parameters(model: Path) -> dict[str, str]:
    config = text_format.Parse((model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    assert config.name == model.name
    return {name: value.string_value for name, value in config.parameters.items()}


@pytest.mark.parametrize("release", [one.version for one in releases().values() if one.engine])
def test_draft_model_is_the_engine_model_with_its_own_engine(tmp_path: Path, release: str) -> None:
    engine, draft = write_pair(tmp_path, release)
    out = tmp_path / "repository"
    known = package(engine, out, draft=draft)
    first, second = parameters(out / "tensorrt_llm"), parameters(out / "tensorrt_llm_draft")
    assert second["gpt_model_path"] == "tensorrt_llm_draft/1/engine"
    assert {name for name in first if first[name] != second[name]} == {"gpt_model_path"}
    assert second["enable_kv_cache_reuse"] == "true"
    assert (out / second["gpt_model_path"] / "rank0.engine").stat().st_ino == (
        draft.path / "rank0.engine"
    ).stat().st_ino
    assert known["tensorrt_llm_draft/1/engine/rank0.engine"] == draft.stamp.files["rank0.engine"].sha256
    door = parameters(out / "tensorrt_llm_bls")
    assert door["tensorrt_llm_draft_model_name"] == "tensorrt_llm_draft"
    assert (door["num_draft_tokens"], door["draft_max_seq_len"]) == (str(DRAFTED), "96")
    assert "tensorrt_llm_draft" in json.loads((out / CONTENTS).read_text())["models"]


def test_repository_without_a_draft_says_so(tmp_path: Path) -> None:
    package(write_engine(tmp_path / "engine", "1.2.1"), tmp_path / "repository")
    assert parameters(tmp_path / "repository" / "tensorrt_llm_bls")["tensorrt_llm_draft_model_name"] == ""
    assert not (tmp_path / "repository" / "tensorrt_llm_draft").exists()


def test_engine_and_draft_must_be_wanted_and_there(tmp_path: Path) -> None:
    engine, draft = write_pair(tmp_path, "1.2.1")
    with pytest.raises(ArtifactError, match="built for a draft model, and there is none"):
        package(engine, tmp_path / "repository")
    alone = write_engine(tmp_path / "alone", "1.2.1")
    with pytest.raises(ArtifactError, match="not built for a draft model"):
        package(alone, tmp_path / "repository", draft=draft)


def test_draft_that_does_not_fit_is_refused_with_every_reason(tmp_path: Path) -> None:
    engine, _ = write_pair(tmp_path, "1.2.1")
    other = write_engine(tmp_path / "other", "1.1.0", device="l4", runtime={"enable_kv_cache_reuse": False})
    with pytest.raises(ArtifactError) as caught:
        package(engine, tmp_path / "repository", draft=other)
    for reason in (
        "its release is 1.1.0, the engine's 1.2.1",
        "its device is l4, the engine's rtx4090",
        "it cannot reuse its cache",
    ):
        assert f"\n  - {reason}" in caught.value.message
    assert "scalellm build" in caught.value.hint


def test_draft_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder, token in zip(folders, "ab", strict=True):
        folder.mkdir()
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {token: 7}}}))
    engine, _ = write_pair(tmp_path / "first", "1.2.1", folders[0])
    _, draft = write_pair(tmp_path / "second", "1.2.1", folders[1])
    with pytest.raises(ArtifactError, match="token 7 is 'a' in the model and 'b' in the draft"):
        package(engine, tmp_path / "repository", draft=draft)
