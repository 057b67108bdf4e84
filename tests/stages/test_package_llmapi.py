"""The repository of a llmapi engine as files: Triton reads it, and it stands beside nothing of scalellm's."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import yaml
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from tests.stages.test_package import make_engine
from toolchain import workspace
from toolchain.engine import Engine
from toolchain.repository import Repository
from toolchain.stages.package import package

TEMPLATES = Path(__file__).resolve().parents[2] / "model_repo_templates"


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    make_engine(tmp_path / "plain", backend="tensorrt_llmapi")
    with workspace.draft(tmp_path / "engine", "engine", {"llmapi": True}) as draft:
        for file in (tmp_path / "plain").iterdir():
            if file.name != "stamp.json":
                (draft.path / file.name).write_bytes(file.read_bytes())
        (draft.path / "model.yaml").write_text("model: engine\nbackend: pytorch\n")
        draft.commit(versions={}, recipe="")
    with workspace.draft(tmp_path / "repository", "repository", {}) as draft:
        package(Engine.open(tmp_path / "engine"), draft.path)
        draft.commit(versions={}, recipe="")
    return Repository.open(tmp_path / "repository")


def _config(text: str) -> model_config_pb2.ModelConfig:
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_decoupling_is_written_down_for_servers_that_complete_nothing(repository: Repository) -> None:
    """NVIDIA's own llmapi model leaves it to auto-complete, which its launcher always turns off."""
    config = _config((repository.path / "tensorrt_llm" / "config.pbtxt").read_text())
    assert config.model_transaction_policy.decoupled
    assert config.max_batch_size == 8
    assert config.backend == "python"


def test_its_tensors_are_those_of_every_engine_of_ours(repository: Repository) -> None:
    ours = _config((repository.path / "tensorrt_llm" / "config.pbtxt").read_text())
    text = (TEMPLATES / "openvino" / "tensorrt_llm" / "config.pbtxt").read_text()
    other = _config(text.replace("${triton_max_batch_size}", "8"))
    for side in ("input", "output"):
        described = [
            [(one.name, one.data_type, tuple(one.dims), getattr(one, "optional", None)) for one in getattr(each, side)]
            for each in (ours, other)
        ]
        assert described[0] == described[1]


def test_the_settings_stand_beside_the_model_and_name_the_folder_beside_them(repository: Repository) -> None:
    version = repository.path / "tensorrt_llm" / "1"
    assert (version / yaml.safe_load((version / "model.yaml").read_text())["model"]).is_dir()
    assert (version / "model.yaml").samefile(version / "engine" / "model.yaml")


def test_the_model_is_self_contained(repository: Repository) -> None:
    """Every import is of the standard library, of a file beside it, or of what NVIDIA's image has."""
    folder = repository.path / "tensorrt_llm" / "1"
    beside = {path.stem for path in folder.glob("*.py")}
    allowed = {"numpy", "yaml", "triton_python_backend_utils", "tensorrt_llm"}
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(), feature_version=(3, 10))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.partition(".")[0] in beside | allowed | sys.stdlib_module_names, f"{path.name}: {name}"
