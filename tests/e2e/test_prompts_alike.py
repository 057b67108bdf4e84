"""The CPU engine uses its cache again for prompts that begin alike; each answer is still that of its own prompt.

Against the same model in transformers. Requests are given to the engine between two steps, so that what comes together
is no chance.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.parrot import BOS, EOS, write_parrot
from tests.e2e.test_triton_models import CAPITAL, LIMITS, Reference, make_engine
from tests.gateway.test_doors import COUNT
from toolchain.gateway.shared import load_together

LONG = 760
TOKENS = 20


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parrot(tmp_path_factory.mktemp("parrot"))


@pytest.fixture(scope="module")
def folder(parrot: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine(parrot, tmp_path_factory.mktemp("made") / "engine").path


@pytest.fixture
def engine(folder: Path) -> Iterator[Any]:
    """One that has answered nothing yet."""
    modules = load_together(("openvino/tensorrt_llm/1", "common/shared"), ("engine_process",))
    passport = json.loads((folder / "engine.json").read_text(encoding="utf-8"))
    assert passport["runtime"]["scheduler"]["enable_prefix_caching"]
    found = modules["engine_process"].Engine(folder, passport)
    yield found
    for key in range(10):
        found.cancel(key)
    run(found, {})


@pytest.fixture(scope="module")
def reference(parrot: Path) -> Reference:
    return Reference(parrot)


@pytest.fixture(scope="module")
def text(reference: Reference) -> list[int]:
    """Many ids that the model gives by itself."""
    prompt = reference.tokenizer(COUNT).input_ids
    return [*prompt, *after(reference, prompt, LONG)]


@pytest.fixture(scope="module")
def logs(reference: Reference, text: list[int]) -> list[float]:
    """The logarithm of each id's probability behind those before it; 0 for the first."""
    import torch

    with torch.no_grad():
        logits = reference.model(torch.tensor([text])).logits[0]
    found = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(text[1:])[:, None])
    return [0.0, *found[:, 0].tolist()]


def after(reference: Reference, ids: list[int], count: int) -> list[int]:
    import torch

    with torch.no_grad():
        found = reference.model.generate(
            torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=EOS
        )
    return list(found[0, len(ids) :].tolist())


def ask(engine: Any, key: int, ids: list[int], count: int = TOKENS) -> None:
    options = {"max_new_tokens": count, "min_new_tokens": count, "stop_token_ids": [EOS], "logprobs": 1}
    engine.add(key, np.array(ids, dtype=np.int64).tobytes(), options)


def run(engine: Any, answers: dict[int, list[int]]) -> dict[int, list[int]]:
    """Until nothing runs."""
    while engine.busy:
        for key, _row, ids, _logs, _finish, _told in engine.step():
            answers.setdefault(key, []).extend(ids)
    engine.drain_cancelled()
    return answers


def test_no_answer_follows_another_prompt_that_came_with_it(engine: Any, reference: Reference) -> None:
    """What both begin with was a prompt of its own once: such a block is only partly filled."""
    prompts = {number: reference.tokenizer(one).input_ids for number, one in ((1, COUNT), (2, CAPITAL))}
    ask(engine, 0, [BOS], count=1)
    run(engine, {})
    for key, ids in prompts.items():
        ask(engine, key, ids)
    assert run(engine, {}) == {key: after(reference, ids, TOKENS) for key, ids in prompts.items()}


@pytest.mark.parametrize("lengths", [(95, 81), (81, 95), (78, 86, 71, 70)])
def test_streams_of_one_text_that_move_together_go_on_alike(
    engine: Any, text: list[int], logs: list[float], lengths: tuple[int, ...]
) -> None:
    """As after a failover; another stream of the same text was there before. A wrong cache may leave the token of the
    largest logit as it is, so probabilities are compared too.
    """
    ask(engine, 0, text[:60], count=11)
    run(engine, {})
    for key, length in enumerate(lengths, 1):
        ask(engine, key, text[:length], count=1)
    found = {event[0]: (event[2][0], event[3][0]) for _ in lengths for event in engine.step()}
    assert not engine.busy
    for key, length in enumerate(lengths, 1):
        assert found[key] == (text[length], pytest.approx(logs[length], abs=1e-4))


def test_a_request_cancelled_while_its_prompt_is_read_leaves_nothing_wrong(engine: Any, text: list[int]) -> None:
    assert len(text) > 2 * LIMITS.max_num_tokens
    ask(engine, 0, text[:7], count=120)
    engine.step()
    ask(engine, 1, text[:700])
    answers = {0: [token for event in engine.step() for token in event[2]]}
    engine.cancel(1)
    ask(engine, 2, text[:700], count=60)
    run(engine, answers)
    assert answers[2] == text[700:760]
    assert 1 not in answers


def test_prompts_that_differ_are_read_together(engine: Any, reference: Reference) -> None:
    prompts = [reference.tokenizer(one).input_ids for one in (COUNT, CAPITAL)]
    for key, ids in enumerate(prompts):
        ask(engine, key, ids)
    assert {event[0] for event in engine.step()} == {0, 1}
    run(engine, {})
