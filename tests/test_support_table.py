"""SUPPORT.md is what the plan decides, and says what is known of a few releases for certain."""

from __future__ import annotations

from scripts import support_table
from toolchain.device import device


def test_the_page_is_current() -> None:
    assert support_table.main(["--check"]) == 0, "python scripts/support_table.py"


def test_a_t4_ends_with_0_13_and_has_no_fp8() -> None:
    """TensorRT-LLM issue 2620: support of the T4 ended with 0.14."""
    assert support_table.row(device("t4"), "int4", "int8").engine == "0.12.0 - 0.13.0"
    refused = support_table.row(device("t4"), "fp8", "fp8")
    assert (refused.engine, refused.llmapi) == ("no", "no")
    assert "has no FP8" in refused.remarks[0]


def test_fp8_on_an_l4_runs_from_the_first_release_to_the_last_engine() -> None:
    found = support_table.row(device("l4"), "fp8", "fp8")
    assert (found.engine, found.llmapi, found.reuse) == ("0.12.0 - 1.2.1", "1.0.0 - 1.2.1", "yes")


def test_gaps_between_releases_are_shown() -> None:
    assert support_table.spans(["0.12.0", "0.13.0", "0.16.0"], "tensorrt_engine") == "0.12.0 - 0.13.0, 0.16.0"
    assert support_table.spans([], "tensorrt_engine") == "no"
