"""The repository that ``package`` writes: Triton's own parser reads it, and the contract's tensors are in it."""

from __future__ import annotations

import ast
import errno
import os
import sys
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from toolchain import workspace
from toolchain.engine import Engine, Limits, Passport, write_passport
from toolchain.errors import ArtifactError
from toolchain.repository import Repository
from toolchain.stages import package as stage
from toolchain.stages.package import package

MODELS = ("ensemble", "postprocessing", "preprocessing", "tensorrt_llm", "tensorrt_llm_bls")
SHARED_WITH_CLIENTS = ("text_input", "max_tokens", "bad_words", "stop_words", "end_id", "top_k", "stream", "seed")


def make_engine(target: Path, *, backend: str = "openvino", tokenizer: bool = True) -> Engine:
    with workspace.draft(target, "engine", {"backend": backend}) as draft:
        (draft.path / "openvino_model.bin").write_bytes(bytes(1000))
        if tokenizer:
            (draft.path / "tokenizer.json").write_text("{}")
            (draft.path / "tokenizer_config.json").write_text("{}")
        limits = Limits(max_batch_size=8, max_seq_len=100, max_input_len=50, max_num_tokens=64)
        write_passport(
            draft.path,
            Passport(
                backend, "r", "LlamaForCausalLM", 500, 2, 1, (2,), "int4", 64, "int8", limits, "cpu", None, {}, {}, ""
            ),
        )
        draft.commit(versions={}, recipe="")
    return Engine.open(target)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return make_engine(tmp_path / "engine")


@pytest.fixture
def repository(engine: Engine, tmp_path: Path) -> Repository:
    with workspace.draft(tmp_path / "repository", "repository", {}) as draft:
        package(engine, draft.path)
        draft.commit(versions={}, recipe="")
    return Repository.open(tmp_path / "repository")


def config(repository: Repository, model: str) -> model_config_pb2.ModelConfig:
    text = (repository.path / model / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


@pytest.mark.parametrize("model", MODELS)
def test_every_configuration_is_one_that_triton_reads(repository: Repository, model: str) -> None:
    parsed = config(repository, model)
    assert parsed.name == model
    assert parsed.max_batch_size == 8
    assert repository.models == MODELS
    names = [tensor.name for tensor in parsed.input]
    assert len(names) == len(set(names))


def test_clients_find_the_same_tensors_at_every_door(repository: Repository) -> None:
    doors = [config(repository, model) for model in ("ensemble", "tensorrt_llm_bls")]
    kinds = [{tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in door.input} for door in doors]
    assert kinds[0].items() <= kinds[1].items()
    assert set(SHARED_WITH_CLIENTS) <= set(kinds[0])
    outputs = [{tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in door.output} for door in doors]
    assert outputs[0].items() <= outputs[1].items()
    assert outputs[1].keys() - outputs[0].keys() == {"finish_reason", "output_ids"}
    required = [{tensor.name for tensor in door.input if not tensor.optional} for door in doors]
    assert required == [{"text_input", "max_tokens"}] * 2


def test_ensemble_is_wired_to_tensors_that_exist_and_have_the_same_type(repository: Repository) -> None:
    ensemble = config(repository, "ensemble")
    known = {tensor.name: tensor.data_type for tensor in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        model = config(repository, step.model_name)
        inputs = {tensor.name: tensor for tensor in model.input}
        outputs = {tensor.name: tensor for tensor in model.output}
        for name, source in step.input_map.items():
            assert inputs[name].data_type == known[source], (name, source)
        assert {name for name, tensor in inputs.items() if not tensor.optional} <= set(step.input_map)
        known |= {target: outputs[name].data_type for name, target in step.output_map.items()}
    assert {tensor.name for tensor in ensemble.input} == {tensor.name for tensor in ensemble.input} & {
        source for step in ensemble.ensemble_scheduling.step for source in step.input_map.values()
    }
    for tensor in ensemble.output:
        assert known[tensor.name] == tensor.data_type


def test_weights_are_linked_and_not_copied(engine: Engine, repository: Repository) -> None:
    served = repository.path / "tensorrt_llm" / "1" / "engine" / "openvino_model.bin"
    assert served.samefile(engine.path / "openvino_model.bin")


def test_weights_are_copied_where_links_are_refused(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    package(engine, tmp_path / "out")
    copy = tmp_path / "out" / "tensorrt_llm" / "1" / "engine" / "openvino_model.bin"
    assert copy.read_bytes() == bytes(1000)
    assert not copy.samefile(engine.path / "openvino_model.bin")


def test_digests_of_linked_files_are_those_of_the_files(engine: Engine, tmp_path: Path) -> None:
    known = package(engine, tmp_path / "out")
    assert "tensorrt_llm/1/engine/openvino_model.bin" in known
    for name, digest in known.items():
        assert workspace.sha256_of(tmp_path / "out" / name) == digest


def test_package_can_be_repeated_over_a_half_written_folder(engine: Engine, tmp_path: Path) -> None:
    assert package(engine, tmp_path / "out") == package(engine, tmp_path / "out")


@pytest.mark.parametrize("model", ["preprocessing", "postprocessing", "tensorrt_llm_bls", "tensorrt_llm"])
def test_models_are_self_contained(repository: Repository, model: str) -> None:
    """Every import is of the standard library, of a file beside it, or of what Triton's Python environment has."""
    folder = repository.path / model / "1"
    beside = {path.stem for path in folder.glob("*.py")}
    allowed = {"numpy", "triton_python_backend_utils", "tokenizers", "transformers"}
    if model == "tensorrt_llm":
        allowed |= {"openvino", "openvino_genai"}
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(), feature_version=(3, 10))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                root = name.split(".")[0]
                assert root in beside | allowed or root in sys.stdlib_module_names, f"{path.name} imports {name}"
    assert "trust_remote_code" not in "".join(path.read_text() for path in folder.glob("*.py"))


def test_parameters_replace_defaults(engine: Engine, tmp_path: Path) -> None:
    package(engine, tmp_path / "out", parameters={"max_queue_size": 3})
    assert '"max_queue_size" value { string_value: "3" }' in (tmp_path / "out/tensorrt_llm/config.pbtxt").read_text()
    with pytest.raises(ArtifactError, match="did you mean 'max_queue_size'"):
        package(engine, tmp_path / "out", parameters={"max_queue_siz": 3})


def test_engine_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        package(make_engine(tmp_path / "engine", tokenizer=False), tmp_path / "out")


def test_backend_without_templates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no templates for the backend 'abacus'"):
        package(make_engine(tmp_path / "engine", backend="abacus"), tmp_path / "out")


def test_every_template_file_is_known_to_the_stage(root: Path) -> None:
    """A new shared file must be given to a model, and each model's imports of shared files must be among its own."""
    shared = {path.name for path in (root / "model_repo_templates" / "common" / "shared").glob("*.py")}
    known = [*stage._SHARED.values(), *stage._SHARED_WITH_ENGINE.values()]
    assert shared == {name for names in known for name in names}
