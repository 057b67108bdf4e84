"""Adapters in the graph, token by token, against transformers with the adapters merged into the dequantized weights.

Measured on an AVX512 machine in f32: logits as large as 6 differ by at most 1.7e-5, with adapters and without.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engine_process
import numpy as np
import openvino
import pytest
import torch
import transformers

from tests.backends.quantized_folder import random_llama, write_quantized
from tests.backends.test_openvino import EXACT, TOLERANCE, logits_of
from tests.lora import merged, write_adapter
from toolchain.adapters import open_adapter
from toolchain.backends import openvino as backend
from toolchain.backends.openvino.runtime import settings
from toolchain.checkpoint import Checkpoint
from toolchain.progress import Silent

VOCABULARY = 320
TOKENS = 12


@dataclass(frozen=True)
class Built:
    engine: Path
    models: list[transformers.PreTrainedModel]
    """Without an adapter, with the first, with the second."""


@pytest.fixture(scope="module", params=["int4", "fp8"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The first adapter changes all matrices, the second, in bf16 and scaled by a root, two of them."""
    work = tmp_path_factory.mktemp("lora")
    stored = {"weights": request.param, "pre_quant": request.param == "int4"}
    source = write_quantized(random_llama(kv_heads=2, vocabulary=VOCABULARY), work / "quantized", **stored)
    checkpoint = Checkpoint.open(source.path)
    folders = [
        write_adapter(work / "a", source.reference, seed=1),
        write_adapter(
            work / "b", source.reference, seed=2, rank=9, targets=("q_proj", "v_proj"), use_rslora=True,
            dtype=torch.bfloat16,
        ),
    ]  # fmt: skip
    adapters = [open_adapter(folder.name, folder, checkpoint.config) for folder in folders]
    backend.write(checkpoint, work / "engine", Silent(), adapters)
    return Built(work / "engine", [source.reference, *(merged(source.reference, folder) for folder in folders)])


def test_each_row_has_the_logits_of_its_own_adapter_and_no_others(built: Built) -> None:
    core = openvino.Core()
    request = core.compile_model(
        core.read_model(built.engine / backend.MODEL_FILE), "CPU", EXACT
    ).create_infer_request()
    rows = len(built.models)
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (rows, 10))
    request.infer(
        {
            "input_ids": ids + VOCABULARY * np.arange(rows)[:, None],
            "attention_mask": np.ones_like(ids),
            "position_ids": np.tile(np.arange(10), (rows, 1)),
            "beam_idx": np.arange(rows, dtype=np.int32),
            "sampled_tokens_indices": np.arange(rows),
        }
    )
    found = request.get_tensor("logits").data.reshape(rows, 10, rows, VOCABULARY)
    expected = [logits_of(model, ids[place : place + 1])[0] for place, model in enumerate(built.models)]
    for row in range(rows):
        assert np.abs(found[row, :, row] - expected[row]).max() < TOLERANCE
        assert np.delete(found[row], row, axis=1).max() < -1e29
    assert min(np.abs(expected[0] - other).max() for other in expected[1:]) > 100 * TOLERANCE


def test_requests_with_and_without_adapters_share_a_batch_and_a_cache(built: Built) -> None:
    """The same prompt for all, twice: the cache of prompts must not give one adapter the keys of another."""
    prompt = np.random.default_rng(1).integers(3, VOCABULARY, 70)
    plain = transformers.GenerationConfig(do_sample=False, max_new_tokens=TOKENS, eos_token_id=None, pad_token_id=0)
    expected = [
        model.generate(torch.from_numpy(prompt[None]), generation_config=plain)[0, len(prompt) :].tolist()
        for model in built.models
    ]
    assert len({tuple(ids) for ids in expected}) == 3
    runtime = settings(kv="fp32", cache_tokens=4096, max_sequences=8, max_step_tokens=64, threads=1)
    passport: dict[str, Any] = {
        "limits": {"max_batch_size": 8}, "eos_token_ids": [2], "vocab_size": VOCABULARY, "runtime": runtime,
    }  # fmt: skip
    engine = engine_process.Engine(built.engine, passport)
    for _round in range(2):
        found: dict[int, list[int]] = {key: [] for key in range(6)}
        for key in found:
            options = {"max_new_tokens": TOKENS, "stop_token_ids": [], **({"adapter": key % 3} if key % 3 else {})}
            engine.add(key, prompt.astype(np.int64).tobytes(), options)
        while engine.busy:
            for key, _row, ids, _logs, _finish, detail in engine.step():
                assert detail == ""
                found[key].extend(ids)
        assert found == {key: expected[key % 3] for key in found}


def test_an_adapters_answer_ends_at_its_own_end_id(built: Built) -> None:
    prompt = np.random.default_rng(1).integers(3, VOCABULARY, 70)
    plain = transformers.GenerationConfig(do_sample=False, max_new_tokens=TOKENS, eos_token_id=None, pad_token_id=0)
    ids = built.models[1].generate(torch.from_numpy(prompt[None]), generation_config=plain)[0, len(prompt) :].tolist()
    last = next(place for place in range(2, TOKENS) if ids[place] not in ids[:place])
    runtime = settings(kv="fp32", cache_tokens=512, max_sequences=2, max_step_tokens=64, threads=1)
    passport: dict[str, Any] = {
        "limits": {"max_batch_size": 2}, "eos_token_ids": [2], "vocab_size": VOCABULARY, "runtime": runtime,
    }  # fmt: skip
    engine = engine_process.Engine(built.engine, passport)
    engine.add(
        1, prompt.astype(np.int64).tobytes(), {"max_new_tokens": TOKENS, "stop_token_ids": [ids[last]], "adapter": 1}
    )
    found: list[Any] = []
    while engine.busy:
        for _key, _row, some, _logs, finish, _detail in engine.step():
            found += [*some, *([finish] if finish else [])]
    assert found == [*ids[:last], "stop"]
