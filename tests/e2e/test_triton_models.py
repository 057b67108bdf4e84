"""The models of a packaged repository in the real Triton, asked by real clients, checked against transformers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import tritonclient.grpc as grpcclient
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.parrot import EOS, SENTENCES, write_parrot
from tests.e2e.served import Served, ServerError, inputs, until_final
from toolchain import workspace
from toolchain.adapters import Adapter
from toolchain.backends import openvino
from toolchain.backends.openvino.guides import write_guides
from toolchain.backends.openvino.runtime import settings
from toolchain.checkpoint import Checkpoint
from toolchain.engine import Engine, Limits, Passport, write_passport
from toolchain.progress import Silent
from toolchain.servers.triton.locate import find_server
from toolchain.servers.triton.ports import free_ports
from toolchain.servers.triton.probe import one_token
from toolchain.servers.triton.supervisor import Supervisor
from toolchain.stages.package import package

pytestmark = pytest.mark.timeout(180)
LIMITS = Limits(max_batch_size=16, max_seq_len=6000, max_input_len=512, max_num_tokens=256)
DOORS = ("ensemble", "tensorrt_llm_bls")
ENDLESS = {"max_tokens": 5500, "end_id": -1}
"""Seconds of work: for requests that are to be interrupted."""


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parrot(tmp_path_factory.mktemp("parrot"))


@pytest.fixture(scope="module")
def engine(parrot: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return make_engine(parrot, tmp_path_factory.mktemp("made") / "engine")


@pytest.fixture(scope="module")
def served(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One server for all tests here but one."""
    with serving(engine, tmp_path_factory.mktemp("served")) as found:
        yield found


@contextmanager
def serving(engine: Engine, work: Path, **parameters: str) -> Iterator[Served]:
    """The engine's repository behind a real Triton."""
    status = work / "status.json"
    with workspace.draft(work / "repository", "repository", {}) as draft:
        package(engine, draft.path, parameters={"status_file": str(status), "max_queue_size": 16, **parameters})
        draft.commit(versions={}, recipe="")
    server = find_server("bundled", environ=os.environ)
    ports = free_ports()
    supervisor = Supervisor(server, work / "repository", ports, log=work / "triton.log", exit_timeout_s=3)
    supervisor.start()
    try:
        yield Served(ports.http, ports.grpc, status, ports.metrics)
    finally:
        supervisor.kill()


def make_engine(
    model: Path,
    target: Path,
    *,
    guided: bool = False,
    adapters: Sequence[Adapter] = (),
    limits: Limits = LIMITS,
) -> Engine:
    """The OpenVINO engine of a small model, computed in fp32 so that greedy tokens can be compared."""
    checkpoint = Checkpoint.open(model)
    config = checkpoint.config
    with workspace.draft(target, "engine", {}) as draft:
        openvino.write(checkpoint, draft.path, Silent(), adapters)
        runtime = settings(kv="fp32", cache_tokens=20000, max_sequences=16, max_step_tokens=256, threads=1)
        if guided:
            write_guides(model, config, draft.path, copies=len(adapters) + 1)
            runtime["guided_decoding"] = "xgrammar"
        if adapters:
            runtime["lora"] = [adapter.name for adapter in adapters]
        passport = Passport(
            backend="openvino",
            recipe="parrot",
            architecture=config.architecture,
            vocab_size=config.vocab_size,
            num_layers=config.num_layers,
            bos_token_id=config.bos_token_id,
            eos_token_ids=config.eos_token_ids,
            weights="none",
            group_size=None,
            kv="fp32",
            limits=limits,
            device="cpu",
            sm=None,
            runtime=runtime,
            versions={},
            checkpoint="",
        )
        write_passport(draft.path, passport)
        draft.commit(versions={}, recipe="")
    return Engine.open(target)


