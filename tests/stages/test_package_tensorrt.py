"""The repository of a TensorRT-LLM engine: NVIDIA's model in the engine's release, and our own models around it."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tokenizers import Tokenizer
from tritonclient.grpc import model_config_pb2

from tests import triton_contract
from tests.e2e.parrot import write_tokenizer
from tests.engine_folder import config_json, write_engine
from tests.stages.test_package import make_engine
from tests.test_triton_model import RELEASES
from toolchain import workspace
from toolchain.errors import ArtifactError
from toolchain.repository import Repository
from toolchain.stages.package import package

OURS = ("ensemble", "postprocessing", "preprocessing", "tensorrt_llm_bls")
LACKING = {
    "0.12.0": {
        "num_return_sequences",
        "exclude_input_in_output",
        "return_perf_metrics",
        "guided_decoding_guide_type",
        "guided_decoding_guide",
        "return_num_input_tokens",
        "return_num_output_tokens",
    },
    "0.16.0": {
        "guided_decoding_guide_type",
        "guided_decoding_guide",
        "return_num_input_tokens",
        "return_num_output_tokens",
    },
    "0.19.0": {"return_num_input_tokens", "return_num_output_tokens"},
    "0.21.0": {"return_num_input_tokens", "return_num_output_tokens"},
    "1.2.1": set[str](),
}
"""What clients of an ensemble miss, typed from the contract."""


def packaged(folder: Path, release: str, *, services: int = 1, **engine: Any) -> Repository:
    made = write_engine(folder / "engine", release, **engine)
    with workspace.draft(folder / "repository", "repository", {}) as draft:
        package(made, draft.path, services=services)
        draft.commit(versions={}, recipe="")
    return Repository.open(folder / "repository")


def config(repository: Repository, model: str) -> model_config_pb2.ModelConfig:
    text = (repository.path / model / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def parameters(repository: Repository, model: str = "tensorrt_llm") -> dict[str, str]:
    return {name: value.string_value for name, value in config(repository, model).parameters.items()}


@pytest.mark.parametrize("release", RELEASES)
def test_every_model_is_one_that_triton_reads_and_nvidias_has_the_releases_tensors(
    tmp_path: Path, release: str
) -> None:
    repository = packaged(tmp_path, release)
    assert repository.models == (*OURS[:3], "tensorrt_llm", "tensorrt_llm_bls")
    for model in repository.models:
        assert config(repository, model).name == model
        assert config(repository, model).max_batch_size == 8
    engine = config(repository, "tensorrt_llm")
    assert {tensor.name for tensor in engine.input} == set(triton_contract.inputs(release))
    assert {tensor.name for tensor in engine.output} == set(triton_contract.outputs(release))
    assert (repository.release, repository.gpus) == (release, 1)


@pytest.mark.parametrize("release", RELEASES)
def test_the_ensemble_is_wired_to_what_the_release_has(tmp_path: Path, release: str) -> None:
    repository = packaged(tmp_path, release)
    ensemble = config(repository, "ensemble")
    known = {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in ensemble.input}
    used: set[str] = set()
    for step in ensemble.ensemble_scheduling.step:
        model = config(repository, step.model_name)
        inputs = {tensor.name: tensor for tensor in model.input}
        outputs = {tensor.name: tensor for tensor in model.output}
        for name, source in step.input_map.items():
            assert inputs[name].data_type == known[source][0], (name, source)
        assert {name for name, tensor in inputs.items() if not tensor.optional} <= set(step.input_map)
        used |= set(step.input_map.values())
        known |= {to: (outputs[name].data_type, list(outputs[name].dims)) for name, to in step.output_map.items()}
    assert {tensor.name for tensor in ensemble.input} <= used
    for tensor in ensemble.output:
        assert (tensor.data_type, list(tensor.dims)) == known[tensor.name]


@pytest.mark.parametrize("release", LACKING)
def test_clients_of_the_ensemble_miss_only_what_the_release_cannot_do(tmp_path: Path, release: str) -> None:
    newest = config(packaged(tmp_path / "newest", "1.2.1"), "ensemble")
    here = config(packaged(tmp_path / "here", release), "ensemble")
    there = {tensor.name: str(tensor) for tensor in newest.input}
    found = {tensor.name: str(tensor) for tensor in here.input}
    assert set(there) - set(found) == LACKING[release]
    assert found.items() <= there.items()
    outputs = {tensor.name for tensor in newest.output} - {tensor.name for tensor in here.output}
    assert outputs == {tensor.name for tensor in newest.output} & (
        set(triton_contract.outputs("1.2.1")) - set(triton_contract.outputs(release))
    )


def test_renamed_tensors_keep_their_name_for_clients(tmp_path: Path) -> None:
    for release, names in (("0.19.0", ("min_length", "random_seed")), ("0.20.0", ("min_tokens", "seed"))):
        ensemble = config(packaged(tmp_path / release, release), "ensemble")
        step = next(step for step in ensemble.ensemble_scheduling.step if step.model_name == "tensorrt_llm")
        assert [step.input_map[name] for name in names] == ["min_tokens", "seed"]
    step = config(packaged(tmp_path / "0.18.2", "0.18.2"), "ensemble").ensemble_scheduling.step[1]
    assert step.input_map["return_kv_cache_reuse_stats"] == "return_perf_metrics"


@pytest.mark.parametrize("release", ["0.12.0", "0.17.0", "1.2.1"])
def test_our_models_are_the_files_that_the_cpu_engine_has(tmp_path: Path, release: str) -> None:
    """One client contract, and one set of files: only numbers in configurations differ."""
    package(make_engine(tmp_path / "cpu"), tmp_path / "cpu-repository")
    repository = packaged(tmp_path, release).path
    for model in OURS:
        ours, theirs = repository / model / "1", tmp_path / "cpu-repository" / model / "1"
        files = sorted(path.name for path in ours.glob("*.py"))
        assert files == sorted(path.name for path in theirs.glob("*.py"))
        assert filecmp.cmpfiles(ours, theirs, files, shallow=False)[0] == files
    doors = [config_text(folder / "tensorrt_llm_bls") for folder in (repository, tmp_path / "cpu-repository")]
    assert doors[0] == doors[1]


def config_text(folder: Path) -> str:
    """A model's tensors, without its parameters and batch size."""
    lines = (folder / "config.pbtxt").read_text().splitlines()
    return "\n".join(line for line in lines if not line.startswith(("parameters", "max_batch_size")))


