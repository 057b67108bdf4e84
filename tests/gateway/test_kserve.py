"""KServe's doors of a gateway: whoever asks the gateway and the Triton behind it the same gets the same."""

from __future__ import annotations

import http.client
import json
import queue
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from tests.conftest import unused_ports
from tests.e2e.served import Served, ServerError, inputs, until_final
from tests.e2e.test_triton_models import CAPITAL, JAPAN
from tests.gateway.behind_gateway import Gateway, gateway, settings_for
from tests.gateway.test_doors import COUNT, until_ready
from toolchain.endpoint import Endpoint
from toolchain.gateway import keys
from toolchain.measuring.conformance_doors import Kserve
from toolchain.stages.conformance import conformance

BLS = "tensorrt_llm_bls"
COUNTS = {"return_num_input_tokens": True, "return_num_output_tokens": True}
ALIKE: list[dict[str, Any]] = [
    {"text_input": CAPITAL, "max_tokens": 12},
    {"text_input": JAPAN, "max_tokens": 40, **COUNTS},
    {"text_input": CAPITAL, "max_tokens": 9, "return_log_probs": True, **COUNTS},
    {"text_input": COUNT, "max_tokens": 40, "stop_words": [" seven"], **COUNTS},
    {
        "text_input": COUNT,
        "max_tokens": 12,
        "temperature": 1.5,
        "top_p": 0.9,
        "seed": 11,
        "return_num_output_tokens": True,
    },
    {"text_input": COUNT, "max_tokens": 1, "exclude_input_in_output": False},
    {"text_input": CAPITAL, "max_tokens": 5, "num_return_sequences": 2, **COUNTS},
    {"text_input": CAPITAL, "max_tokens": 0},
    {"text_input": "", "max_tokens": 3},
    {"text_input": "x " * 6000, "max_tokens": 5},
    {"text_input": CAPITAL, "max_tokens": 5, "presence_penalty": 1.0},
]


def config_of(served: Served) -> Path:
    return served.status_file.parent / "repository" / BLS / "config.pbtxt"


@pytest.fixture(scope="module")
def door(served: Served, parrot: Path) -> Iterator[Gateway]:
    settings = replace(settings_for(parrot, served.http_port), kserve=config_of(served))
    with gateway(settings, grpc_port=unused_ports(1)[0]) as found:
        until_ready(found)
        yield found


@pytest.fixture(scope="module")
def behind(door: Gateway, served: Served) -> Served:
    """The gateway, asked as a Triton is."""
    assert door.listen.grpc_port is not None
    return Served(door.listen.port, door.listen.grpc_port, served.status_file)


def whole(server: Served, request: dict[str, Any]) -> Any:
    try:
        answer = server.generate(BLS, **request)
        return answer.get("error", answer)  # Triton says it with status 200 where it is one answer too many
    except ServerError as error:
        return plain(error)


def streamed(server: Served, request: dict[str, Any]) -> Any:
    """What the events are, put together."""
    try:
        with server.streaming(BLS, **request) as events:
            return joined(list(events))
    except ServerError as error:
        return plain(error)


def joined(events: list[dict[str, Any]]) -> Any:
    """How many tokens come at once is chance: texts and lists are put together, by sequence; of all else the last."""
    found: dict[int, dict[str, Any]] = {}
    for event in events:
        sequence = found.setdefault(event.get("sequence_index", 0), {"text_output": "", "ids": [], "logs": []})
        text, ids, logs = (event.pop(name, []) for name in ("text_output", "output_ids", "output_log_probs"))
        sequence["text_output"] += text
        sequence["ids"] += ids if isinstance(ids, list) else [ids]
        sequence["logs"] += logs if isinstance(logs, list) else [logs]
        sequence |= event
    return found


def over_grpc(server: Served, request: dict[str, Any]) -> Any:
    try:
        results = server.grpc(BLS, "seven", **request)
    except ServerError as error:
        return plain(error)
    responses = [result.get_response() for result in results]
    shapes = [{one.name: (one.datatype, len(one.shape)) for one in response.outputs} for response in responses]
    heads = {(response.id, response.model_name, response.model_version) for response in responses}
    events = [
        {one.name: bare(result.as_numpy(one.name)) for one in result.get_response().outputs} for result in results
    ]
    return shapes[-1], heads, joined(events)


def bare(array: np.ndarray[Any, Any]) -> Any:
    values = [one.decode() if isinstance(one, bytes) else one for one in array.reshape(-1).tolist()]
    return values[0] if len(values) == 1 else values


def plain(error: ServerError) -> str:
    """Without Triton's preamble and traceback."""
    return str(error).split("message: ")[-1].split("\n")[0]


@pytest.mark.parametrize("request_", ALIKE)
@pytest.mark.parametrize("ask", [whole, streamed, over_grpc])
def test_the_gateway_answers_as_the_triton_behind_it(
    served: Served, behind: Served, request_: dict[str, Any], ask: Any
) -> None:
    expected, found = ask(served, request_), ask(behind, request_)
    if isinstance(expected, str):
        status, _, message = expected.partition(" ") if expected[:3].isdigit() else ("", "", expected)
        assert str(found).endswith(message.removeprefix(f"{status} "))
    else:
        assert found == expected