class Reference:
    """What transformers says."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def ids(self, prompt: str, max_tokens: int, **options: object) -> list[list[int]]:
        """The new ids of each returned sequence, end id and padding cut off."""
        encoded = self.tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            out = self.model.generate(**encoded, max_new_tokens=max_tokens, do_sample=False, **options)
        rows = out[:, encoded.input_ids.shape[1] :].tolist()
        return [row[: row.index(EOS)] if EOS in row else row for row in rows]

    def text(self, prompt: str, max_tokens: int, **options: object) -> str:
        """The continuation: the text of prompt and answer without the prompt's."""
        ids = self.ids(prompt, max_tokens, **options)[0]
        prompt_ids = self.tokenizer(prompt).input_ids
        whole = self.tokenizer.decode(prompt_ids + ids, skip_special_tokens=True)
        return whole[len(self.tokenizer.decode(prompt_ids, skip_special_tokens=True)) :]


@pytest.fixture(scope="module")
def reference(parrot: Path) -> Reference:
    return Reference(parrot)


CAPITAL = "The capital of France is"
JAPAN = "日本の首都は"
GREEK = "Greek letters are alpha"


@pytest.mark.parametrize("prompt", [CAPITAL, JAPAN, GREEK, "Count with me: one"])
@pytest.mark.parametrize("model", DOORS)
def test_text_is_what_transformers_generates(served: Served, reference: Reference, model: str, prompt: str) -> None:
    text = served.text(model, text_input=prompt, max_tokens=60)
    assert text == reference.text(prompt, 60)
    assert any((prompt + text) == sentence for sentence in SENTENCES)


@pytest.mark.parametrize("model", DOORS)
def test_grpc_and_http_give_the_same(served: Served, model: str) -> None:
    results = served.grpc(model, text_input=CAPITAL, max_tokens=30)
    assert len(results) == 1
    assert results[0].as_numpy("text_output")[0].decode() == served.text(model, text_input=CAPITAL, max_tokens=30)


def test_engine_gives_the_tokens_of_transformers(served: Served, reference: Reference) -> None:
    ids = reference.tokenizer(JAPAN).input_ids
    [result] = served.grpc("tensorrt_llm", input_ids=ids, input_lengths=len(ids), request_output_len=50)
    expected = reference.ids(JAPAN, 50)[0]
    assert result.as_numpy("output_ids").tolist() == [[expected]]
    assert result.as_numpy("sequence_length").tolist() == [[len(expected)]]


def test_stream_of_bls_has_no_half_characters_and_loses_nothing(served: Served) -> None:
    pieces = served.pieces("tensorrt_llm_bls", text_input=JAPAN, max_tokens=60)
    assert "".join(pieces) == served.text("tensorrt_llm_bls", text_input=JAPAN, max_tokens=60)
    assert "😀🎉" in "".join(pieces)
    assert "\ufffd" not in "".join(pieces)
    results = served.grpc("tensorrt_llm_bls", text_input=JAPAN, max_tokens=60, stream=True)
    assert "".join(result.as_numpy("text_output")[0].decode() for result in results) == "".join(pieces)


def test_stream_of_ensemble_keeps_spaces_between_pieces(served: Served) -> None:
    pieces = served.pieces("ensemble", text_input=GREEK, max_tokens=60)
    assert len(pieces) > 1
    assert "".join(pieces) == served.text("ensemble", text_input=GREEK, max_tokens=60)