def test_the_plans_numbers_are_explicit(tmp_path: Path) -> None:
    found = parameters(packaged(tmp_path, "1.2.1"))
    assert found["max_tokens_in_paged_kv_cache"] == "2048"
    assert found["enable_kv_cache_reuse"] == found["enable_chunked_context"] == "true"
    assert found["batch_scheduler_policy"] == "guaranteed_no_evict"
    assert found["kv_cache_free_gpu_mem_fraction"] == "0.9"
    assert found["exclude_input_in_output"] == "true"
    assert (found["max_beam_width"], found["gpu_device_ids"]) == ("1", "0")
    assert "max_attention_window_size" not in found


def test_what_the_plan_switches_off_is_off_in_words(tmp_path: Path) -> None:
    off = {"max_tokens_in_paged_kv_cache": 99, "enable_kv_cache_reuse": False, "enable_chunked_context": False}
    for release in ("0.12.0", "1.2.1"):
        found = parameters(packaged(tmp_path / release, release, runtime=off))
        assert found["enable_kv_cache_reuse"] == found["enable_chunked_context"] == "false"


def test_a_window_and_sinks_are_written_and_turn_reuse_off(tmp_path: Path) -> None:
    runtime = {
        "max_tokens_in_paged_kv_cache": 99,
        "enable_kv_cache_reuse": True,
        "enable_chunked_context": True,
        "max_attention_window_size": 1024,
        "sink_token_length": 4,
    }
    found = parameters(packaged(tmp_path, "0.17.0", runtime=runtime))
    assert (found["max_attention_window_size"], found["sink_token_length"]) == ("1024", "4")
    assert found["enable_kv_cache_reuse"] == "false"


