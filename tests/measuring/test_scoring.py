"""Promises of ``score``: the formula with its inputs beside it; nothing simulated, unlike or unpriced has a score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.drawn import Picture
from tests.measuring.reports import made_report, made_run
from toolchain.cli import verbs
from toolchain.errors import ArtifactError, RecipeError, RejectedError
from toolchain.measuring.report import Load, Report, write

FAST = [0.1] * 10


def score(folder: Path, reports: dict[str, Report], *words: str) -> Result:
    for name, report in reports.items():
        write(report, folder / name)
    return CliRunner().invoke(verbs, ["score", *(str(folder / name) for name in reports), *words])


def rows(result: Result) -> list[dict[str, Any]]:
    if result.exception:
        raise result.exception
    return list(json.loads(result.stdout)["rows"])


def test_a_score_by_hand_with_all_its_inputs(tmp_path: Path) -> None:
    report = made_report(made_run(ttfts=[0.1, 0.2, 0.3], itl_s=0.01))
    found = rows(score(tmp_path, {"a.json": report}, "--price", "$0.5", "--vendor", "Ours", "--json"))[0]
    assert found["score"] == pytest.approx(1 / (0.2 * 0.5))
    assert found["latency_s"] == pytest.approx(0.2)
    assert (found["statistic"], found["input_tokens"], found["load"]) == ("TTFT p50", 512, "concurrency 1")
    assert (found["price"]["usd_per_hour"], found["price"]["vendor"]) == (0.5, "Ours")
    assert found["price"]["date"]


def test_services_count_and_the_slow_one_does_not(tmp_path: Path) -> None:
    three = made_run(ttfts=[0.3] * 9, itl_s=0.01, services=3, requests=10)
    found = rows(
        score(
            tmp_path,
            {"x1.json": made_report(made_run(ttfts=FAST, itl_s=0.01)), "x3.json": made_report(three)},
            *("--price", "2", "--vendor", "Ours", "--threshold", "200ms", "--json"),
        )
    )
    assert found[0]["score"] == pytest.approx(1 / (0.1 * 2))
    assert (found[1]["score"], found[1]["services"]) == (None, 3)


def test_break_even_makes_both_scores_equal(tmp_path: Path) -> None:
    a, b = made_report(made_run(ttfts=FAST, itl_s=0.01)), made_report(made_run(ttfts=[0.2] * 10, itl_s=0.01))
    price = ("--price", "rtx4090=0.64", "--vendor", "Ours", "--json")
    found = rows(score(tmp_path, {"a.json": a, "b.json": b}, *price))
    assert found[0]["break_even_usd_per_hour"] == pytest.approx(1.28)
    assert found[1]["break_even_usd_per_hour"] == pytest.approx(0.32)


def test_the_table_of_prices_is_asked_by_vendor(tmp_path: Path) -> None:
    report = made_report(made_run(ttfts=FAST, itl_s=0.01))
    found = rows(score(tmp_path, {"a.json": report}, "--vendor", "runpod", "--json"))[0]
    assert (found["price"]["usd_per_hour"], found["price"]["date"]) == (0.34, "2026-09-25")


def test_the_statistic_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    report = made_report(made_run(ttfts=[0.1, 0.1, 0.1, 0.5], itl_s=0.01))
    words = ("--price", "1", "--vendor", "Ours", "--json", "--statistic")
    assert rows(score(tmp_path, {"a.json": report}, *words, "mean"))[0]["latency_s"] == pytest.approx(0.2)
    assert rows(score(tmp_path, {"a.json": report}, *words, "p90"))[0]["latency_s"] == pytest.approx(0.38)


def test_fedmls_table_is_marked_as_published(tmp_path: Path) -> None:
    report = made_report(made_run(ttfts=FAST, itl_s=0.01))
    result = score(tmp_path, {"a.json": report}, "--price", "1", "--vendor", "Ours", "--published", "--json")
    beside = json.loads(result.stdout)["published"]
    assert len(beside) == 7
    assert not any(one["measured"] for one in beside)


def test_the_persons_table_has_the_inputs(tmp_path: Path) -> None:
    report = made_report(made_run(ttfts=FAST, itl_s=0.01))
    words = ("--price", "$0.5", "--vendor", "Ours", "--price-date", "2026-11-01")
    text = score(tmp_path, {"a.json": report}, *words).stdout
    for word in ("20.000", "rtx4090", "100.0 ms", "TTFT p50", "$0.5/h", "Ours, on-demand, 2026-11-01", "512 tokens in"):
        assert word in text


def test_bars_are_as_long_as_the_scores_and_titles_are_no_markup(tmp_path: Path) -> None:
    reports = {
        "a.json": made_report(made_run(ttfts=FAST, itl_s=0.01), title="<ours> & more"),
        "b.json": made_report(made_run(ttfts=[0.4] * 10, itl_s=0.01), title="slow"),
        "c.json": made_report(made_run(ttfts=[2.0] * 10, itl_s=0.01), title="too slow"),
    }
    words = ("--price", "1", "--vendor", "Ours", "--threshold", "1s", "--plot", str(tmp_path / "bars.svg"))
    assert score(tmp_path, reports, *words).exit_code == 0
    drawn = Picture(tmp_path / "bars.svg")
    assert drawn.width("bar-1") / drawn.width("bar-0") == pytest.approx(1 / 4, abs=0.01)
    assert drawn.width("bar-2") == 0
    assert {"<ours> & more", "beyond 1 s", "100 ms, $1/h Ours"} <= set(drawn.texts)


@pytest.mark.parametrize("name", ["bars.pdf", "bars", "no/such/folder/bars.svg"])
def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path: Path, name: str) -> None:
    report = made_report(made_run(ttfts=FAST, itl_s=0.01))
    result = score(tmp_path, {"a.json": report}, "--price", "1", "--vendor", "Ours", "--plot", str(tmp_path / name))
    assert isinstance(result.exception, RecipeError | ArtifactError)
    assert name in result.exception.message
    assert not list(tmp_path.rglob("bars*"))


OTHER = made_run(ttfts=FAST, itl_s=0.01)


@pytest.mark.parametrize(
    ("reports", "message"),
    [
        ([made_report(OTHER, simulated=True)], "is simulated"),
        ([made_report(OTHER), made_report(made_run(ttfts=FAST, itl_s=0.01, input_tokens=1024))], "512 in A, 1024 in B"),
        ([made_report(OTHER), made_report(made_run(ttfts=FAST, itl_s=0.01, prompts_sha256="1"))], "prompts_sha256"),
        ([made_report(made_run(ttfts=FAST, itl_s=0.01, failed=["busy"] * 3))], "3 of 13 requests failed"),
        (
            [
                made_report(made_run(ttfts=FAST, itl_s=0.01, services=2, pattern=pattern))
                for pattern in ("staggered", "simultaneous")
            ],
            "pattern of several services: simultaneous and staggered",
        ),
        (
            [made_report(OTHER, made_run(ttfts=FAST, itl_s=0.01, load=Load(kind="closed", concurrency=4)))],
            "several runs",
        ),
    ],
)
def test_what_must_not_be_scored_is_refused(tmp_path: Path, reports: list[Report], message: str) -> None:
    named = {f"{number}.json": report for number, report in enumerate(reports)}
    result = score(tmp_path, named, "--price", "1", "--vendor", "Ours")
    assert isinstance(result.exception, RejectedError)
    assert message in result.exception.message


def test_one_of_several_runs_is_named(tmp_path: Path) -> None:
    four = made_run(ttfts=[0.4] * 10, itl_s=0.01, load=Load(kind="closed", concurrency=4))
    words = ("--price", "1", "--vendor", "Ours", "--concurrency", "4", "--json")
    assert rows(score(tmp_path, {"a.json": made_report(OTHER, four)}, *words))[0]["latency_s"] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--price", "$3000", "--vendor", "x"), "not a price"),
        (("--price", "1"), "whose price"),
        (("--threshold", "soon"), "is not a time"),
    ],
)
def test_typing_errors_are_named(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    assert message in score(tmp_path, {"a.json": made_report(OTHER)}, *words).output


def test_without_a_price_there_is_no_score(tmp_path: Path) -> None:
    result = score(tmp_path, {"a.json": made_report(OTHER)})
    assert isinstance(result.exception, RejectedError)
    assert "RunPod on-demand $0.64 (2024-02-01)" in result.exception.message