def test_sixteen_streams_at_once_are_each_what_they_are_alone(served: Served, reference: Reference) -> None:
    words = [sentence.split() for sentence in SENTENCES]
    prompts = [" ".join(words[index % 4][: 1 + index // 4]) for index in range(16)]
    expected = [reference.text(prompt, 40) for prompt in prompts]
    assert len(set(expected)) >= 12

    def ask(index: int) -> str:
        model = DOORS[index % 2]
        request = {"text_input": prompts[index], "max_tokens": 40}
        # A piece of the ensemble may end inside a character; its single answer may not.
        return "".join(served.pieces(model, **request)) if model == DOORS[1] else served.text(model, **request)

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(16))) == expected


def test_many_requests_on_one_grpc_stream_are_told_apart_by_their_ids(served: Served, reference: Reference) -> None:
    texts: dict[str, str] = {}
    open_ids = {str(index) for index in range(8)}
    with served.grpc_stream() as (client, answers):
        for index in range(8):
            client.async_stream_infer(
                "tensorrt_llm_bls",
                inputs({"text_input": SENTENCES[index % 4].split()[0], "max_tokens": 20 + index, "stream": True}),
                request_id=str(index),
                enable_empty_final_response=True,
            )
        while open_ids:
            result = answers.get(timeout=60)
            response = result.get_response()
            if response.outputs:
                texts[response.id] = texts.get(response.id, "") + result.as_numpy("text_output")[0].decode()
            if response.parameters["triton_final_response"].bool_param:
                open_ids.remove(response.id)
    for index in range(8):
        assert texts[str(index)] == reference.text(SENTENCES[index % 4].split()[0], 20 + index)


def test_closing_an_http_stream_frees_the_engine(served: Served) -> None:
    before = served.idle()["cancelled"]
    with served.streaming("tensorrt_llm_bls", text_input=CAPITAL, **ENDLESS) as events:
        next(events)
        served.wait_for(lambda status: status["running"] == 1)
    served.wait_for(lambda status: status["running"] == 0 and status["cancelled"] == before + 1)


def test_cancelling_a_grpc_stream_frees_the_engine(served: Served) -> None:
    before = served.idle()["cancelled"]
    with served.grpc_stream() as (client, answers):
        client.async_stream_infer("tensorrt_llm_bls", inputs({"text_input": CAPITAL, "stream": True, **ENDLESS}))
        answers.get(timeout=60)
        served.wait_for(lambda status: status["running"] == 1)
        client.stop_stream(cancel_requests=True)
    served.wait_for(lambda status: status["running"] == 0 and status["cancelled"] == before + 1)


def test_cancelling_a_client_of_the_engine_itself_frees_it(served: Served, reference: Reference) -> None:
    before = served.idle()["cancelled"]
    with served.grpc_stream() as (client, answers):
        client.async_stream_infer("tensorrt_llm", inputs(endless_ids(reference)))
        answers.get(timeout=60)
        client.stop_stream(cancel_requests=True)
    served.wait_for(lambda status: status["running"] == 0 and status["cancelled"] == before + 1)


def endless_ids(reference: Reference) -> dict[str, object]:
    ids = reference.tokenizer(CAPITAL).input_ids
    return {"input_ids": ids, "input_lengths": len(ids), "request_output_len": 5500, "end_id": -1, "streaming": True}


def test_cancelling_a_waiting_request_frees_its_place_in_the_queue(served: Served, reference: Reference) -> None:
    with served.grpc_stream() as (client, _answers):
        for _ in range(16):
            client.async_stream_infer("tensorrt_llm", inputs(endless_ids(reference)))
        served.wait_for(lambda status: status["running"] == 16)
        with served.grpc_stream() as (late, _late_answers):
            late.async_stream_infer("tensorrt_llm_bls", inputs({"text_input": CAPITAL, "stream": True, **ENDLESS}))
            served.wait_for(lambda status: status["waiting"] == 1)
        served.wait_for(lambda status: status["waiting"] == 0 and status["running"] == 16)


def test_outputs_that_were_not_asked_for_are_not_sent(served: Served, reference: Reference) -> None:
    """Triton 2.51 corrupts memory when it has to drop them itself."""
    ids = reference.tokenizer(CAPITAL).input_ids
    request = inputs({"input_ids": ids, "input_lengths": len(ids), "request_output_len": 8, "streaming": True})
    with served.grpc_stream() as (client, answers):
        wanted = [grpcclient.InferRequestedOutput("output_ids")]
        client.async_stream_infer("tensorrt_llm", request, outputs=wanted, enable_empty_final_response=True)
        results = list(until_final(answers))
    assert {output.name for result in results for output in result.get_response().outputs} == {"output_ids"}


@pytest.mark.parametrize("model", ["tensorrt_llm", "ensemble"])
def test_stop_request_ends_the_request_of_the_same_id(served: Served, reference: Reference, model: str) -> None:
    """Triton 2.51 does not pass a cancellation on through an ensemble; ``stop`` reaches through it."""
    long = endless_ids(reference)
    request = long if model == "tensorrt_llm" else {"text_input": CAPITAL, "stream": True, **ENDLESS}
    before = served.idle()["cancelled"]
    with served.grpc_stream() as (client, answers):
        client.async_stream_infer(model, inputs(request), request_id="7", enable_empty_final_response=True)
        first = answers.get(timeout=60)
        assert first.get_response().outputs
        assert served.grpc("tensorrt_llm", request_id="7", **long, stop=True) == []
        list(until_final(answers))
    served.wait_for(lambda status: status["running"] == 0 and status["cancelled"] == before + 1)


def test_stop_words_across_token_borders_cut_the_text(served: Served) -> None:
    request = {"text_input": GREEK, "max_tokens": 60, "stop_words": ["mma del"]}
    assert served.text("tensorrt_llm_bls", **request) == " beta ga"
    assert "".join(served.pieces("tensorrt_llm_bls", **request)) == " beta ga"
    served.wait_for(lambda status: status["running"] == 0)


@pytest.mark.parametrize("stop", ["delta", " gamma delta", "。"])
def test_stop_words_cut_ensemble_and_bls_alike(served: Served, stop: str) -> None:
    prompt = JAPAN if stop == "。" else GREEK
    request = {"text_input": prompt, "max_tokens": 60, "stop_words": ["never written", stop]}
    text = served.text("ensemble", **request)
    assert stop not in text
    assert text
    assert served.text("tensorrt_llm_bls", **request) == text
    assert "".join(served.pieces("tensorrt_llm_bls", **request)) == text
    full = served.text("ensemble", text_input=prompt, max_tokens=60)
    assert full.startswith(text)
    assert full[len(text) :].lstrip().startswith(stop.strip())


def test_prompt_that_is_too_long_is_refused_with_both_numbers(served: Served) -> None:
    for model in DOORS:
        with pytest.raises(ServerError, match=r"601 tokens, and this engine takes at most 512"):
            served.generate(model, text_input="!" * 600, max_tokens=1)
        with pytest.raises(ServerError, match=r"max_tokens.*5999 .* 6000"):
            served.generate(model, text_input="", max_tokens=5999) and served.generate(
                model, text_input="!", max_tokens=5999
            )


@pytest.mark.parametrize("model", DOORS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bad_words", ["Paris"]),
        ("presence_penalty", 0.5),
        ("lora_task_id", 3),
        ("guided_decoding_guide", "json"),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("top_p", 1.5),
        ("top_k", -2),
        ("temperature", -1.0),
        ("repetition_penalty", 0.0),
        ("min_tokens", 99),
        ("num_return_sequences", 17),
        ("end_id", 100000),
    ],
)
def test_what_the_engine_cannot_do_is_refused_by_name(served: Served, model: str, name: str, value: object) -> None:
    with pytest.raises(ServerError, match=rf"400 .*{name}"):
        served.generate(model, **{"text_input": CAPITAL, "max_tokens": 5, name: value})


