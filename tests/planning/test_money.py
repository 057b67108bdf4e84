"""Promises about money: the score's formula, and FEDML's table taken apart by arithmetic alone."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from toolchain import workspace
from toolchain.device import Price
from toolchain.planning.money import (
    ANCHORS,
    Row,
    break_even_usd_per_hour,
    estimated_prompt,
    longest_prompt,
    predicted_s,
    price_sets,
    published_rows,
    score,
    tokens_per_usd,
)

SCRIPTS = Path(__file__).parents[2] / "scripts"


def row(name: str) -> Row:
    return next(one for one in published_rows() if one.name == name)


def test_score_is_services_over_latency_times_price() -> None:
    assert score(3, 0.2, 1.5).value == pytest.approx(10)
    assert score(3, 0.2, 1.5, threshold_s=0.2).value == pytest.approx(10)


def test_a_latency_beyond_the_threshold_has_no_score() -> None:
    made = score(1, 1.01, 0.5, threshold_s=1.0)
    assert made.value is None
    assert (made.latency_s, made.usd_per_hour, made.threshold_s) == (1.01, 0.5, 1.0)


@pytest.mark.parametrize(("services", "latency_s", "usd"), [(0, 1.0, 1.0), (1, 0.0, 1.0), (1, 1.0, -1.0)])
def test_score_refuses_what_is_not_positive(services: int, latency_s: float, usd: float) -> None:
    with pytest.raises(ValueError, match="must be more than 0"):
        score(services, latency_s, usd)


def test_tokens_per_dollar() -> None:
    assert tokens_per_usd(1000, 3.6) == pytest.approx(1_000_000)
    with pytest.raises(ValueError, match="usd_per_hour"):
        tokens_per_usd(1000, 0)


def test_at_the_break_even_price_both_score_the_same() -> None:
    rival = score(3, 0.126, 3.67)
    price = break_even_usd_per_hour(1, 0.08, rival)
    assert price is not None
    assert score(1, 0.08, price).value == pytest.approx(rival.value)
    assert break_even_usd_per_hour(1, 0.08, score(1, 2.0, 0.5, threshold_s=1.0)) is None


@pytest.mark.parametrize(
    ("name", "product"),
    [
        ("a100 vllm", 0.559175),
        ("a100 x1", 0.293305),
        ("a100 x2", 0.295978),
        ("a100 x3", 0.461854),
        ("l4 x1", 0.151966),
        ("t4 x1", 0.876450),
        ("rtx4090 x1", 0.049301),
    ],
)
def test_a_published_score_pins_down_latency_times_price(name: str, product: float) -> None:
    assert row(name).latency_x_price == pytest.approx(product, abs=1e-6)


def test_all_rows_of_the_a100_have_one_price_because_1_21_comes_out_exactly() -> None:
    assert row("a100 vllm").latency_x_price / row("a100 x3").latency_x_price == pytest.approx(1.21, abs=0.005)


def test_two_services_were_measured_without_contention_and_three_with_it() -> None:
    alone = row("a100 x1").latency_x_price
    assert row("a100 x2").latency_x_price / alone == pytest.approx(1.009, abs=5e-4)
    assert row("a100 x3").latency_x_price / alone == pytest.approx(1.575, abs=5e-4)


def test_the_t4_is_under_a_second_only_above_88_cents() -> None:
    assert row("t4 x1").latency_s(0.526) > 1
    assert row("t4 x1").latency_s(0.876) > 1
    assert row("t4 x1").latency_s(0.877) < 1


def test_like_for_like_prices_of_one_vendor_do_not_give_the_published_speedup() -> None:
    both = [
        made
        for made in price_sets()
        if {(made.prices[name].vendor, made.prices[name].kind) for name in ("a100-80gb", "rtx4090")}
        == {("RunPod", "on-demand")}
    ]
    assert both
    assert not any(made.holds for made in both)
    assert all(made.speedup > 4 for made in both)


def test_a_price_set_means_the_latencies_of_the_scores_and_says_which_claims_break() -> None:
    every = list(price_sets())
    holding = [made for made in every if made.holds]
    assert 0 < len(holding) < len(every)
    for made in every:
        for one in published_rows():
            usd = made.prices[one.device].usd_per_hour
            assert score(one.services, made.latencies_s[one.name], usd).value == pytest.approx(one.score)
        assert made.speedup == pytest.approx(made.latencies_s[ANCHORS[0]] / made.latencies_s[ANCHORS[1]])
    for made in holding:
        assert max(made.latencies_s.values()) <= 1
        assert made.speedup == pytest.approx(1.88, rel=0.1)
    assert {made.prices["t4"].usd_per_hour for made in holding} == {1.204}
    assert {made.prices["a100-80gb"].usd_per_hour for made in holding} == {1.69, 3.67}


def test_no_price_set_leaves_room_for_a_prompt_of_4k() -> None:
    holding = [made for made in price_sets() if made.holds]
    assert holding
    assert all(0 < made.longest_prompt < 2048 for made in holding)


def test_the_longest_prompt_is_bounded_by_the_floor_and_ours_is_shorter() -> None:
    one = row("t4 x1")
    assert 2304 < longest_prompt(one, 1.0) < 2560  # 65 TFLOPS at 100 %
    assert 0 < estimated_prompt(one, 1.0) < longest_prompt(one, 1.0)
    assert longest_prompt(one, 1e-6) == 0
    assert predicted_s(one, estimated_prompt(one, 1.0)) <= 1.0 < predicted_s(one, estimated_prompt(one, 1.0) + 1)


def test_other_prices_can_be_asked() -> None:
    def fixed(name: str) -> list[Price]:
        usd = {"a100-80gb": 3.67, "l4": 1.0, "t4": 1.204, "rtx4090": 0.64}[name]
        return [Price(name, usd, "mine", "", None, "on-demand", "2026-01-01", "none", False)]

    (made,) = price_sets(fixed)
    assert made.holds
    assert made.latencies_s["a100 x1"] == pytest.approx(0.0799, abs=1e-4)


def test_the_table_names_its_source() -> None:
    assert workspace.facts("score_table")["source"].startswith("https://")


def test_the_page_of_the_scores_is_what_its_script_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("score_table")
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "python scripts/score_table.py --write"
