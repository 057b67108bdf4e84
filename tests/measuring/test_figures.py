"""Promises about drawn reports: what the charts hold is what was measured, and a page needs nothing but itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.measuring.reports import made_report, made_reports, made_run
from toolchain.cli import verbs
from toolchain.drawing import Figure, Lines
from toolchain.measuring.figures import figures
from toolchain.measuring.report import Load, Report, write
from toolchain.measuring.statistics import percentile
from toolchain.measuring.tables import tables


def drawn(*reports: Report) -> dict[str, Lines]:
    charts = {one.title: one.chart for one in figures(reports) if isinstance(one, Figure)}
    assert all(isinstance(chart, Lines) for chart in charts.values())
    return charts  # type: ignore[return-value]


def test_a_page_of_two_reports_has_every_figure() -> None:
    found = drawn(*made_reports())
    assert list(found) == [
        "Time to first token against prompt length",
        "Throughput against latency",
        "Time to first token, 512 tokens in",
        "Time to first token, 2048 tokens in",
        "Inter-token latency, 512 tokens in",
        "Inter-token latency, 2048 tokens in",
        "Memory of the servers",
        "Memory of the GPUs",
    ]
    for title, chart in found.items():
        assert len({line.color for line in chart.lines}) == len(chart.lines), title
        assert len({line.name for line in chart.lines}) == len(chart.lines), title


def test_lengths_have_medians_and_the_plan_stands_beside_them() -> None:
    ours, theirs = made_reports()
    first, second, plan = drawn(ours, theirs)["Time to first token against prompt length"].lines
    values = [run.values("ttft_s") for run in ours.runs if run.conditions.load.concurrency == 1]
    assert first.points == ((512.0, percentile(values[0], 50)), (2048.0, percentile(values[1], 50)))
    assert first.low == tuple(percentile(one, 10) for one in values)
    assert second.points[0][1] > first.points[0][1]
    assert ours.predicted is not None
    assert plan.points == tuple((one.tokens, one.seconds) for one in ours.predicted.ttft)
    assert plan.floor == tuple(one.floor_s for one in ours.predicted.ttft)
    assert plan.high == tuple(one.seconds * 1.3 for one in ours.predicted.ttft)


def test_a_distribution_goes_through_its_percentiles() -> None:
    values = [0.1, 0.4, 0.2, 0.3]
    (line,) = drawn(made_report(made_run(ttfts=values, itl_s=0.01)))[
        "Time to first token, 512 tokens in, concurrency 1"
    ].lines
    shares = {share: x for x, share in line.points}
    assert all(shares[percent] == pytest.approx(percentile(values, percent)) for percent in (0, 50, 90, 99, 100))
    assert [x for x, _ in line.points] == sorted(x for x, _ in line.points)


def test_prompts_of_many_lengths_are_told_in_groups() -> None:
    run = made_run(ttfts=[0.01 * (1 + index) for index in range(32)], itl_s=0.01, input_tokens=None)
    (line,) = drawn(made_report(run))["Time to first token against prompt length"].lines
    assert len(line.points) == 8
    assert line.points[0] == (640.0, pytest.approx(0.025))  # requests 1 to 4: 256 to 1024 tokens, 10 to 40 ms


def test_throughput_has_a_point_for_each_load() -> None:
    runs = [
        made_run(ttfts=[0.1 * many] * 4, itl_s=0.01, load=Load(kind="closed", concurrency=many)) for many in (1, 2, 8)
    ]
    (line,) = drawn(made_report(*runs))["Throughput against latency, 512 tokens in"].lines
    assert line.points == tuple(
        (pytest.approx(percentile(run.values("ttft_s"), 50)), run.summary()["tokens_per_s"]) for run in runs
    )


def test_memory_goes_on_from_run_to_run() -> None:
    ours = made_reports()[0]
    (line,) = drawn(ours)["Memory of the servers"].lines
    assert [x for x, _ in line.points] == sorted(x for x, _ in line.points)
    assert len(line.points) == sum(len(run.memory) for run in ours.runs)
    assert line.points[-1][0] > sum(run.wall_s for run in ours.runs[:-1])


def test_what_was_not_measured_is_not_drawn() -> None:
    nothing = made_run(ttfts=[], itl_s=0.01, failed=["RejectedError: busy"] * 3).model_copy(update={"wall_s": 1.0})
    assert drawn(made_report(nothing)) == {}
    flags = {one.title: one.table_rows for one in tables([made_report(nothing)])}["Red flags"]
    assert flags[0][2].startswith("3 of 3 requests failed")


def test_tables_tell_conditions_passport_and_the_distance_to_the_plan() -> None:
    found = {one.title: one for one in tables(made_reports())}
    assert ("limits: max_seq_len", "4096", "4096") in found["Engine passport"].table_rows
    assert ("sampling", "greedy", "greedy") in found["Conditions"].table_rows
    told = [row[0] for row in found["Conditions"].table_rows]
    assert told[3:-2] == [
        *("prompt set", "pattern", "services", "requests", "warmup", "streaming", "sampling", "counted by"),
    ]  # in the report's own order, each time
    rows = found["Time to first token beside the plan"].table_rows
    assert [(row[0], row[1], row[3]) for row in rows] == [
        ("TensorRT-LLM on an RTX 4090", "512", "35.0 ms"),
        ("TensorRT-LLM on an RTX 4090", "2048", "140.0 ms"),
    ]


@pytest.mark.parametrize("ending", ["html", "svg", "png"])
def test_the_verb_draws_a_page_or_a_picture(tmp_path: Path, ending: str) -> None:
    evil = made_report(title="<script>alert(1)</script>")
    for name, one in (("a.json", evil), ("b.json", made_reports()[1])):
        write(one, tmp_path / name)
    out = tmp_path / f"out.{ending}"
    words = ["bench", "report", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "-o", str(out), "--json"]
    done = CliRunner().invoke(verbs, words, catch_exceptions=False)
    assert json.loads(done.output)["drawn"] == str(out)
    data = out.read_bytes()
    assert data.startswith({"html": b"<!doctype html>", "svg": b"<?xml", "png": b"\x89PNG"}[ending])
    assert b"<script" not in data
    outside = [word for word in (b"src=", b"href=", b"@import", b"url(") if word in data.replace(b'xlink:href="#', b"")]
    assert ending == "png" or [word for word in outside if word != b"url("] == []


def test_a_place_where_nothing_can_be_drawn_is_refused_before_measuring(tmp_path: Path) -> None:
    words = ["bench", "--tokenizer", str(tmp_path), "--url", "http://127.0.0.1:9", "--report", str(tmp_path / "x.pdf")]
    done = CliRunner().invoke(verbs, words)
    assert ".svg, .png or .html" in str(done.exception)