def test_bls_refuses_images_by_name(served: Served) -> None:
    with pytest.raises(ServerError, match="image_url_input"):
        served.generate("tensorrt_llm_bls", text_input=CAPITAL, max_tokens=5, image_url_input="file:///x.png")


@pytest.mark.parametrize("model", DOORS)
def test_neutral_values_of_unsupported_inputs_are_accepted(served: Served, model: str) -> None:
    neutral = {"bad_words": [""], "presence_penalty": 0.0, "lora_task_id": 0, "return_context_logits": False}
    text = served.text(model, text_input=CAPITAL, max_tokens=30, **neutral)
    assert text == served.text(model, text_input=CAPITAL, max_tokens=30)


@pytest.mark.parametrize("model", DOORS)
def test_empty_prompt_begins_at_the_beginning(served: Served, reference: Reference, model: str) -> None:
    assert served.text(model, text_input="", max_tokens=10) == reference.text("", 10)


@pytest.mark.parametrize("model", DOORS)
def test_bos_in_the_text_is_not_doubled(served: Served, model: str) -> None:
    plain = served.generate(model, text_input=CAPITAL, max_tokens=9, return_num_input_tokens=True)
    marked = served.generate(model, text_input=f"<s>{CAPITAL}", max_tokens=9, return_num_input_tokens=True)
    assert marked["num_input_tokens"] == plain["num_input_tokens"]
    assert marked["text_output"] == plain["text_output"]


