"""The engine's loop with drafted tokens, a prefix cache and a window: what they change, and what they must not."""

from __future__ import annotations

import copy
import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engine_process
import numpy as np
import openvino as ov
import openvino_genai as genai
import pytest
import torch
import transformers
from drafting import Drafting
from tensors import RefusedError

from tests.backends.quantized_folder import random_llama, write_quantized
from toolchain.backends import openvino as backend
from toolchain.backends.openvino.runtime import settings
from toolchain.checkpoint import Checkpoint
from toolchain.planning.kv_window import KvWindow
from toolchain.planning.speculation import Speculation
from toolchain.progress import Silent

TOKENS, DRAFTED = 24, 4
DRAFT = Speculation(None, DRAFTED, 512)
LOOKUP = Speculation(None, DRAFTED, 512, lookup=3)
GREEDY: dict[str, Any] = {"max_new_tokens": TOKENS, "stop_token_ids": []}
SAMPLED = {**GREEDY, "do_sample": True, "temperature": 0.9, "top_p": 0.95, "rng_seed": 11}
PENALIZED = {**GREEDY, "repetition_penalty": 1.2}


@dataclass(frozen=True)
class Pair:
    """An engine with the engine of its draft beside it, and the model that the first one stands for."""

    engine: Path
    reference: Any

    def start(self, speculation: Speculation | None = None, *, blocks: int = 128, **how: Any) -> engine_process.Engine:
        told = settings(
            kv="fp32",
            cache_tokens=32 * blocks,
            max_sequences=8,
            max_step_tokens=320 if speculation and not speculation.lookup else 64,
            threads=1,
            speculation=speculation,
            **how,
        )
        return engine_process.Engine(
            self.engine, {"limits": {"max_batch_size": 8}, "eos_token_ids": [2], "runtime": told}
        )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The draft is the model itself with some noise: right now and then."""
    work = tmp_path_factory.mktemp("pair")
    model = random_llama(kv_heads=2, vocabulary=323)
    noisy = copy.deepcopy(model)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.02)
    found = {}
    for name, one in (("engine", model), ("draft", noisy)):
        found[name] = write_quantized(one, work / f"{name}-checkpoint", "int8", dtype="float32")
        backend.write(Checkpoint.open(found[name].path), work / name, Silent())
    return Pair(work / "engine", found["engine"].reference)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    dice = random.Random(1)
    return [[dice.randrange(3, 320) for _ in range(length)] for length in (3, 20, 40, 100, 150, 9)]


def answers(engine: engine_process.Engine, prompts: list[list[int]], options: dict[str, Any]) -> list[list[int]]:
    """Of all prompts at once, with the events' other contents checked."""
    found: list[list[int]] = [[] for _ in prompts]
    for key, prompt in enumerate(prompts):
        engine.add(key, np.array(prompt, np.int64).tobytes(), options)
    while engine.busy:
        for key, _row, ids, _logs, finish, detail in engine.step():
            assert finish != "error", detail
            found[key].extend(ids)
    return found


@pytest.mark.parametrize("options", [GREEDY, SAMPLED, PENALIZED], ids=["greedy", "sampled", "penalized"])
@pytest.mark.parametrize("speculation", [DRAFT, LOOKUP], ids=["draft", "lookup"])
def test_drafts_change_no_token(
    pair: Pair, prompts: list[list[int]], speculation: Speculation, options: dict[str, Any]
) -> None:
    repeats = [prompt[:9] * 7 for prompt in prompts]
    twice = [prompt * 2 for prompt in prompts[:3]] + repeats[3:] if speculation.lookup else prompts
    plain, drafting = pair.start(), pair.start(speculation, reuse=not speculation.lookup)
    expected = [answers(plain, [prompt], options)[0] for prompt in twice]
    assert answers(drafting, twice, options) == expected
    assert [answers(drafting, [prompt], options)[0] for prompt in twice] == expected  # alone, and from the cache
    status = drafting.status()
    assert status["accepted"] < status["drafted"]
    assert status["accepted"] > 0 or (speculation.lookup and options is not GREEDY)
    assert status["kv_usage_percent"] == 0