def test_ranks_get_a_gpu_each(tmp_path: Path) -> None:
    repository = packaged(tmp_path, "0.21.0", tp=2, pp=2)
    assert parameters(repository)["gpu_device_ids"] == "0,1,2,3"
    assert repository.gpus == 4
    ranks = sorted(path.name for path in (repository.path / "tensorrt_llm/1/engine").glob("rank*.engine"))
    assert ranks == [f"rank{rank}.engine" for rank in range(4)]


def test_the_engines_path_is_relative_so_that_the_repository_can_be_moved(tmp_path: Path) -> None:
    repository = packaged(tmp_path, "1.2.1")
    path = parameters(repository)["gpt_model_path"]
    assert not Path(path).is_absolute()
    moved = repository.path.rename(tmp_path / "elsewhere")
    assert (moved / path / "config.json").is_file()
    assert str(tmp_path) not in "".join(file.read_text() for file in moved.glob("*/config.pbtxt"))
    assert (moved / path / "rank0.engine").samefile(tmp_path / "engine" / "rank0.engine")


def test_logits_have_the_engines_type(tmp_path: Path) -> None:
    config_16 = config_json("0.17.0")
    config_16["pretrained_config"]["logits_dtype"] = "float16"
    repository = packaged(tmp_path / "new", "0.17.0", config=config_16)
    for model in ("ensemble", "tensorrt_llm", "tensorrt_llm_bls"):
        types = {tensor.name: tensor.data_type for tensor in config(repository, model).output}
        assert types["context_logits"] == types["generation_logits"] == model_config_pb2.TYPE_FP16
    config_16["version"] = "0.16.0"
    with pytest.raises(ArtifactError, match=r"logits_dtype float16, and Triton's backend .* 0\.16\.0 gives FP32 only"):
        packaged(tmp_path / "old", "0.16.0", config=config_16)


def test_an_engine_of_another_release_or_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"version is 0\.19\.0, the passport says 0\.17\.0"):
        packaged(tmp_path, "0.17.0", config=config_json("0.19.0"))
    assert not (tmp_path / "repository").exists()
    with pytest.raises(ArtifactError, match="its passport names no TensorRT-LLM release"):
        packaged(tmp_path / "b", "0.17.0", named=False)


def test_the_repository_says_how_it_is_served(tmp_path: Path) -> None:
    repository = packaged(tmp_path, "0.17.0", services=3, tp=2)
    assert repository.services == 3
    assert repository.image == "nvcr.io/nvidia/tritonserver:25.02-trtllm-python-py3"
    assert json.loads((repository.path / "repository.json").read_text())["backend"] == "tensorrt_engine"


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_guides_reach_nvidias_backend_by_the_file_that_it_reads(tmp_path: Path, tokenizer_folder: Path) -> None:
    runtime = {"guided_decoding": "xgrammar"}
    repository = packaged(tmp_path, "1.2.1", tokenizer=tokenizer_folder, runtime=runtime, eos_token_ids=(1,))
    told = parameters(repository)
    assert told["guided_decoding_backend"] == "xgrammar"
    info = json.loads((repository.path / told["xgrammar_tokenizer_info_path"]).read_text())
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    assert info["encoded_vocab"] == [tokenizer.id_to_token(place) for place in range(tokenizer.get_vocab_size())]
    assert info["stop_token_ids"] == [1]
    assert parameters(packaged(tmp_path / "without", "1.2.1"))["guided_decoding_backend"] == ""


def test_adapters_are_read_from_the_engines_folder(tmp_path: Path) -> None:
    told = parameters(packaged(tmp_path, "1.2.1", runtime={"lora": ["a", "b"]}))
    assert told["lora_prefetch_dir"] == f"{told['gpt_model_path']}/lora"
    assert "lora_prefetch_dir" not in parameters(packaged(tmp_path / "without", "1.2.1"))