@pytest.mark.parametrize("model", DOORS)
def test_answer_that_ends_at_once_is_empty_and_final(served: Served, reference: Reference, model: str) -> None:
    assert reference.ids(SENTENCES[0], 5) == [[]]
    answer = served.generate(model, text_input=SENTENCES[0], max_tokens=5, return_num_output_tokens=True)
    assert (answer["text_output"], answer["num_output_tokens"]) == ("", 0)
    assert "".join(served.pieces(model, text_input=SENTENCES[0], max_tokens=5)) == ""


@pytest.mark.parametrize("model", DOORS)
def test_prompt_is_part_of_the_text_when_asked_for(served: Served, model: str) -> None:
    request = {"text_input": CAPITAL, "max_tokens": 30}
    assert served.text(model, **request, exclude_input_in_output=False) == CAPITAL + served.text(model, **request)


@pytest.mark.parametrize("model", DOORS)
def test_log_probs_are_those_of_transformers(served: Served, reference: Reference, model: str) -> None:
    answer = served.generate(model, text_input=CAPITAL, max_tokens=4, return_log_probs=True)
    prompt, new = reference.tokenizer(CAPITAL).input_ids, reference.ids(CAPITAL, 4)[0]
    with torch.no_grad():
        logits = reference.model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits, -1)[torch.arange(4), torch.tensor(new)].numpy()
    np.testing.assert_allclose(answer["output_log_probs"], expected, atol=2e-3)
    np.testing.assert_allclose(answer["cum_log_probs"], expected.sum(), atol=5e-3)


@pytest.mark.parametrize("model", DOORS)
@pytest.mark.parametrize(("max_tokens", "penalty"), [(8, 1.0), (30, 0.0), (30, 2.0)])
def test_beams_are_those_of_transformers(
    served: Served, reference: Reference, model: str, max_tokens: int, penalty: float
) -> None:
    prompt = "Count with me: one"
    [result] = served.grpc(model, text_input=prompt, max_tokens=max_tokens, beam_width=3, length_penalty=penalty)
    beams = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": penalty, "early_stopping": True}
    texts = [text.decode() for text in result.as_numpy("text_output")]
    expected = [reference.tokenizer.decode(ids) for ids in reference.ids(prompt, max_tokens, **beams)]
    assert texts == expected


def test_repetition_penalty_is_that_of_transformers(served: Served, reference: Reference) -> None:
    text = served.text("tensorrt_llm_bls", text_input=CAPITAL, max_tokens=12, repetition_penalty=4.0, end_id=-1)
    expected = reference.text(CAPITAL, 12, repetition_penalty=4.0, eos_token_id=-1)
    assert text == expected
    assert text != reference.text(CAPITAL, 12)


def test_min_tokens_keeps_the_answer_going(served: Served) -> None:
    answer = served.generate(
        "ensemble", text_input=CAPITAL, max_tokens=60, min_tokens=50, return_num_output_tokens=True
    )
    assert answer["num_output_tokens"] >= 50


