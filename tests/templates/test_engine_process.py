"""The engine's loop on a real engine of a small Qwen2: no BOS, several end ids, or none at all."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_process
import numpy as np
import pytest
import tensors
import torch
import transformers
from engine_client import EngineClient

from tests.backends.quantized_folder import QuantizedFolder, random_llama, write_quantized
from toolchain.backends import openvino as backend
from toolchain.backends.openvino.runtime import settings
from toolchain.checkpoint import Checkpoint
from toolchain.progress import Silent

PROMPT = list(range(40, 52))
TOKENS = 16


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> QuantizedFolder:
    model = random_llama(architecture="Qwen2ForCausalLM", kv_heads=2, vocabulary=323, tied=True)
    return write_quantized(model, tmp_path_factory.mktemp("qwen2") / "quantized", "int4", dtype="bfloat16")


@pytest.fixture(scope="module")
def greedy(source: QuantizedFolder) -> list[int]:
    """What transformers goes on with after ``PROMPT``."""
    plain = transformers.GenerationConfig(do_sample=False, max_new_tokens=TOKENS, eos_token_id=None, pad_token_id=0)
    ids = source.reference.generate(torch.tensor([PROMPT]), generation_config=plain)[0, len(PROMPT) :].tolist()
    assert len(set(ids)) > 4
    return list(ids)


def answers(source: QuantizedFolder, work: Path, eos: Any, stops: Callable[[tuple[int, ...]], list[int]]) -> list[Any]:
    """[ids, why it ended] of one request to an engine of a model whose generation_config.json says ``eos``."""
    folder = work / "checkpoint"
    folder.mkdir()
    for file in source.path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 7, "eos_token_id": eos}))
    config = json.loads((folder / "config.json").read_text()) | {"bos_token_id": 7, "eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint.open(folder)
    backend.write(checkpoint, work / "engine", Silent())
    end_ids = checkpoint.config.eos_token_ids
    passport = {
        "limits": {"max_batch_size": 2},
        "eos_token_ids": list(end_ids),
        "runtime": settings(kv="fp32", cache_tokens=512, max_sequences=2, max_step_tokens=64, threads=1),
    }
    engine = engine_process.Engine(work / "engine", passport)
    options = {"max_new_tokens": TOKENS, "stop_token_ids": stops(end_ids)}
    engine.add(1, np.array(PROMPT, np.int64).tobytes(), options)
    found: list[int] = []
    for _step in range(4 * TOKENS):
        for _key, _row, ids, _logs, finish, detail in engine.step():
            found.extend(ids)
            if finish:
                assert detail == ""
                return [found, finish]
    raise AssertionError("the engine never ended")


def test_every_one_of_several_end_ids_ends_the_answer(
    source: QuantizedFolder, greedy: list[int], tmp_path: Path
) -> None:
    last = next(place for place in range(3, TOKENS) if greedy[place] not in greedy[:place])
    absent = next(one for one in range(60, 300) if one not in greedy)
    ids, finish = answers(source, tmp_path, [absent, greedy[last]], list)
    assert finish == "stop"
    assert ids[:last] == greedy[:last]
    assert ids[last:] in ([], [greedy[last]])


@pytest.mark.parametrize("eos", [None, [5, 9]], ids=["no end id at all", "end ids that the request waives"])
def test_without_stops_the_answer_has_all_its_tokens(
    source: QuantizedFolder, greedy: list[int], tmp_path: Path, eos: object
) -> None:
    eos = [greedy[1], greedy[2]] if eos else None
    assert answers(source, tmp_path, eos, lambda _ids: []) == [greedy, "length"]


def test_a_model_without_end_ids_still_stops_where_a_request_says(
    source: QuantizedFolder, greedy: list[int], tmp_path: Path
) -> None:
    last = next(place for place in range(3, TOKENS) if greedy[place] not in greedy[:place])
    ids, finish = answers(source, tmp_path, None, lambda _ids: [greedy[last]])
    assert (ids[:last], finish) == (greedy[:last], "stop")


def test_lengths_that_are_new_soon_cost_no_memory(
    source: QuantizedFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO compiles kernels for every number of tokens in a step. With as many
    kept as OpenVINO likes, the lengths from 121 to 250 are 135 MiB here; with ours 20."""
    backend.write(Checkpoint.open(source.path), tmp_path, Silent())
    runtime = settings(kv="fp32", cache_tokens=512, max_sequences=2, max_step_tokens=256, threads=1, reuse=False)
    passport = {"limits": {"max_batch_size": 2, "max_seq_len": 400}, "eos_token_ids": [], "vocab_size": 323}
    (tmp_path / "engine.json").write_text(json.dumps({**passport, "runtime": runtime}))
    monkeypatch.setenv("PYTHONPATH", str(Path(tensors.__file__).parent))  # of its own process
    ended = threading.Semaphore(0)
    died: list[str] = []

    def count(events: list[tuple[Any, ...]], _status: dict[str, Any]) -> None:
        for event in events:
            assert event[4] != "error", event
            if event[4]:
                ended.release()

    client = EngineClient(tmp_path, on_events=count, on_death=died.append)

    def ask(lengths: range) -> int:
        for length in lengths:
            prompt = (np.arange(length, dtype=np.int64) % 300).tobytes()
            client.send("add", length, prompt, {"max_new_tokens": 1, "stop_token_ids": []})
            assert ended.acquire(timeout=60), died
        status = Path(f"/proc/{client.pid}/status").read_text().splitlines()
        return int(next(line for line in status if line.startswith("RssAnon:")).split()[1])

    try:
        before = ask(range(1, 121))
        assert ask(range(121, 251)) - before < 64 * 1024
    finally:
        client.close()


def test_services_share_the_cores_unless_the_recipe_says_how_many_each_takes() -> None:
    for services, cores, threads in ((2, 8, 4), (3, 8, 2), (4, 2, 1)):
        properties: dict[str, object] = {}
        engine_process.share_cores(properties, services, cores)
        assert properties == {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
    alone: dict[str, object] = {}
    engine_process.share_cores(alone, 1, 8)
    assert alone == {}
    told: dict[str, object] = {"INFERENCE_NUM_THREADS": 3}
    engine_process.share_cores(told, 2, 8)
    assert told["INFERENCE_NUM_THREADS"] == 3
