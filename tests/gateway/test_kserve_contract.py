"""Requests as KServe's clients write them, without a server: what is taken, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from toolchain.errors import ArtifactError
from toolchain.gateway.failures import ApiError
from toolchain.gateway.kserve_contract import Contract
from toolchain.workspace import shipped

BLS = "tensorrt_llm_bls"


@pytest.fixture(scope="module")
def contract(tmp_path_factory: pytest.TempPathFactory) -> Contract:
    file = tmp_path_factory.mktemp("model") / "config.pbtxt"
    text = (shipped("model_repo_templates") / "common" / BLS / "config.pbtxt").read_text()
    file.write_text(text.replace("${triton_max_batch_size}", "8").replace("${logits_datatype}", "TYPE_FP32"))
    return Contract.read(file)


def tensors(**more: Any) -> Any:
    """The text "a", in fields of their types instead of raw bytes."""
    request = service_pb2.ModelInferRequest(model_name=BLS, **more)
    for name, datatype, field, value in (
        ("text_input", "BYTES", "bytes_contents", b"a"),
        ("max_tokens", "INT32", "int_contents", 3),
        ("top_p", "FP32", "fp32_contents", 0.5),
        ("seed", "UINT64", "uint64_contents", 2**63),
        ("stream", "BOOL", "bool_contents", True),
    ):
        tensor = request.inputs.add(name=name, datatype=datatype, shape=[1, 1])
        getattr(tensor.contents, field).append(value)
    return request


def test_tensors_may_be_in_the_fields_of_their_types(contract: Contract) -> None:
    wanted = contract.of_tensors(tensors(id="mine"))
    assert (wanted.id, wanted.streaming, wanted.answers, wanted.empty_final) == ("mine", True, 1, False)
    assert dict(wanted.inputs) == {
        "text_input": ["a"], "max_tokens": [3], "top_p": [0.5], "seed": [2**63], "stream": [True]
    }  # fmt: skip


def test_a_whole_number_is_a_number_and_the_largest_seed_is_one(contract: Contract) -> None:
    wanted = contract.of_json({"text_input": "a", "max_tokens": 3, "top_p": 1, "seed": 2**64 - 1, "stop_words": []})
    assert (wanted.inputs["top_p"], wanted.inputs["seed"], wanted.inputs["stop_words"]) == ([1], [2**64 - 1], [])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"max_tokens": 3_000_000_000}, "'max_tokens': 3000000000 is no INT32"),
        ({"seed": -1}, "'seed': -1 is no UINT64"),
        ({"max_tokens": 2.5}, "'max_tokens'"),
        ({"max_tokens": True}, "'max_tokens'"),
        ({"max_tokens": [1, 2]}, "max_tokens: 2 values, expected one"),
        ({"top_p": "much"}, "'top_p'"),
        ({"stream": 1}, "'stream'"),
        ({"stop_words": [1]}, "'stop_words'"),
        ({"parameters": [1]}, "'parameters'"),
        ({"colour": {}}, "parameter 'colour' has invalid type"),
        ({"text_input": None}, "'text_input'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(contract: Contract, body: dict[str, Any], said: str) -> None:
    with pytest.raises(ApiError) as refused:
        contract.of_json({"text_input": "a", "max_tokens": 3, **body})
    assert said in refused.value.message
    assert refused.value.status == 400


def test_a_client_gets_what_it_asked_for_and_no_more(contract: Contract) -> None:
    event = {"text_output": "b", "num_input_tokens": 1, "num_output_tokens": 2, "finish_reason": "stop", "rest": 1}
    plain = contract.of_tensors(tensors())
    assert plain.asked["return_num_output_tokens"] is True
    assert plain.outputs_of(event) == {"text_output": "b"}
    assert plain.outputs_of({**event, "text_output": ""}) == {}, "a stream ends without a response of its own"
    counting = contract.of_json({"text_input": "a", "max_tokens": 1, "return_num_output_tokens": True})
    assert counting.outputs_of(event) == {"text_output": "b", "num_output_tokens": 2, "finish_reason": "stop"}
    request = tensors()
    request.outputs.add(name="finish_reason")
    assert contract.of_tensors(request).outputs == {"finish_reason"}


def test_answers_are_tensors_of_the_shapes_that_the_model_gives(contract: Contract) -> None:
    wanted = contract.of_tensors(tensors(id="mine"))
    outputs = {"text_output": "日本", "output_log_probs": [-0.5, -1.0], "num_output_tokens": 2, "output_ids": [7, 8]}
    answer = contract.tensors_of(wanted, outputs).infer_response
    assert (answer.id, answer.model_name, answer.model_version) == ("mine", BLS, "1")
    assert not answer.parameters["triton_final_response"].bool_param
    assert [(one.name, one.datatype, list(one.shape)) for one in answer.outputs] == [
        ("text_output", "BYTES", [1]),
        ("output_log_probs", "FP32", [1, 1, 2]),
        ("num_output_tokens", "INT32", [1, 1]),
        ("output_ids", "INT32", [1, 1, 2]),
    ]
    assert answer.raw_output_contents[0][4:].decode() == "日本"
    assert np.frombuffer(answer.raw_output_contents[1], np.float32).tolist() == [-0.5, -1.0]
    end = contract.tensors_of(wanted, {}).infer_response
    assert end.parameters["triton_final_response"].bool_param
    assert not end.outputs


def test_another_model_or_version_is_not_found(contract: Contract) -> None:
    contract.check(BLS, "")
    contract.check(BLS, "1")
    for name, version in (("ensemble", ""), (BLS, "2")):
        with pytest.raises(ApiError, match="unknown model") as refused:
            contract.check(name, version)
        assert refused.value.status == 404


def test_a_file_that_is_no_model_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.pbtxt").write_text("name: ")
    for file in ("config.pbtxt", "nothing"):
        with pytest.raises(ArtifactError, match=f"{file}: not a model configuration"):
            Contract.read(tmp_path / file)
