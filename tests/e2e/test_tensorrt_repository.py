"""The repository of a TensorRT-LLM engine in the real Triton, with a stand-in for NVIDIA's model, by release.

The stand-in has the emitted config.pbtxt but for the backend, and checks every tensor that reaches it against the
contract of that release: so preprocessing, tensorrt_llm_bls and the ensemble say what the C++ backend would be told.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import triton_contract
from tests.e2e.parrot import EOS, write_tokenizer
from tests.e2e.served import Served, ServerError
from tests.engine_folder import write_engine
from toolchain.servers.triton.locate import find_server
from toolchain.servers.triton.ports import free_ports
from toolchain.servers.triton.supervisor import Supervisor
from toolchain.stages.package import package

pytestmark = pytest.mark.timeout(180)
PROMPT = "The capital of France is"
BEFORE, AFTER = " Paris, and the river", " that runs through it is the Seine."
"""What the stand-in says before its end token and, where it may not end yet, after it."""
DOORS = ("ensemble", "tensorrt_llm_bls")


@dataclass(frozen=True)
class Release:
    """A served repository of one release, and what its engine was asked."""

    version: str
    served: Served
    journal: Path
    prompt_ids: list[int]

    def asked(self) -> dict[str, Any]:
        """The last request that reached the engine: name -> values."""
        return self.line()["inputs"]

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.journal.read_text().splitlines()]

    def line(self) -> dict[str, Any]:
        """Without the requests to stop another one."""
        return [line for line in self.lines() if "stop" not in line["inputs"]][-1]

    def values(self, name: str) -> list[Any]:
        return list(self.asked()[name]["values"])


@pytest.fixture(scope="module", params=["0.12.0", "0.17.0", "0.19.0", "1.2.1"])
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    folder = tmp_path_factory.mktemp(f"release-{request.param}")
    tokenizer = write_tokenizer(folder / "tokenizer")
    script = [*tokenizer(BEFORE).input_ids[1:], EOS, *tokenizer(AFTER).input_ids[1:]]
    prompt_ids = tokenizer(PROMPT).input_ids
    package(write_engine(folder / "engine", request.param, tokenizer=folder / "tokenizer"), folder / "repository")
    journal = folder / "journal"
    stand_in(folder / "repository" / "tensorrt_llm", request.param, script, journal)
    server, ports = find_server("bundled", environ=os.environ), free_ports()
    supervisor = Supervisor(server, folder / "repository", ports, log=folder / "triton.log", exit_timeout_s=3)
    supervisor.start()
    try:
        yield Release(request.param, Served(ports.http, ports.grpc, folder / "none"), journal, prompt_ids)
    finally:
        supervisor.kill()


def stand_in(model: Path, version: str, script: list[int], journal: Path) -> None:
    """Nothing but the backend is replaced."""
    emitted = (model / "config.pbtxt").read_text()
    assert emitted.count('backend: "tensorrtllm"') == 1
    (model / "config.pbtxt").write_text(emitted.replace('backend: "tensorrtllm"', 'backend: "python"'))
    shutil.copyfile(Path(__file__).parent / "stand_in" / "model.py", model / "1" / "model.py")
    tensors = {"inputs": triton_contract.inputs(version), "outputs": sorted(triton_contract.outputs(version))}
    typed = {name: ("FP32" if kind == "*" else kind, *rest) for name, (kind, *rest) in tensors["inputs"].items()}
    contract = {**tensors, "inputs": typed, "script": script, "journal": str(journal)}
    (model / "1" / "contract.json").write_text(json.dumps(contract))


@pytest.mark.parametrize("door", DOORS)
def test_text_goes_in_and_comes_out(release: Release, door: str) -> None:
    assert release.served.text(door, text_input=PROMPT, max_tokens=50) == BEFORE
    assert release.values("input_ids") == release.prompt_ids
    assert release.values("input_lengths") == [len(release.prompt_ids)]
    assert release.values("request_output_len") == [50]
    assert release.values("end_id") == [EOS]


@pytest.mark.parametrize("door", DOORS)
def test_sampling_reaches_the_engine_under_the_releases_names(release: Release, door: str) -> None:
    asked = {"temperature": 0.5, "top_k": 7, "top_p": 0.75, "repetition_penalty": 1.5, "length_penalty": 2.0}
    release.served.generate(door, text_input=PROMPT, max_tokens=4, seed=2**40, min_tokens=2, **asked)
    old = release.version in ("0.12.0", "0.17.0", "0.19.0")
    assert release.values("random_seed" if old else "seed") == [2**40]
    assert release.values("min_length" if old else "min_tokens") == [2]
    assert release.values("runtime_top_k") == [7]
    assert release.values("runtime_top_p") == [0.75]
    assert release.values("len_penalty") == [2.0]
    assert release.values("temperature") == [0.5]
    assert release.values("repetition_penalty") == [1.5]


@pytest.mark.parametrize("door", DOORS)
def test_min_tokens_makes_the_answer_longer(release: Release, door: str) -> None:
    assert release.served.text(door, text_input=PROMPT, max_tokens=99, min_tokens=40).startswith(BEFORE + AFTER[:20])


@pytest.mark.parametrize("door", DOORS)
def test_stop_words_arrive_as_ids_and_end_the_answer(release: Release, door: str) -> None:
    text = release.served.text(door, text_input=PROMPT, max_tokens=50, stop_words=[" and", "never said"])
    assert release.asked()["stop_words_list"]["shape"][:2] == [1, 2]
    assert text.startswith(" Paris,")
    assert "the" not in text
    if door == "tensorrt_llm_bls":
        asked, stop = release.lines()[-2:]
        assert stop["inputs"]["stop"]["values"] == [True]
        assert stop["id"] == asked["id"] != "", "the engine's request is stopped by its id"
    assert (" and" in text) == (door == "ensemble"), "the engine's answer holds the word; bls cuts it off"


@pytest.mark.parametrize("door", DOORS)
def test_streams_are_the_same_text_in_pieces(release: Release, door: str) -> None:
    pieces = release.served.pieces(door, text_input=PROMPT, max_tokens=50)
    assert len(pieces) > 3
    assert "".join(pieces) == BEFORE
    assert release.values("streaming") == [True]


@pytest.mark.parametrize("door", DOORS)
def test_the_engines_error_reaches_the_client(release: Release, door: str) -> None:
    """As the C++ backend sends one: an error that is also the final response."""
    with pytest.raises(ServerError, match="request_output_len must be positive"):
        release.served.generate(door, text_input=PROMPT, max_tokens=0)
    assert release.served.text(door, text_input=PROMPT, max_tokens=50) == BEFORE


def test_a_stream_with_stop_words_ends_before_the_word(release: Release) -> None:
    pieces = release.served.pieces("tensorrt_llm_bls", text_input=PROMPT, max_tokens=50, stop_words=["the river"])
    assert "".join(pieces) == " Paris, and "


@pytest.mark.parametrize("door", DOORS)
def test_over_grpc_too(release: Release, door: str) -> None:
    results = release.served.grpc(door, text_input=PROMPT, max_tokens=50, stream=True, seed=5, stop_words=["Seine"])
    texts = [result.as_numpy("text_output").reshape(-1)[0].decode() for result in results]
    assert "".join(texts) == BEFORE


def test_log_probs_are_asked_for_by_the_releases_names(release: Release) -> None:
    answer = release.served.generate("tensorrt_llm_bls", text_input=PROMPT, max_tokens=5, return_log_probs=True)
    assert answer["cum_log_probs"] == 0.0
    assert {"cum_log_probs", "output_log_probs"} <= set(release.line()["wanted"])


def test_bls_asks_for_no_output_that_the_release_lacks(release: Release) -> None:
    release.served.text("tensorrt_llm_bls", text_input=PROMPT, max_tokens=5)
    assert ("sequence_index" in release.line()["wanted"]) == (release.version != "0.12.0")


@pytest.mark.parametrize(
    ("tensor", "value", "first"),
    [
        ("num_return_sequences", 2, "0.14.0"),
        ("guided_decoding_guide", "{}", "0.19.0"),
    ],
)
def test_what_a_release_cannot_do_is_refused_by_name(release: Release, tensor: str, value: Any, first: str) -> None:
    order = [tuple(map(int, version.split("."))) for version in (release.version, first)]
    request = {"text_input": PROMPT, "max_tokens": 5, tensor: value}
    if order[0] >= order[1]:
        release.served.generate("ensemble", **request)
        release.served.generate("tensorrt_llm_bls", **request)
        assert tensor in release.asked()
        return
    with pytest.raises(ServerError, match=f"{tensor}: the engine's release, TensorRT-LLM {release.version}"):
        release.served.generate("tensorrt_llm_bls", **request)
    with pytest.raises(ServerError, match=tensor):
        release.served.grpc("ensemble", **request)


def test_bls_counts_the_tokens_that_a_release_does_not(release: Release) -> None:
    counted = {"return_num_input_tokens": True, "return_num_output_tokens": True}
    answer = release.served.generate("tensorrt_llm_bls", text_input=PROMPT, max_tokens=5, **counted)
    assert (answer["num_input_tokens"], answer["num_output_tokens"]) == (len(release.prompt_ids), 5)


def test_what_asks_for_nothing_is_not_refused(release: Release) -> None:
    request = {"num_return_sequences": 1, "return_num_input_tokens": False, "exclude_input_in_output": True}
    assert release.served.text("tensorrt_llm_bls", text_input=PROMPT, max_tokens=50, **request) == BEFORE


def test_bls_puts_the_prompt_in_front_itself(release: Release) -> None:
    request = {"text_input": PROMPT, "max_tokens": 50, "exclude_input_in_output": False}
    assert release.served.text("tensorrt_llm_bls", **request) == PROMPT + BEFORE
