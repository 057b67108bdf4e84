"""Greedy answers layer by layer, held against transformers' own ``generate``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.quality.against import quantized, reference
from toolchain.checkpoint import Checkpoint
from toolchain.errors import PlanError
from toolchain.progress import Silent
from toolchain.quality import greedy
from toolchain.quality.answers import Answer, compare_answers
from toolchain.quantizers.place import Place

COUNT = 12


def prompts(*sizes: int) -> list[list[int]]:
    chance = np.random.default_rng(1)
    return [chance.integers(3, 300, size).tolist() for size in sizes]


def answers(
    model: Path, asked: Sequence[Sequence[int]], journal: Sequence[Mapping[str, Any]] = (), **place: Any
) -> tuple[list[Answer], list[Mapping[str, Any]]]:
    made: list[Mapping[str, Any]] = list(journal)
    found = greedy.continue_greedily(
        Checkpoint.open(model),
        asked,
        COUNT,
        journal=journal,
        record=made.append,
        progress=Silent(),
        place=Place(**place),
    )
    return found, made


def by_transformers(model: Any, prompt: Sequence[int]) -> list[int]:
    import torch

    ids = torch.tensor([list(prompt)])
    asked = {"max_new_tokens": COUNT, "do_sample": False, "pad_token_id": 0}
    made = model.generate(ids, attention_mask=torch.ones_like(ids), **asked)
    return [int(one) for one in made[0, len(prompt) :]]


@pytest.fixture(scope="module")
def model(random_llama: Callable[..., Path]) -> Path:
    return random_llama(dtype="float32", eos_token_id=None)


def test_greedy_answers_are_those_that_transformers_generate(model: Path) -> None:
    """Prompts of one length and of others, next to each other."""
    asked = prompts(9, 30, 9, 1, 9)
    theirs = reference().load(model)
    for one, prompt in zip(answers(model, asked)[0], asked, strict=True):
        assert (one.prompt, list(one.tokens), one.ended) == (tuple(prompt), by_transformers(theirs, prompt), False)


def test_an_answer_ends_with_its_text(model: Path, random_llama: Callable[..., Path]) -> None:
    asked = prompts(9, 30)
    given = [one.tokens for one in answers(model, asked)[0]]
    end = given[0][4]
    before = given[0].index(end)
    ending = random_llama(dtype="float32", eos_token_id=int(end))
    found, _ = answers(ending, asked)
    assert (found[0].tokens, found[0].ended) == (given[0][:before], True)
    assert found[1].ended == (end in given[1])


def test_an_interrupted_run_goes_on_at_its_token(model: Path) -> None:
    asked = prompts(9, 9, 14)
    whole, journal = answers(model, asked)
    assert [entry["unit"] for entry in journal] == [f"token {number}" for number in range(COUNT)]
    again, resumed = answers(model, asked, journal[:5])
    assert (again, resumed) == (whole, journal)


def test_how_far_two_models_go_together_is_told_by_one_pass_over_one_answer(model: Path, tmp_path: Path) -> None:
    """Each goes its own way in transformers; here the quantized model only looks at what the other one said."""
    folder = quantized(model, tmp_path / "q", "int4-rtn")
    asked = prompts(9, 30, 9, 20, 5, 12)
    own, other = reference().load(model), reference().load(folder)
    wanted = []
    for prompt in asked:
        first, second = by_transformers(own, prompt), by_transformers(other, prompt)
        same = [a == b for a, b in zip(first, second, strict=True)]
        wanted.append(same.index(False) if False in same else COUNT)
    found = compare_answers(
        Checkpoint.open(folder),
        answers(model, asked)[0],
        tmp_path,
        kv=None,
        rounds_inputs=True,
        progress=Silent(),
        place=Place(),
    )
    assert [one.leading for one in found] == wanted
    assert 0 < sum(wanted) < COUNT * len(asked)


def test_prompts_whose_keys_and_values_do_not_fit_are_refused_with_the_way_out(model: Path) -> None:
    with pytest.raises(PlanError, match="keys and values of 4 prompts") as refused:
        answers(model, prompts(40, 40, 40, 40), max_ram=2**20)
    assert "--samples 2" in (refused.value.hint or "")