def test_greedy_text_with_a_draft_is_that_of_transformers(pair: Pair, prompts: list[list[int]]) -> None:
    told = transformers.GenerationConfig(
        do_sample=False, min_new_tokens=TOKENS, max_new_tokens=TOKENS, eos_token_id=322, pad_token_id=0
    )
    expected = [
        pair.reference.generate(torch.tensor([one]), generation_config=told)[0, len(one) :].tolist() for one in prompts
    ]
    assert answers(pair.start(DRAFT), prompts, GREEDY) == expected


def test_answer_ends_with_the_end_id_even_in_the_middle_of_accepted_drafts(
    pair: Pair, prompts: list[list[int]]
) -> None:
    whole = answers(pair.start(), [prompts[3]], GREEDY)[0]
    drafting = pair.start(DRAFT)
    for last in range(4, 12):
        if whole[last] not in whole[:last]:
            found = answers(drafting, [prompts[3]], {**GREEDY, "stop_token_ids": [whole[last]]})[0]
            assert found == whole[:last]


def test_log_probabilities_are_the_models_own(pair: Pair, prompts: list[list[int]]) -> None:
    logs: dict[str, list[float]] = {}
    for name, engine in (("plain", pair.start()), ("draft", pair.start(DRAFT))):
        engine.add(1, np.array(prompts[1], np.int64).tobytes(), {**GREEDY, "logprobs": 1})
        logs[name] = []
        while engine.busy:
            logs[name] += [one for event in engine.step() for one in event[3]]
    assert len(logs["plain"]) == TOKENS
    assert logs["draft"] == pytest.approx(logs["plain"], abs=1e-4)


def test_acceptance_is_counted_as_genai_counts_it(pair: Pair, prompts: list[list[int]]) -> None:
    engine, other, keys = pair.start(DRAFT), pair.start(DRAFT), itertools.count(1)
    for prompt in prompts[:3]:
        engine.add(next(keys), np.array(prompt, np.int64).tobytes(), GREEDY)
        events: list[Any] = []
        while engine.busy:
            events += engine.step()
        accepted, drafted = events[-1][5]
        last = len(events[-1][2]) - 1  # GenAI forgets what the last step accepted
        config = genai.GenerationConfig(max_new_tokens=TOKENS, ignore_eos=True, num_assistant_tokens=DRAFTED)
        told = other._pipeline.generate([ov.Tensor(np.array([prompt], np.int64))], [config])[0]
        own = told.extended_perf_metrics
        assert accepted - last == own.get_num_accepted_tokens()
        assert drafted - DRAFTED <= own.get_num_draft_tokens() <= drafted  # a draft leaves some places empty


def test_cancelled_requests_leave_the_others_as_they_were(pair: Pair, prompts: list[list[int]]) -> None:
    expected = answers(pair.start(), prompts, GREEDY)
    for speculation in (DRAFT, LOOKUP):
        engine = pair.start(speculation, reuse=not speculation.lookup, blocks=14)  # not enough for all at once
        dice = random.Random(5)
        for round_ in range(3):
            for key, prompt in enumerate(prompts):
                engine.add(100 * round_ + key, np.array(prompt, np.int64).tobytes(), GREEDY)
            found: dict[int, list[int]] = {}
            gone = {100 * round_ + key for key in dice.sample(range(len(prompts)), 3)}
            for key in gone:
                for _step in range(dice.randrange(4)):
                    _collect(engine, found)
                engine.cancel(key)
            while engine.busy:
                _collect(engine, found)
            kept = [key for key in range(len(prompts)) if 100 * round_ + key not in gone]
            assert [found[100 * round_ + key] for key in kept] == [expected[key] for key in kept]
        engine.drain_cancelled()
        assert not engine._counts
        assert answers(engine, prompts, GREEDY) == expected


def _collect(engine: engine_process.Engine, found: dict[int, list[int]]) -> None:
    for key, _row, ids, _logs, _finish, _detail in engine.step():
        found.setdefault(key, []).extend(ids)


@pytest.mark.parametrize("speculation", [None, DRAFT, LOOKUP], ids=["plain", "draft", "lookup"])
def test_cache_too_small_for_all_at_once_changes_no_token(
    pair: Pair, prompts: list[list[int]], speculation: Speculation | None
) -> None:
    expected = answers(pair.start(), prompts, GREEDY)
    reuse = speculation is None or not speculation.lookup
    assert answers(pair.start(speculation, blocks=9, reuse=reuse), prompts, GREEDY) == expected


