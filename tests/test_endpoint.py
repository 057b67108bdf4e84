"""The client side, against a real Triton: HTTP and gRPC, streamed and whole, refusals, cancellation, timeouts."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.servers.generator_repository import wait_for, write_repository
from toolchain.endpoint import Endpoint, Timeouts
from toolchain.errors import EndpointError, RejectedError, ScalellmError
from toolchain.progress import Silent
from toolchain.servers.triton.ports import free_ports
from toolchain.servers.triton.supervisor import ServingInfo
from toolchain.stages.serve import background

protocols = pytest.mark.parametrize("protocol", ["http", "grpc"])


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServingInfo]:
    folder = tmp_path_factory.mktemp("endpoint")
    repository = write_repository(folder / "repository")
    write_repository(repository, name="batched", max_batch_size=8)
    with background(repository, ports=free_ports(), progress=Silent(), exit_timeout_s=2) as info:
        yield info


@pytest.fixture
def endpoint(serving: ServingInfo) -> Endpoint:
    return Endpoint(serving.http_url, serving.grpc_url, timeouts=Timeouts(total_s=30))


@protocols
def test_a_stream_gives_one_chunk_a_token_and_one_final(endpoint: Endpoint, protocol: str) -> None:
    before = time.perf_counter()
    chunks = list(endpoint.generate("count", max_tokens=5, protocol=protocol))
    assert [chunk.text for chunk in chunks] == [" t0", " t1", " t2", " t3", " t4", ""]
    assert [chunk.final for chunk in chunks] == [False] * 5 + [True]
    times = [before, chunks[0].sent_at_s, *(chunk.received_at_s for chunk in chunks), time.perf_counter()]
    assert times == sorted(times)


@protocols
def test_streamed_tokens_arrive_while_the_model_still_works(endpoint: Endpoint, protocol: str) -> None:
    chunks = list(endpoint.generate("slowly", max_tokens=20, protocol=protocol))
    assert chunks[-1].received_at_s - chunks[0].received_at_s > 0.5 * 20 * 0.02  # the model pauses 0.02 s a token


@protocols
def test_without_streaming_the_whole_text_comes_at_once(endpoint: Endpoint, protocol: str) -> None:
    chunks = list(endpoint.generate("count", max_tokens=3, protocol=protocol, stream=False))
    assert "".join(chunk.text for chunk in chunks) == " t0 t1 t2"
    assert sum(bool(chunk.text) for chunk in chunks) == 1
    assert chunks[-1].final


@protocols
@pytest.mark.parametrize("model", ["tensorrt_llm_bls", "batched"])
def test_every_input_arrives_with_its_value(endpoint: Endpoint, protocol: str, model: str) -> None:
    sampling = {"temperature": 0.5, "top_k": 7, "seed": 2**64 - 1, "stop_words": ["\n\n", "Stop, ünd"], "top_p": None}
    chunks = list(replace(endpoint, model=model).generate("echo ü", max_tokens=4, protocol=protocol, **sampling))
    expected = {"text_input": ["echo ü"], "max_tokens": [4], "stream": [True], "temperature": [0.5], "top_k": [7]}
    got = json.loads(chunks[0].text)
    assert got == expected | {"seed": [2**64 - 1], "stop_words": ["\n\n", "Stop, ünd"]}


@protocols
def test_other_outputs_come_along(endpoint: Endpoint, protocol: str) -> None:
    chunks = list(endpoint.generate("count", max_tokens=3, protocol=protocol))
    assert [chunk.outputs.get("num_output_tokens") for chunk in chunks] == [1, 2, 3, None]


@protocols
@pytest.mark.parametrize("stream", [True, False])
def test_a_refusal_carries_the_models_words_without_a_traceback(
    endpoint: Endpoint, protocol: str, stream: bool
) -> None:
    with pytest.raises(RejectedError) as caught:
        list(endpoint.generate("fail temperature must not be negative", max_tokens=3, protocol=protocol, stream=stream))
    assert caught.value.message == "temperature must not be negative"


@protocols
def test_an_exception_in_a_model_comes_without_file_paths(endpoint: Endpoint, protocol: str) -> None:
    with pytest.raises(ScalellmError) as caught:
        list(endpoint.generate("explode", max_tokens=3, protocol=protocol))
    assert caught.value.message == "RuntimeError: the engine is gone"


@protocols
def test_an_input_that_the_model_lacks_is_refused_rather_than_ignored(endpoint: Endpoint, protocol: str) -> None:
    with pytest.raises(RejectedError, match="return_log_probs"):
        list(endpoint.generate("count", max_tokens=3, protocol=protocol, return_log_probs=True))


def test_an_unknown_parameter_is_refused_with_the_one_that_was_meant(endpoint: Endpoint) -> None:
    with pytest.raises(RejectedError, match="temperature_") as caught:
        endpoint.generate("count", max_tokens=3, temperature_=1.0)
    assert caught.value.hint == "did you mean temperature?"


def test_a_value_of_the_wrong_type_names_the_parameter(endpoint: Endpoint) -> None:
    with pytest.raises(RejectedError, match="top_k must be INT32"):
        list(endpoint.generate("count", max_tokens=3, protocol="grpc", top_k="many"))


@protocols
def test_an_unknown_model_is_named(endpoint: Endpoint, protocol: str) -> None:
    with pytest.raises(EndpointError, match="nonesuch"):
        list(replace(endpoint, model="nonesuch").generate("count", max_tokens=3, protocol=protocol))


@protocols
def test_no_server_says_so_and_what_to_type(protocol: str) -> None:
    ports = free_ports()
    nobody = Endpoint(f"http://127.0.0.1:{ports.http}", f"127.0.0.1:{ports.grpc}")
    with pytest.raises(EndpointError, match="no server answers at") as caught:
        list(nobody.generate("count", max_tokens=3, protocol=protocol))
    assert caught.value.hint == "make serve"
    assert not nobody.ready()


@protocols
def test_a_proxy_in_the_environment_does_not_catch_loopback(
    endpoint: Endpoint, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_ports().http}")
    monkeypatch.delenv("no_proxy", raising=False)
    assert len(list(endpoint.generate("count", max_tokens=2, protocol=protocol))) == 3


@protocols
def test_closing_the_iterator_cancels_the_request(endpoint: Endpoint, protocol: str, tmp_path: Path) -> None:
    witness = tmp_path / "cancelled"
    stream = endpoint.generate(f"cancel {witness}", max_tokens=10_000, protocol=protocol)
    assert next(stream).text == " t0"
    stream.close()
    wait_for(witness.exists)


@protocols
def test_silence_between_chunks_ends_in_an_error(endpoint: Endpoint, protocol: str) -> None:
    impatient = replace(endpoint, timeouts=Timeouts(between_chunks_s=0.3))
    with pytest.raises(EndpointError, match=r"nothing came from the server for 0\.3 s"):
        list(impatient.generate("stall", max_tokens=3, protocol=protocol))


@protocols
def test_the_whole_may_not_take_longer_than_the_total(endpoint: Endpoint, protocol: str) -> None:
    with pytest.raises(EndpointError, match=r"longer than 0\.4 s"):
        list(endpoint.generate("slowly", max_tokens=10_000, protocol=protocol, timeout_s=0.4))


def test_ready_asks_for_server_and_model(endpoint: Endpoint) -> None:
    assert endpoint.ready()
    assert not replace(endpoint, model="nonesuch").ready()


def test_the_sample_command_that_serve_shows_works(serving: ServingInfo) -> None:
    shown = subprocess.run(["bash", "-c", serving.sample], capture_output=True, text=True, timeout=30, check=True)
    assert '"text_output":" t31"' in shown.stdout