def test_sampling_follows_its_seed(served: Served) -> None:
    request = {"text_input": "", "max_tokens": 20, "top_k": 50, "temperature": 3.0}
    texts = [served.text("tensorrt_llm_bls", **request, seed=seed) for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
    greedy = served.text("tensorrt_llm_bls", text_input="", max_tokens=20)
    assert served.text("tensorrt_llm_bls", text_input="", max_tokens=20, temperature=3.0) == greedy
    assert served.text("tensorrt_llm_bls", **{**request, "temperature": 0.0}) == greedy


@pytest.mark.parametrize("model", DOORS)
def test_several_sequences_come_with_their_index(served: Served, model: str) -> None:
    request = {"text_input": "", "max_tokens": 12, "top_k": 50, "temperature": 3.0, "stream": True}
    texts: dict[int, str] = {}
    for result in served.grpc(model, **request, num_return_sequences=3, seed=1):
        index = int(result.as_numpy("sequence_index").reshape(-1)[0])
        texts[index] = texts.get(index, "") + result.as_numpy("text_output")[0].decode(errors="replace")
    assert sorted(texts) == [0, 1, 2]
    if model == "tensorrt_llm_bls":
        alone = [served.text(model, **{**request, "stream": False}, seed=1 + index) for index in range(3)]
        assert [texts[index] for index in range(3)] == alone


def test_more_requests_than_the_queue_holds_are_refused_as_busy(served: Served, reference: Reference) -> None:
    """Triton 2.51 answers every refusal of a decoupled model with status 400, so the words are what tells."""
    before = served.idle()["cancelled"]
    with served.grpc_stream() as (client, answers):
        for index in range(33):
            client.async_stream_infer("tensorrt_llm", inputs(endless_ids(reference)), request_id=f"busy-{index}")
        while not isinstance(error := answers.get(timeout=60), Exception):
            pass
        assert "this server takes 32: try again later" in str(error)
        for model in DOORS:
            with pytest.raises(ServerError, match="this server takes 32: try again later"):
                served.generate(model, text_input=CAPITAL, max_tokens=5)
        assert one_token(("127.0.0.1", served.http_port), "tensorrt_llm_bls", 10.0).state == "busy"
    served.wait_for(lambda status: status["running"] == 0 and status["cancelled"] == before + 32)


def test_the_door_for_other_backends_gives_the_same_text(engine: Engine, served: Served, tmp_path: Path) -> None:
    """A GPU's engine is called through Triton's BLS instead of the private line; the text must not depend on that."""
    door = "tensorrt_llm_bls"
    requests = [{"text_input": sentence[:12], "max_tokens": 24} for sentence in SENTENCES]
    expected = [served.text(door, **request) for request in requests]
    with serving(engine, tmp_path, engine_door="bls") as other:
        assert [other.text(door, **request) for request in requests] == expected
        assert "".join(other.pieces(door, **requests[0])) == expected[0]


def test_engine_process_dies_with_its_parent(engine: Engine, root: Path) -> None:
    """Also when the parent is killed and can say nothing: an orphan would keep the weights in memory."""
    templates = root / "model_repo_templates"
    folders = (templates / "openvino" / "tensorrt_llm" / "1", templates / "common" / "shared")
    parent = (
        "import os, signal, sys; from pathlib import Path; from engine_client import EngineClient\n"
        "client = EngineClient(Path(sys.argv[1]), on_events=print, on_death=print)\n"
        "print(client.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", parent, str(engine.path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.returncode == -signal.SIGKILL
    stat = Path("/proc") / found.stdout.strip() / "stat"
    deadline = time.monotonic() + 10
    while stat.exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_death_of_the_engine_fails_running_and_new_requests_at_once(served: Served) -> None:
    """The last test: nothing generates afterwards, which is what a supervisor's probe sees."""
    request = {"text_input": CAPITAL, **ENDLESS}
    killed = "engine process was killed by signal 9"

    def wait_for_answer(model: str) -> None:
        with pytest.raises(ServerError, match=killed):
            served.generate(model, **request)

    with (
        ThreadPoolExecutor(2) as pool,
        served.streaming("ensemble", **request) as one,
        served.streaming("tensorrt_llm_bls", **request) as other,
    ):
        waiting = [pool.submit(wait_for_answer, model) for model in DOORS]
        next(one)
        next(other)
        engine = served.wait_for(lambda status: status["running"] == 4)["engine_pid"]
        os.kill(engine, signal.SIGKILL)
        for events in (one, other):
            with pytest.raises(ServerError, match=killed):
                list(events)
        for answer in waiting:
            answer.result(timeout=10)
    for model in DOORS:
        wait_for_answer(model)