@pytest.mark.parametrize(
    ("option", "tensor"),
    [({"num_beams": 2}, "beam_width"), ({"min_new_tokens": 3}, "min_tokens"), ({"new_one": 1}, "new_one")],
)
def test_options_that_were_not_compared_are_refused_by_name(option: dict[str, Any], tensor: str) -> None:
    drafting = Drafting.of({"draft": {"tokens": 4}})
    assert drafting is not None
    drafting.check(SAMPLED | PENALIZED | {"logprobs": 1})
    with pytest.raises(RefusedError, match=f"^{tensor}: not supported together with"):
        drafting.check(GREEDY | option)


def test_second_prompt_with_the_same_beginning_is_computed_from_where_it_differs(
    pair: Pair, prompts: list[list[int]]
) -> None:
    first, second = prompts[4] + prompts[3] + [7], prompts[4] + prompts[3] + [8, 9]  # 251 tokens, 64 in a step
    once = {**GREEDY, "max_new_tokens": 4}
    steps: dict[bool, list[int]] = {}
    texts = []
    for reuse in (True, False):
        engine, taken = pair.start(reuse=reuse), []
        for prompt in (first, second):
            before = engine.status()["steps"]
            texts.append(answers(engine, [prompt], once)[0])
            taken.append(engine.status()["steps"] - before)
        steps[reuse] = taken
    assert steps == {True: [7, 4], False: [7, 7]}  # 4 steps for the prompt and 3 for the tokens after the first
    assert texts[:2] == texts[2:]


def evicted(pair: Pair, prompt: list[int], blocks: tuple[int, ...], tokens: int) -> list[int]:
    """What transformers goes on with when layer i forgets the block ``blocks[i]`` of 32 tokens after the first step."""
    cache = transformers.DynamicCache()
    ids = [int(pair.reference(torch.tensor([prompt]), past_key_values=cache).logits[0, -1].argmax())]
    while len(ids) < tokens:
        position = torch.tensor([[len(prompt) + len(ids) - 1]])
        out = pair.reference(torch.tensor([ids[-1:]]), past_key_values=cache, position_ids=position)
        ids.append(int(out.logits[0, -1].argmax()))
        if len(ids) == 2:
            for layer, block in zip(cache.layers, blocks, strict=True):
                keep = [place for place in range(layer.keys.shape[2]) if place // 32 != block]
                layer.keys, layer.values = layer.keys[:, :, keep], layer.values[:, :, keep]
    return ids


def test_window_keeps_sinks_and_last_tokens_and_forgets_one_block_between(pair: Pair) -> None:
    """Blocks 0 (sinks) and 3 (last) stay of four; each layer forgets block 1 or 2, and positions stay as they were."""
    dice, tokens = random.Random(8), 24
    window = KvWindow(96, 4, ring=True, prompt=160)
    plain, windowed = pair.start(reuse=False), pair.start(reuse=False, window=window)
    for _ in range(3):
        prompt = [dice.randrange(3, 320) for _ in range(128)]
        options = {**GREEDY, "max_new_tokens": tokens}
        found, whole = answers(windowed, [prompt], options)[0], answers(plain, [prompt], options)[0]
        simulated = [evicted(pair, prompt, blocks, tokens) for blocks in itertools.product((1, 2), repeat=2)]
        assert whole not in simulated
        assert found in simulated
        assert found[:2] == whole[:2]  # the prompt itself was attended to whole


def test_window_bounds_what_a_long_answer_takes_of_the_cache(pair: Pair) -> None:
    """Six sequences of 500 tokens in 36 blocks of 32: a window of 96 needs 4 of them each, and 5 for the prompt."""
    long = {**GREEDY, "max_new_tokens": 400}
    window = KvWindow(96, 4, ring=True, prompt=100)
    assert window.kept(500) == 128
    engine = pair.start(reuse=False, window=window, blocks=36)
    most, usage = 0.0, engine._pipeline
    for key in range(6):
        engine.add(key, np.arange(3, 103, dtype=np.int64).tobytes(), long)
    count = 0
    while engine.busy:
        count += sum(len(event[2]) for event in engine.step())
        most = max(most, float(usage.get_metrics().max_cache_usage))
    assert count == 6 * 400
    assert most <= 100 * 6 * 4 / 36 + 0.1
