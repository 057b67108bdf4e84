"""The repository of a llmapi engine in the real Triton, with a stand-in for TensorRT-LLM beside the model.

Everything but ``import tensorrt_llm`` is what a GPU's server runs: Triton, its Python backend, every model and file of
the packaged repository. What the stand-in answers, refuses and writes down: tests/backends/stand_in.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.e2e.served import Served, ServerError, inputs, until_final
from toolchain import workspace
from toolchain.engine import Engine
from toolchain.errors import EndpointError
from toolchain.pipeline import Job
from toolchain.progress import Silent
from toolchain.recipe import parse_recipe
from toolchain.servers.triton.locate import find_server
from toolchain.servers.triton.ports import free_ports
from toolchain.servers.triton.probe import one_token
from toolchain.servers.triton.supervisor import Supervisor
from toolchain.stages.package import package

pytestmark = pytest.mark.timeout(180)
STAND_IN = Path(__file__).parents[1] / "backends" / "stand_in" / "tensorrt_llm"
DOORS = ("ensemble", "tensorrt_llm_bls")
RECIPE = (
    "model: some/folder\nbackend: tensorrt_llmapi\ndevice: a100\nquantization: {weights: int4, method: rtn}\n"
    "limits: {max_batch_size: 8, max_seq_len: 4096, max_input_len: 100}\n"
)
PROMPT = "tell me"
ENDLESS = {"max_tokens": 3900, "end_id": -1}
"""Eight seconds of the stand-in: for requests that are to be interrupted."""


@dataclass(frozen=True)
class Running(Served):
    """A server, and what happened to its stand-in."""

    calls_file: Path = Path()

    def calls(self, name: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.calls_file.read_text().splitlines()]
        return [call for call in found if call["call"] == name]

    def next_call(self, name: str, before: int, timeout_s: float = 20.0) -> dict[str, Any]:
        """The one of that name after the first ``before``, as soon as it has happened."""
        deadline = time.monotonic() + timeout_s
        while len(found := self.calls(name)) <= before:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert len(found) == before + 1
        return found[before]


@pytest.fixture(scope="module")
def engine(random_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Made as a user makes it; the model's weights do not matter here, its tokenizer does."""
    work = tmp_path_factory.mktemp("work")
    model = random_llama(max_position_embeddings=4096)
    job = Job(parse_recipe(RECIPE, Path("mine.yaml")), str(model), work, Silent())
    job.run("engine")
    return Engine.open(job.folder / "engine")


@contextmanager
def serving(engine: Engine, work: Path, change: Callable[[Path], None] = lambda _version: None) -> Iterator[Running]:
    """The engine's repository, with the stand-in where a model's own modules are; ``change`` gets that folder."""
    status = work / "status.json"
    with workspace.draft(work / "repository", "repository", {}) as draft:
        package(engine, draft.path, parameters={"status_file": str(status), "max_queue_size": 8})
        shutil.copytree(
            STAND_IN,
            draft.path / "tensorrt_llm" / "1" / "tensorrt_llm",
            ignore=shutil.ignore_patterns("__pycache__", "calls.jsonl"),
        )
        change(draft.path / "tensorrt_llm" / "1")
        draft.commit(versions={}, recipe="")
    server = find_server("bundled", environ=os.environ)
    ports = free_ports()
    supervisor = Supervisor(server, work / "repository", ports, log=work / "triton.log", exit_timeout_s=3)
    calls = work / "repository" / "tensorrt_llm" / "1" / "tensorrt_llm" / "calls.jsonl"
    try:
        supervisor.start()
        yield Running(ports.http, ports.grpc, status, ports.metrics, calls)
        supervisor.stop()
    finally:
        supervisor.kill()