def test_streaming_over_grpc_is_as_over_triton(served: Served, behind: Served) -> None:
    for request in ALIKE[:7]:
        asked = {**request, "stream": True}
        assert over_grpc(behind, asked) == over_grpc(served, asked)


def test_tritonclient_learns_the_same_of_the_model(served: Served, behind: Served) -> None:
    (one, two) = (
        httpclient.InferenceServerClient(f"127.0.0.1:{port}") for port in (served.http_port, behind.http_port)
    )
    assert two.is_server_live()
    assert two.is_server_ready()
    assert two.is_model_ready(BLS)
    assert not two.is_model_ready("nobody")
    assert two.get_model_metadata(BLS) == one.get_model_metadata(BLS)
    told, expected = two.get_model_config(BLS), one.get_model_config(BLS)
    for key in ("name", "backend", "max_batch_size", "input", "output", "model_transaction_policy"):
        assert told[key] == expected[key]
    assert {"name": BLS, "version": "1", "state": "READY"} in two.get_model_repository_index()
    assert set(two.get_server_metadata()) == {"name", "version", "extensions"}


def test_tritonclient_learns_the_same_over_grpc(served: Served, behind: Served) -> None:
    (one, two) = (
        grpcclient.InferenceServerClient(f"127.0.0.1:{port}") for port in (served.grpc_port, behind.grpc_port)
    )
    assert two.is_server_live()
    assert two.is_server_ready()
    assert two.is_model_ready(BLS)
    assert two.get_model_metadata(BLS) == one.get_model_metadata(BLS)
    told, expected = two.get_model_config(BLS).config, one.get_model_config(BLS).config
    assert list(told.input) == list(expected.input)
    assert list(told.output) == list(expected.output)
    assert told.model_transaction_policy == expected.model_transaction_policy
    for client in (one, two):
        with pytest.raises(InferenceServerException, match="decoupled transaction policy") as refused:
            client.infer(BLS, inputs({"text_input": "a", "max_tokens": 1}))
        assert refused.value.status() == "StatusCode.UNIMPLEMENTED"
        with pytest.raises(InferenceServerException, match="unknown model") as refused:
            client.get_model_metadata("nobody")
        assert refused.value.status() == "StatusCode.NOT_FOUND"
    with pytest.raises(InferenceServerException) as refused:
        two.get_system_shared_memory_status()
    assert refused.value.status() == "StatusCode.UNIMPLEMENTED"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"text_input": 5, "max_tokens": 3}, "as string"),
    ({"text_input": "a", "max_tokens": "three"}, "attempt to access JSON non-"),
    ({"text_input": "a", "max_tokens": 3, "stream": "yes"}, "attempt to access JSON non-boolean as boolean"),
    ({"text_input": "a"}, "expected number of inputs between 2 and"),
    ({"text_input": "a", "max_tokens": 3, "colour": []}, "parameter 'colour' has invalid type"),
    ({"text_input": ["a", "b"], "max_tokens": [3, 3]}, ""),
]


@pytest.mark.parametrize(("request_", "said"), WRONG)
def test_what_triton_refuses_is_refused(served: Served, behind: Served, request_: dict[str, Any], said: str) -> None:
    for server in (served, behind):
        with pytest.raises(ServerError) as refused:
            server.generate(BLS, **request_)
        assert said in str(refused.value)
        assert str(refused.value)[:3] in ("400", "500")


def test_what_is_no_input_is_a_parameter_that_changes_nothing(served: Served, behind: Served) -> None:
    asked = {"text_input": CAPITAL, "max_tokens": 5, "id": "mine", "colour": "red", "parameters": {"size": 3}}
    assert behind.generate(BLS, **asked) == served.generate(BLS, **asked)
    nested = {"text_input": CAPITAL, "parameters": {"max_tokens": 5}}
    assert behind.generate(BLS, **nested) == served.generate(BLS, **nested)


@pytest.mark.parametrize(
    "change",
    [
        {"datatype": "INT64", "raw": np.array([[3]], dtype=np.int64).tobytes()},
        {"shape": [1]},
        {"name": "colour"},
        {"raw": b"\x01"},
    ],
)
def test_tensors_that_do_not_fit_are_refused_in_the_stream_which_goes_on(
    served: Served, behind: Served, change: dict[str, Any]
) -> None:
    for server in (served, behind):
        with server.grpc_stream() as (client, answers):
            client._stream._request_queue.put(tampered(change))
            refusal = answers.get(timeout=60)
            assert isinstance(refusal, InferenceServerException), (server, refusal)
            client.async_stream_infer(
                BLS, inputs({"text_input": "a", "max_tokens": 2}), enable_empty_final_response=True
            )
            assert list(until_final(answers))


