"""Promises about the last five minutes of a gateway: quantiles against numpy, rates, and memory that does not grow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolchain.gateway.kv import Blocks, Drafts, blocks_of, drafts_of
from toolchain.gateway.recent import SLOT_S, SLOTS, Recent


class Clock:
    """A time that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@settings(deadline=None)
@given(st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=300))
def test_quantiles_are_within_three_percent_of_what_was_measured(times: list[float]) -> None:
    recent = Recent(Clock())
    for time in times:
        recent.first_token(time)
    found = recent.window(60)
    for q, told in ((0.5, found.ttft_ms_p50), (0.9, found.ttft_ms_p90)):
        expected = 1000 * np.quantile(times, q, method="inverted_cdf")
        assert told == pytest.approx(expected, rel=0.03)


def test_between_tokens_every_token_counts(clock: Clock) -> None:
    recent = Recent(clock)
    recent.tokens(1)  # the first one has none before it
    recent.tokens(9, 0.010)
    recent.tokens(1, 1.0)
    found = recent.window(60)
    assert found.itl_ms_p50 == pytest.approx(10, rel=0.03)
    assert found.itl_ms_p90 == pytest.approx(10, rel=0.03)
    clock.now += 10
    assert recent.window(60).tokens_per_s == pytest.approx(11 / 10)


def test_rates_are_of_the_time_that_there_was(clock: Clock) -> None:
    recent = Recent(clock)
    for _second in range(30):
        recent.ended(failed=False)
        clock.now += 1
    assert recent.window(60).requests_per_s == pytest.approx(1)
    for _second in range(90):
        recent.ended(failed=True)
        recent.ended(failed=True)
        clock.now += 1
    found = recent.window(60)
    assert found.requests_per_s == pytest.approx(2, rel=0.1)
    assert found.failed == found.requests
    assert recent.window(300).requests == 30 + 180


def test_what_is_older_is_forgotten(clock: Clock) -> None:
    recent = Recent(clock)
    recent.first_token(1.0)
    recent.ended(failed=False)
    clock.now += 70
    assert recent.window(60).ttft_ms_p50 is None
    assert recent.window(60).requests == 0
    assert recent.window(300).requests == 1
    clock.now += 300
    assert recent.window(300).requests == 0
    assert set(recent.series().ttft_ms_p50) == {None}


def test_a_series_has_every_slot_and_the_last_is_now(clock: Clock) -> None:
    recent = Recent(clock)
    recent.tokens(50)
    clock.now += 3 * SLOT_S
    recent.tokens(5)
    found = recent.series()
    assert len(found.tokens_per_s) == SLOTS
    assert found.tokens_per_s[-4:] == [10, 0, 0, 1]
    assert sum(found.tokens_per_s[:-4]) == 0


def test_a_day_of_requests_takes_no_more_memory_than_five_minutes(clock: Clock) -> None:
    recent = Recent(clock)
    sizes = []
    for number in range(20_000):
        recent.first_token(1e-6 * (number % 9973) ** 3)
        recent.tokens(1, 1e-7 * (number % 9941) ** 2)
        clock.now += 4.3
        sizes.append(sum(len(slot.ttft) + len(slot.itl) for slot in recent._slots))
    assert len(recent._slots) <= SLOTS
    assert max(sizes) <= 4 * SLOTS


METRICS = """
# TYPE nv_trt_llm_kv_cache_block_metrics gauge
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="tokens_per",model="tensorrt_llm",version="1"} 64
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used",model="tensorrt_llm",version="1"} 12
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="free",model="tensorrt_llm",version="1"} 6227
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="tensorrt_llm",version="1"} 6239
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used",model="tensorrt_llm_draft",version="1"} 3
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="tensorrt_llm_draft",version="1"} 9
"""
"""As TensorRT-LLM's backend prints it: README of triton-inference-server/tensorrtllm_backend, "Triton Metrics"."""


def test_the_cache_of_tensorrt_llm_is_read_from_its_metrics(tmp_path: Path) -> None:
    assert blocks_of(METRICS, None) == Blocks(12, 6239)
    (tmp_path / "status.json").write_text('{"kv_usage_percent": 50.0, "kv_blocks": 10}')
    assert blocks_of(METRICS, tmp_path / "status.json") == Blocks(12, 6239)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"kv_usage_percent": 12.5, "kv_blocks": 1024}', Blocks(128, 1024)),
        ('{"kv_usage_percent": 12.5, "kv_blocks": 0}', None),
        ('{"running": 0}', None),
        ("half a f", None),
        ("[]", None),
    ],
)
def test_the_cache_of_our_own_engines_is_read_from_their_file(tmp_path: Path, text: str, expected: object) -> None:
    (tmp_path / "status.json").write_text(text)
    assert blocks_of("other_metric 1\n", tmp_path / "status.json") == expected
    assert blocks_of("nv_trt_llm_kv_cache_block_metrics{ 1\n", tmp_path / "nothing.json") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [('{"drafted": 40, "accepted": 31, "kv_blocks": 8}', Drafts(40, 31)), ('{"kv_blocks": 8}', None),
     ('{"drafted": 4}', None), ("[1]", None), ("half a f", None)],
)  # fmt: skip
def test_drafts_are_read_from_the_engines_file(tmp_path: Path, text: str, expected: object) -> None:
    (tmp_path / "status.json").write_text(text)
    assert drafts_of(tmp_path / "status.json") == expected
    assert drafts_of(tmp_path / "nothing.json") is drafts_of(None) is None
