"""NVIDIA's model ``tensorrt_llm`` by release: the config.pbtxt that we write is the one that each release has."""

from __future__ import annotations

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from tests import triton_contract
from toolchain import workspace
from toolchain.errors import ArtifactError
from toolchain.release import releases
from toolchain.triton_model import config, triton_model

RELEASES = ("0.12.0", "0.13.0", "0.16.0", "0.17.0", "0.18.2", "0.19.0", "0.20.0", "0.21.0", "1.0.0", "1.1.0", "1.2.1")
PATH = {"gpt_model_path": "tensorrt_llm/1/engine"}


def written(release: str, logits: str = "FP16", **settings: str | int | float | bool) -> model_config_pb2.ModelConfig:
    text = config(triton_model(release), {**PATH, **settings}, max_batch_size=8, max_queue_size=32, logits=logits)
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def kind(tensor: model_config_pb2.ModelInput) -> str:
    return str(model_config_pb2.DataType.Name(tensor.data_type)).removeprefix("TYPE_")


@pytest.mark.parametrize("release", RELEASES)
def test_inputs_are_those_of_the_contract(release: str) -> None:
    expected = {
        name: ("FP16" if type_ == "*" else type_, dims, need == "opt")
        for name, (type_, dims, need) in triton_contract.inputs(release).items()
    }
    found = {tensor.name: (kind(tensor), tuple(tensor.dims), tensor.optional) for tensor in written(release).input}
    assert found == expected


@pytest.mark.parametrize("release", RELEASES)
def test_outputs_are_those_of_the_contract(release: str) -> None:
    expected = {
        name: ("FP16" if type_ == "*" else type_, dims)
        for name, (type_, dims, _) in triton_contract.outputs(release).items()
    }
    assert {tensor.name: (kind(tensor), tuple(tensor.dims)) for tensor in written(release).output} == expected


@pytest.mark.parametrize("release", RELEASES)
def test_the_configuration_is_the_fact_table_read_by_tritons_own_parser(release: str) -> None:
    parsed, model = written(release, logits="FP32", max_beam_width=1), triton_model(release)
    assert [tensor.name for tensor in parsed.input] == list(model.inputs)
    for tensor in parsed.input:
        fact = model.inputs[tensor.name]
        assert (tensor.optional, tensor.allow_ragged_batch) == (fact.optional, fact.ragged), tensor.name
        assert tensor.HasField("reshape") == fact.scalar, tensor.name
        assert kind(tensor) == ("FP32" if fact.type == "logits" else fact.type), tensor.name
    assert [tensor.name for tensor in parsed.output] == list(model.outputs)
    assert (parsed.name, parsed.backend, parsed.max_batch_size) == ("tensorrt_llm", "tensorrtllm", 8)
    assert parsed.model_transaction_policy.decoupled
    assert parsed.dynamic_batching.preferred_batch_size == [8]
    assert parsed.dynamic_batching.default_queue_policy.max_queue_size == 32
    assert [(group.count, group.kind) for group in parsed.instance_group] == [(1, parsed.instance_group[0].KIND_CPU)]


@pytest.mark.parametrize("release", [release.version for release in releases().values() if release.engine])
def test_every_release_gets_the_keys_that_its_backend_reads_without_a_guard(release: str) -> None:
    parameters = {name: value.string_value for name, value in written(release).parameters.items()}
    assert parameters["gpt_model_type"] == "inflight_fused_batching"
    assert parameters["gpt_model_path"] == "tensorrt_llm/1/engine"
    guarded = {"tokenizer_dir", "guided_decoding_backend", "xgrammar_tokenizer_info_path"}
    version = tuple(int(part) for part in release.split("."))
    assert guarded & set(parameters) == (guarded if version >= (0, 19) else set())
    assert all(parameters[name] == "" for name in guarded & set(parameters))
    assert "cross_kv_cache_fraction" not in parameters
    assert not any("${" in value for value in parameters.values())


def test_a_newest_name_is_found_under_the_name_of_each_release() -> None:
    assert [triton_model(v).input_named("min_tokens") for v in ("0.12.0", "0.19.0", "0.20.0")] == [
        "min_length",
        "min_length",
        "min_tokens",
    ]
    assert triton_model("0.18.2").input_named("seed") == "random_seed"
    metrics = [triton_model(v).input_named("return_perf_metrics") for v in ("0.15.0", "0.16.0", "0.18.2", "0.19.0")]
    assert metrics == [None, "return_kv_cache_reuse_stats", "return_kv_cache_reuse_stats", "return_perf_metrics"]
    assert triton_model("0.12.0").input_named("temperature") == "temperature"


def test_kv_reuse_is_off_by_itself_before_0_19_and_on_after() -> None:
    defaults = [triton_model(v).parameters["enable_kv_cache_reuse"].default for v in ("0.18.2", "0.19.0")]
    assert defaults == [False, True]


def test_what_would_be_ignored_or_fatal_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"TensorRT-LLM 0\.12\.0 has no parameter num_nodez"):
        written("0.12.0", num_nodez=1)
    with pytest.raises(ArtifactError, match=r"cross_kv_cache_fraction is never set: .*decoder-only"):
        written("0.17.0", cross_kv_cache_fraction=0.5)
    with pytest.raises(ArtifactError, match="has no parameter cross_kv_cache_fraction"):
        written("0.12.0", cross_kv_cache_fraction=0.5)
    with pytest.raises(ArtifactError, match="needs the parameter gpt_model_path"):
        config(triton_model("1.2.1"), {}, max_batch_size=1, max_queue_size=0, logits="FP32")
    with pytest.raises(ArtifactError, match="takes one number, not one a layer"):
        written("0.12.0", max_attention_window_size="1024,2048")
    assert written("0.13.0", max_attention_window_size="1024,2048").parameters["max_attention_window_size"]


def test_a_value_cannot_break_out_of_its_quotes() -> None:
    parameters = written("1.2.1", gpt_model_path='a"b\\c').parameters
    assert parameters["gpt_model_path"].string_value == 'a"b\\c'


def test_facts_are_about_releases_of_the_table_only() -> None:
    table, known = workspace.facts("triton_models"), set(releases())
    rows = [*table["inputs"], *table["outputs"], *table["parameters"].values()]
    spans = [span for row in rows for span in (row, *row.get("spans", ()))]
    spans += [span for spans in table["renamed"].values() for span in spans]
    assert {span[key] for span in spans for key in ("from", "to") if key in span} <= known
    assert table["source"]
    assert table["date"]