@pytest.fixture(scope="module")
def served(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(engine, tmp_path_factory.mktemp("served")) as found:
        yield found


class Oracle:
    """The stand-in's answers, computed here from its own arithmetic and transformers' tokenizer."""

    def __init__(self, engine: Engine) -> None:
        spec = importlib.util.spec_from_file_location("oracle_of_llmapi", STAND_IN / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        self._module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = self._module
        spec.loader.exec_module(self._module)
        self._module.note = lambda _call: None
        self._llm = self._module.LLM(model=str(engine.path))
        self.tokenizer = AutoTokenizer.from_pretrained(engine.path)
        self.length = int(self._module.ANSWER)

    def ids(self, prompt: str, tokens: int, **sampling: Any) -> list[int]:
        """At most ``tokens`` ids, without the end id."""
        params = self._module.SamplingParams(end_id=-1, **({"top_k": 1} | sampling))
        encoded = self.tokenizer(prompt).input_ids
        return [self._llm.token(encoded, place, params) for place in range(min(tokens, self.length))]

    def endless(self, prompt: str) -> dict[str, object]:
        """The tensors of a request to ``tensorrt_llm`` that is to be interrupted."""
        ids = self.tokenizer(prompt).input_ids
        length, end_id = ENDLESS["max_tokens"], ENDLESS["end_id"]
        return {"input_ids": ids, "input_lengths": len(ids), "request_output_len": length, "end_id": end_id}

    def text(self, prompt: str, tokens: int, **sampling: Any) -> str:
        return str(self.tokenizer.decode(self.ids(prompt, tokens, **sampling)))


@pytest.fixture(scope="module")
def oracle(engine: Engine) -> Oracle:
    return Oracle(engine)


def test_the_runtime_is_told_the_plans_numbers_and_where_its_model_is(served: Running, engine: Engine) -> None:
    (call,) = served.calls("LLM")
    told = call["arguments"]
    assert told["model"].endswith("/tensorrt_llm/1/engine")
    assert told | {"model": "engine"} == engine.passport.runtime["llm"]
    assert "triton_config" not in told


@pytest.mark.parametrize("prompt", [PROMPT, "x", "another prompt"])
@pytest.mark.parametrize("model", DOORS)
def test_text_is_that_of_the_runtimes_tokens(served: Running, oracle: Oracle, model: str, prompt: str) -> None:
    answer = served.generate(model, text_input=prompt, max_tokens=60, return_num_output_tokens=True)
    assert answer["text_output"] == oracle.text(prompt, 60)
    assert answer["num_output_tokens"] == oracle.length, "the end id is not part of the answer"


@pytest.mark.parametrize("model", DOORS)
def test_grpc_and_http_give_the_same(served: Running, oracle: Oracle, model: str) -> None:
    (result,) = served.grpc(model, text_input=PROMPT, max_tokens=12)
    assert result.as_numpy("text_output")[0].decode() == oracle.text(PROMPT, 12)
    assert served.text(model, text_input=PROMPT, max_tokens=12) == oracle.text(PROMPT, 12)


@pytest.mark.parametrize("model", DOORS)
def test_streams_come_in_pieces_that_make_the_same_text(served: Running, oracle: Oracle, model: str) -> None:
    pieces = served.pieces(model, text_input=PROMPT, max_tokens=60)
    assert len(pieces) > 1
    assert "".join(pieces) == oracle.text(PROMPT, 60)
    streamed = served.grpc(model, text_input=PROMPT, max_tokens=60, stream=True)
    assert "".join(one.as_numpy("text_output")[0].decode() for one in streamed) == oracle.text(PROMPT, 60)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", DOORS)
def test_a_stop_word_ends_the_text_before_it(served: Running, oracle: Oracle, model: str, stream: bool) -> None:
    whole = oracle.text(PROMPT, 40)
    word = whole[10:14]
    request = {"text_input": PROMPT, "max_tokens": 40, "stop_words": [word]}
    text = "".join(served.pieces(model, **request)) if stream else served.text(model, **request)
    assert text == whole[: whole.index(word)]


def test_a_stop_word_ends_the_work_of_the_runtime_too(served: Running) -> None:
    before = len(served.calls("abort"))
    served.text("tensorrt_llm_bls", text_input=PROMPT, stop_words=["a"], **ENDLESS)
    assert served.next_call("abort", before)["tokens"] < 200


@pytest.mark.parametrize("model", DOORS)
def test_sampling_follows_its_seed_and_greedy_decoding_none(served: Running, oracle: Oracle, model: str) -> None:
    sampled = {"text_input": PROMPT, "max_tokens": 20, "top_k": 20, "temperature": 0.8}
    texts = [served.text(model, **sampled, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] == oracle.text(PROMPT, 20, top_k=20, seed=1)
    assert texts[2] == oracle.text(PROMPT, 20, top_k=20, seed=2) != texts[0]
    greedy = {served.text(model, text_input=PROMPT, max_tokens=20, temperature=0.8, seed=seed) for seed in (1, 2)}
    assert greedy == {oracle.text(PROMPT, 20)}


def test_several_sequences_have_a_seed_each(served: Running, oracle: Oracle) -> None:
    request = {"text_input": PROMPT, "max_tokens": 20, "top_k": 20, "num_return_sequences": 3, "seed": 5}
    found = {}
    for result in served.grpc("tensorrt_llm_bls", **request):
        found[int(result.as_numpy("sequence_index").item())] = result.as_numpy("text_output")[0].decode()
    assert found == {index: oracle.text(PROMPT, 20, top_k=20, seed=5 + index) for index in range(3)}


@pytest.mark.parametrize("model", DOORS)
def test_log_probs_are_those_of_the_chosen_tokens(served: Running, model: str) -> None:
    answer = served.generate(model, text_input=PROMPT, max_tokens=4, return_log_probs=True)
    np.testing.assert_allclose(answer["output_log_probs"], [-0.25] * 4)
    np.testing.assert_allclose(answer["cum_log_probs"], -1.0)


def test_min_tokens_keeps_the_answer_going(served: Running, oracle: Oracle) -> None:
    request = {"text_input": PROMPT, "max_tokens": 60, "return_num_output_tokens": True}
    assert served.generate("ensemble", **request)["num_output_tokens"] == oracle.length
    assert served.generate("ensemble", **request, min_tokens=50)["num_output_tokens"] == 50


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bad_words", ["a"]),
        ("beam_width", 2),
        ("length_penalty", 2.0),
        ("lora_task_id", 3),
        ("guided_decoding_guide", "json"),
        ("max_tokens", 0),
        ("max_tokens", 4096),
        ("text_input", "x" * 101),
        ("top_p", 1.5),
        ("temperature", -1.0),
        ("repetition_penalty", 0.0),
        ("num_return_sequences", 9),
        ("end_id", 100000),
    ],
)
@pytest.mark.parametrize("model", DOORS)
def test_what_the_engine_cannot_do_is_refused_by_name(served: Running, model: str, name: str, value: object) -> None:
    named = {"text_input": "prompt|input_ids"}.get(name, name)
    with pytest.raises(ServerError, match=rf"400 .*({named})"):
        served.generate(model, **{"text_input": PROMPT, "max_tokens": 5, name: value})


@pytest.mark.parametrize("model", DOORS)
def test_penalties_and_neutral_values_are_taken(served: Running, oracle: Oracle, model: str) -> None:
    neutral = {"bad_words": [""], "length_penalty": 0.0, "lora_task_id": 0, "return_context_logits": False}
    taken = {"presence_penalty": 0.5, "repetition_penalty": 1.1}
    assert served.text(model, text_input=PROMPT, max_tokens=9, **neutral, **taken) == oracle.text(PROMPT, 9)


@pytest.mark.parametrize("model", DOORS)
def test_an_error_of_the_runtime_reaches_the_client_in_its_own_words(served: Running, model: str) -> None:
    broken = {"text_input": PROMPT, "max_tokens": 20, "seed": 666}
    with pytest.raises(ServerError, match="RequestError: CUDA error: an illegal memory access"):
        served.generate(model, **broken)
    with pytest.raises(ServerError, match=r"illegal memory access|gave up in the middle"):
        served.pieces(model, **broken)
    assert served.text(model, text_input=PROMPT, max_tokens=5), "the next request is served"


def test_closing_an_http_stream_ends_its_request_in_the_runtime(served: Running) -> None:
    served.idle()
    before = len(served.calls("abort"))
    with served.streaming("tensorrt_llm_bls", text_input=PROMPT, **ENDLESS) as events:
        next(events)
    assert 0 < served.next_call("abort", before)["tokens"] < ENDLESS["max_tokens"]
    assert served.idle()["active"] == 0


def test_cancelling_a_client_of_the_engine_itself_ends_its_request(served: Running, oracle: Oracle) -> None:
    served.idle()
    before = len(served.calls("abort"))
    with served.grpc_stream() as (client, answers):
        client.async_stream_infer("tensorrt_llm", inputs({**oracle.endless(PROMPT), "streaming": True}))
        answers.get(timeout=20)
        client.stop_stream(cancel_requests=True)
    assert 0 < served.next_call("abort", before)["tokens"] < ENDLESS["max_tokens"]


def test_stop_ends_a_request_of_the_same_id(served: Running, oracle: Oracle) -> None:
    request = {**oracle.endless(PROMPT), "streaming": True}
    before = len(served.calls("abort"))
    with served.grpc_stream() as (client, answers):
        client.async_stream_infer("tensorrt_llm", inputs(request), request_id="mine", enable_empty_final_response=True)
        answers.get(timeout=20)
        stop = {**request, "stop": True}
        client.async_stream_infer("tensorrt_llm", inputs(stop), request_id="mine", enable_empty_final_response=True)
        list(until_final(answers))
    served.next_call("abort", before)


def test_more_requests_than_the_queue_holds_are_refused_as_busy(served: Running, oracle: Oracle) -> None:
    served.idle()
    request = oracle.endless(PROMPT)
    with served.grpc_stream() as (client, answers):
        for index in range(17):
            client.async_stream_infer("tensorrt_llm", inputs(request), request_id=f"busy-{index}")
        while not isinstance(error := answers.get(timeout=20), Exception):
            pass
        assert "this server takes 16: try again later" in str(error)
        assert one_token(("127.0.0.1", served.http_port), "tensorrt_llm_bls", 10.0).state == "busy"
    served.wait_for(lambda status: status["active"] == status["running"] == 0)


def test_death_of_the_runtime_fails_every_request_and_is_told(engine: Engine, tmp_path: Path) -> None:
    with serving(engine, tmp_path) as server:
        with server.streaming("tensorrt_llm_bls", text_input=PROMPT, **ENDLESS) as events:
            next(events)
            with pytest.raises(ServerError, match="illegal memory access"):
                server.generate("ensemble", text_input=PROMPT, max_tokens=20, seed=999)
            with pytest.raises(ServerError, match=r"the engine died|gave up in the middle"):
                list(events)
        with pytest.raises(ServerError, match=r"the engine died .*the server must be restarted"):
            server.generate("ensemble", text_input=PROMPT, max_tokens=5)


def test_a_server_that_is_stopped_shuts_the_runtime_down(engine: Engine, tmp_path: Path) -> None:
    """SIGTERM: Triton calls finalize, which gives the GPU back."""
    with serving(engine, tmp_path) as server:
        assert server.text("ensemble", text_input=PROMPT, max_tokens=3)
        assert not server.calls("shutdown")
    server.next_call("shutdown", 0)


def test_a_setting_that_the_release_does_not_know_keeps_the_server_from_starting(
    engine: Engine, tmp_path: Path
) -> None:
    def another_release(version: Path) -> None:
        file = version / "model.yaml"
        file.write_text(file.read_text().replace("sampler_type: TRTLLMSampler", "enable_trtllm_sampler: true"))

    with pytest.raises(EndpointError) as caught, serving(engine, tmp_path, another_release):
        pass
    assert "enable_trtllm_sampler" in caught.value.message + (tmp_path / "triton.log").read_text()
    assert "the engine did not start" in caught.value.message + (tmp_path / "triton.log").read_text()
