"""Promises about reports: the schema is published, a report survives its file, flags say what is not as claimed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.measuring.reports import made_report, made_run
from toolchain.errors import ArtifactError
from toolchain.measuring.report import Report, Request, read, schema, to_json, write


def test_the_schema_in_the_repository_is_the_schema(root: Path) -> None:
    """``scalellm bench schema > docs/report.schema.json`` writes it."""
    assert json.loads((root / "docs/report.schema.json").read_text()) == schema()


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    report = made_report()
    write(report, tmp_path / "new" / "report.json")
    assert read(tmp_path / "new" / "report.json") == report


def test_the_file_has_exactly_what_the_schema_names() -> None:
    raw, told = json.loads(to_json(made_report())), schema()
    assert raw.keys() == told["properties"].keys()
    for name, one in (
        ("Run", raw["runs"][0]),
        ("Conditions", raw["runs"][0]["conditions"]),
        ("Request", raw["runs"][0]["requests"][0]),
        ("Service", raw["services"][0]),
    ):
        assert one.keys() == told["$defs"][name]["properties"].keys()


def test_times_of_a_request_by_hand() -> None:
    one = Request(
        service=0,
        prompt=0,
        scheduled_s=1.0,
        sent_s=1.1,
        arrivals_s=(1.5, 1.6, 1.9),
        done_s=2.0,
        input_tokens=8,
        output_tokens=5,
    )
    assert one.ttft_s == pytest.approx(0.5)
    assert one.itl_s == pytest.approx(0.1)  # (1.9 - 1.5) / 4
    assert one.e2e_s == pytest.approx(1.0)


def test_a_summary_counts_failures_apart() -> None:
    run = made_run(ttfts=[0.1, 0.3], itl_s=0.01, failed=["RejectedError: busy"] * 2)
    found = run.summary()
    assert (found["succeeded"], found["failed"], found["errors"]) == (2, 2, {"RejectedError: busy": 2})
    assert found["ttft_s"]["p50"] == pytest.approx(0.2)
    assert found["ttft_s"]["count"] == 2
    assert found["tokens_per_s"] == pytest.approx(2 * 11 / run.wall_s)


def test_a_clean_run_has_no_flags() -> None:
    assert made_run(ttfts=[0.1, 0.2], itl_s=0.01).flags() == []


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"input_tokens": 600}, "input_tokens: 512 claimed, but the median is 600"),
        ({"output_tokens": 4}, "output_tokens: 11 claimed, but the median is 4"),
        ({"server_output_tokens": 20}, "counts other tokens than the server"),
        ({"sent_s": 0.5}, "500 ms late"),
    ],
)
def test_what_is_not_as_claimed_is_flagged(changes: dict[str, Any], flag: str) -> None:
    run = made_run(ttfts=[0.6, 0.7], itl_s=0.01)
    moved = run.model_copy(update={"requests": tuple(one.model_copy(update=changes) for one in run.requests)})
    assert any(flag in one for one in moved.flags()), moved.flags()


def test_repeated_prompts_are_flagged() -> None:
    flags = made_run(ttfts=[0.1, 0.2], itl_s=0.01, distinct_prompts=1).flags()
    assert flags == [
        "only 1 different prompts for 2 requests: a server that keeps prompts in its cache answers a known one sooner"
    ]


def test_services_are_summed_up_by_themselves_and_together() -> None:
    run = made_run(ttfts=[0.1, 0.2, 0.3, 0.4], itl_s=0.01, services=2)
    raw = json.loads(to_json(made_report(run)))["runs"][0]
    assert [one["ttft_s"]["p50"] for one in raw["summary_by_service"]] == pytest.approx([0.2, 0.3])
    assert raw["summary"]["ttft_s"]["count"] == 4


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"runs": []}', '{"runs": [{}]}'])
def test_what_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(ArtifactError, match=r"other\.json"):
        read(file)


def test_a_report_of_another_version_is_refused(tmp_path: Path) -> None:
    raw = json.loads(to_json(made_report())) | {"schema_version": 2}
    file = tmp_path / "new.json"
    file.write_text(json.dumps(raw))
    with pytest.raises(ArtifactError, match="schema_version"):
        read(file)
    assert Report.model_fields["schema_version"].default == 1
