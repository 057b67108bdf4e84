"""The arithmetic of means and their errors, and the memory that measuring takes, as numbers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from toolchain.errors import PlanError
from toolchain.family import LlamaConfig, published
from toolchain.quality.measures import Measure, Predictions, exponential, mean_of
from toolchain.quality.need import choose_chunk, need
from toolchain.recipe import Accept
from toolchain.units import GIB


def test_the_error_of_a_mean_is_that_of_drawing_other_sequences() -> None:
    """Against the spread of means over many resampled texts; tokens of one sequence are alike, so they count as one."""
    random = np.random.default_rng(0)
    level = random.normal(2.0, 1.0, 400)  # what all tokens of a sequence share
    counts = random.integers(5, 50, 400)
    sums = level * counts + random.normal(0, 1, 400) * np.sqrt(counts)
    found = mean_of(sums.tolist(), counts.tolist())
    assert found.value == pytest.approx(sums.sum() / counts.sum())
    picks = random.integers(0, 400, (2000, 400))
    spread = (sums[picks].sum(1) / counts[picks].sum(1)).std()
    assert found.error == pytest.approx(spread, rel=0.1)
    by_token = 1.0 / math.sqrt(counts.sum())
    assert found.error is not None
    assert found.error > 3 * by_token


def test_one_sequence_has_no_error_and_json_has_no_infinity() -> None:
    assert mean_of([6.0], [3]) == Measure(2.0, None)
    assert exponential(Measure(1000.0, 1.0)).to_json() == {"value": None, "error": None}
    assert json.loads(json.dumps(Measure(math.nan, 0.5).to_json())) == {"value": None, "error": 0.5}
    assert exponential(Measure(math.log(2), 0.1)).error == pytest.approx(0.2)


def test_a_ratio_is_paired_so_its_error_is_smaller_than_those_of_both_perplexities() -> None:
    first = Predictions((100.0, 300.0, 50.0), (0.0, 0.0, 0.0), (50, 50, 50))
    other = Predictions((101.0, 301.0, 51.0), (0.5, 0.4, 0.6), (49, 48, 50))
    found = other.measures(first, [50, 50, 50])
    assert found["perplexity_ratio"].value == pytest.approx(math.exp(1 / 50))
    assert found["perplexity_ratio"].error == pytest.approx(0)
    assert found["perplexity"].error is not None
    assert found["perplexity"].error > 10
    assert found["kl"].value == pytest.approx(0.01)
    assert found["top1_agreement"].value == pytest.approx(147 / 150)


def test_what_is_no_number_is_not_accepted_and_what_was_not_measured_is_not_asked_for() -> None:
    accept = Accept(kl=0.02)
    assert accept.failures({}) == []
    assert accept.failures({"kl": {"value": 0.02, "error": 1.0}}) == []
    assert accept.failures({"kl": {"value": 0.0201}}) == ["kl is 0.0201, and accept says 0.02 at most"]
    assert accept.failures({"kl": {"value": None}, "greedy_agreement": {"value": math.nan}}) == [
        "kl is not a number, and accept says 0.02 at most",
        "greedy_agreement is nan, and accept says 0.9 at least",
    ]


def thirteen_billion() -> LlamaConfig:
    found = published("meta-llama/Llama-2-13b-chat-hf")
    assert found is not None
    return found


def test_a_13b_model_is_measured_in_four_gib_and_a_tighter_limit_takes_smaller_chunks() -> None:
    config = thirteen_billion()
    assert need(config, 2048, 32 * 512, 4) < 4 * GIB
    whole = choose_chunk(config, 32, 512, 4)
    assert whole == 2048
    limit = need(config, 1024, 32 * 512, 4)
    assert choose_chunk(config, 32, 512, 4, max_ram=limit) == 1024
    with pytest.raises(PlanError, match="verify needs at least") as caught:
        choose_chunk(config, 32, 512, 4, max_ram=GIB)
    assert "--max-ram" in caught.value.hint
