"""Promises of ``bench compare``: ratios of like with like; what differs is named."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.measuring.reports import made_report, made_run
from toolchain.errors import RejectedError
from toolchain.measuring.compare import compare
from toolchain.measuring.report import Load

TTFTS = [0.1 + 0.002 * index for index in range(20)]


def test_twice_as_slow_is_a_ratio_of_two() -> None:
    a = made_report(made_run(ttfts=TTFTS, itl_s=0.01))
    b = made_report(made_run(ttfts=[2 * one for one in TTFTS], itl_s=0.02))
    lines = {line.quantity: line for line in compare(a, b)[0].lines}
    for name in ("ttft_s p50", "ttft_s p90", "itl_s p50", "e2e_s p50"):
        assert lines[name].ratio.value == pytest.approx(2)
        assert lines[name].ratio.low <= 2 <= lines[name].ratio.high
        assert lines[name].ratio.differs
    assert lines["tokens_per_s"].ratio.value == pytest.approx(0.5)
    assert lines["ttft_s p50"].a == pytest.approx(0.119)


def test_the_same_report_does_not_differ_from_itself() -> None:
    report = made_report(made_run(ttfts=TTFTS, itl_s=0.01))
    for line in compare(report, report)[0].lines:
        assert line.ratio.value == pytest.approx(1)
        assert line.ratio.low <= 1 + 1e-9
        assert line.ratio.high >= 1 - 1e-9


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"input_tokens": 1024}, "input_tokens: 512 in A, 1024 in B"),
        ({"prompts_sha256": "ff"}, "prompts_sha256: 00 in A, ff in B"),
        ({"load": Load(kind="closed", concurrency=4)}, "load: concurrency 1 in A, concurrency 4 in B"),
        ({"load": Load(kind="open", rate_per_s=2)}, "load: concurrency 1 in A, 2 requests/s in B"),
        ({"pattern": "staggered"}, "pattern: simultaneous in A, staggered in B"),
        ({"services": 2}, "services: 1 in A, 2 in B"),
        ({"sampling": "greedy, end of text ignored"}, "sampling: greedy in A"),
        ({"counted_by": "tokenizer 11"}, "counted_by: tokenizer 00 in A, tokenizer 11 in B"),
        ({"answered": 4}, "answers: 11 tokens in A, 4 in B"),
        ({"failed": ["x"] * 5}, "5 of 25 requests failed in B"),
    ],
)
def test_unlike_conditions_are_refused_by_name(other: dict[str, Any], reason: str) -> None:
    a = made_report(made_run(ttfts=TTFTS, itl_s=0.01))
    b = made_report(made_run(ttfts=TTFTS, itl_s=0.01, **other))
    with pytest.raises(RejectedError, match=re.escape(reason)):
        compare(a, b)


def test_other_prompts_are_allowed_on_request_only_for_role_play() -> None:
    a, b = (made_report(made_run(ttfts=TTFTS, itl_s=0.01, prompts_sha256=one)) for one in ("00", "ff"))
    assert compare(a, b, other_prompts=True)
    own = [made_report(made_run(ttfts=TTFTS, itl_s=0.01, prompts_sha256=one, prompt_set="my.jsonl")) for one in "ab"]
    with pytest.raises(RejectedError, match="prompts_sha256"):
        compare(*own, other_prompts=True)


def test_simulated_and_measured_are_not_compared() -> None:
    run = made_run(ttfts=TTFTS, itl_s=0.01)
    with pytest.raises(RejectedError, match="simulated: False in A, True in B"):
        compare(made_report(run), made_report(run, simulated=True))


def test_an_open_loop_has_no_ratio_of_throughputs() -> None:
    report = made_report(made_run(ttfts=TTFTS, itl_s=0.01, load=Load(kind="open", rate_per_s=2)))
    assert "tokens_per_s" not in {line.quantity for line in compare(report, report)[0].lines}