def tampered(change: dict[str, Any]) -> Any:
    tensor = {"name": "max_tokens", "datatype": "INT32", "shape": [1, 1], **change}
    raw = tensor.pop("raw", np.array([[3]], dtype=np.int32).tobytes())
    text = service_pb2.ModelInferRequest.InferInputTensor(name="text_input", datatype="BYTES", shape=[1, 1])
    request = service_pb2.ModelInferRequest(model_name=BLS, id="mine", inputs=[text])
    request.inputs.add(**tensor)
    request.raw_input_contents.extend([b"\x01\x00\x00\x00a", raw])
    return request


def test_requests_on_one_stream_are_answered_side_by_side(served: Served, behind: Served) -> None:
    asked = [{"text_input": text, "max_tokens": 30, "stream": True} for text in (CAPITAL, COUNT, JAPAN)]
    found: dict[str, str] = {}
    with behind.grpc_stream() as (client, answers):
        for number, request in enumerate(asked):
            client.async_stream_infer(BLS, inputs(request), request_id=str(number), enable_empty_final_response=True)
        client.async_stream_infer(BLS, inputs({"text_input": "a", "max_tokens": 0}), request_id="bad")
        failures, ended = [], 0
        while ended < len(asked) or not failures:
            result = answers.get(timeout=60)
            if isinstance(result, Exception):
                failures.append(str(result))
                continue
            response = result.get_response()
            ended += response.parameters["triton_final_response"].bool_param
            if response.outputs:
                text = result.as_numpy("text_output")[0].decode()
                found[response.id] = found.get(response.id, "") + text
    assert [found[str(number)] for number in range(3)] == ["".join(served.pieces(BLS, **request)) for request in asked]
    assert len(failures) == 1
    assert "max_tokens" in failures[0]


@pytest.mark.parametrize("way", ["http", "grpc"])
def test_a_client_that_goes_frees_the_engine(served: Served, behind: Served, door: Gateway, way: str) -> None:
    cancelled = served.idle()["cancelled"]
    asked = {"text_input": COUNT, "max_tokens": 5000, "min_tokens": 5000, "stream": True}
    if way == "http":
        with behind.streaming(BLS, **asked) as events:
            next(events)
    else:
        with behind.grpc_stream() as (client, answers):
            client.async_stream_infer(BLS, inputs(asked))
            answers.get(timeout=60)
    assert served.idle()["cancelled"] == cancelled + 1
    line = door.log[-1]
    assert (line["route"], line["ended"]) == ("kserve" if way == "http" else "kserve_grpc", "client gone")


def test_conformance_holds_at_the_gateways_kserve_doors(served: Served, behind: Served) -> None:
    doors = [
        Kserve(Endpoint(f"http://127.0.0.1:{behind.http_port}", ""), "http"),
        Kserve(Endpoint("", f"127.0.0.1:{behind.grpc_port}"), "grpc"),
    ]
    found = list(conformance(doors))
    assert found
    assert [one for one in found if not one.passed] == []


def test_keys_and_their_limits_hold_at_these_doors_too(served: Served, parrot: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    secret, slow = keys.add(file, "alice"), keys.add(file, "bob", requests_per_minute=1)
    settings = replace(settings_for(parrot, served.http_port), kserve=config_of(served), keys=file)
    port = unused_ports(1)[0]
    with gateway(settings, grpc_port=port) as found:
        until_ready(found)
        http_at, asked = found.listen.port, {"text_input": "a", "max_tokens": 2}
        assert post(http_at, asked, "wrong")[0] == 401
        assert post(http_at, asked, secret)[0] == 200
        assert [post(http_at, asked, slow)[0] for _ in range(2)] == [200, 429]
        for key, status in (("wrong", "UNAUTHENTICATED"), ("", "UNAUTHENTICATED")):
            with pytest.raises(InferenceServerException) as refused:
                grpcclient.InferenceServerClient(f"127.0.0.1:{port}").get_model_config(BLS, headers=bearer(key))
            assert refused.value.status() == f"StatusCode.{status}"
        assert streams(port, "wrong") == "[StatusCode.UNAUTHENTICATED] this API key is not known here"
        assert "requests a minute" in streams(port, slow)
        assert streams(port, secret) == ""
        assert [line["key"] for line in found.log if line["route"].startswith("kserve") and "key" in line][-2:] == [
            "bob",
            "alice",
        ]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}


def post(port: int, body: dict[str, Any], key: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", f"/v2/models/{BLS}/generate", json.dumps(body), bearer(key))
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def streams(port: int, key: str) -> str:
    """One request over gRPC: the error, or nothing."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    client = grpcclient.InferenceServerClient(f"127.0.0.1:{port}")
    client.start_stream(callback=lambda result, error: answers.put(error or result), headers=bearer(key))
    try:
        asked = inputs({"text_input": "a", "max_tokens": 2})
        client.async_stream_infer(BLS, asked, enable_empty_final_response=True)
        list(until_final(answers))
    except (ServerError, InferenceServerException) as error:  # the latter: the stream had ended before it was asked
        return str(error) if isinstance(error, ServerError) else str(answers.get(timeout=60))
    finally:
        client.stop_stream()
    return ""
