"""Promises about the calibration report: one page, no network, every number of the JSON, nothing that breaks it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from toolchain.quantizers import report_html


def report(layers: int = 2) -> dict[str, Any]:
    groups = {
        "self_attn.q_proj": {"amax": 31.5, "outlier_channels": [[17, 31.5], [4, 12.25]], "alpha": 0.4,
                             "output_error_before": 0.081, "output_error_after": 0.0612},
        "mlp.down_proj": {"amax": 250.0, "outlier_channels": [[9, 250.0]], "alpha": None,
                          "output_error_before": None, "output_error_after": None},
    }  # fmt: skip
    names = [f"model.layers.{n}.mlp.up_proj" for n in range(14)]
    return {
        "weights": "int4",
        "method": "awq",
        "group_size": 128,
        "scales": "mse",
        "relative_error": {name: 0.05 + 0.001 * place for place, name in enumerate(names)},
        "worst": names[::-1][:10],
        "calibration": {
            "data": "built-in conversations",
            "digest": "ab" * 32,
            "samples": 64,
            "tokens": 256,
            "layers": [{"layer": n, "k_amax": 14.5 + n, "v_amax": 2.5, "groups": groups} for n in range(layers)],
        },
    }


class Page(HTMLParser):
    """Tags that are open, and the text of the cells, table by table."""

    VOID = frozenset({"meta", "rect", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.links: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [f"{tag} {name}" for name, _ in attrs if name in ("href", "src", "onload", "onclick")]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def test_page_is_whole_and_loads_nothing() -> None:
    text = report_html.render(report(), title="mine")
    page = Page(text)
    assert page.open == []
    assert page.links == []
    assert "<script" not in text
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text
    assert "<title>Calibration report: mine</title>" in text


def test_page_lists_the_ten_worst_matrices_worst_first() -> None:
    worst = Page(report_html.render(report())).tables[0][1:]
    assert [row[0] for row in worst] == [f"model.layers.{n}.mlp.up_proj" for n in range(13, 3, -1)]
    assert worst[0][1] == "0.063"


def test_page_shows_ranges_of_keys_and_values_and_their_ratio() -> None:
    ranges = Page(report_html.render(report())).tables[1][1:]
    assert [row[:4] for row in ranges] == [["0", "14.5", "2.5", "5.8"], ["1", "15.5", "2.5", "6.2"]]


def test_page_shows_alphas_and_output_errors_before_and_after() -> None:
    outputs = Page(report_html.render(report())).tables[2][1:]
    assert outputs[0][:6] == ["0", "self_attn.q_proj", "0.4", "0.081", "0.0612", "-24.4 %"]
    assert len(outputs) == 2


def test_page_shows_outlier_channels() -> None:
    outliers = Page(report_html.render(report())).tables[3][1:]
    assert [row[4] for row in outliers[:2]] == ["17: 31.5, 4: 12.25", "9: 250"]


def test_longest_bar_is_the_largest_value() -> None:
    text = report_html.render(report())
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([0-9.]+)"', text)]
    assert max(widths) == 120
    assert min(widths) >= 0


@pytest.mark.parametrize("missing", ["calibration", "relative_error", "layers"])
def test_sections_without_data_are_left_out(missing: str) -> None:
    data = report()
    if missing == "layers":
        data["calibration"]["layers"] = []
    else:
        del data[missing]
    page = Page(report_html.render(data))
    assert page.open == []
    assert len(page.tables) == (3 if missing == "relative_error" else 1)


def test_zero_ranges_and_errors_divide_by_nothing() -> None:
    data = report()
    for layer in data["calibration"]["layers"]:
        layer |= {"k_amax": 0.0, "v_amax": 0.0}
        for group in layer["groups"].values():
            group |= {"amax": 0.0, "output_error_before": 0.0, "output_error_after": 0.0}
    data["relative_error"] = dict.fromkeys(data["relative_error"], 0.0)
    assert Page(report_html.render(data)).open == []


def test_names_from_the_files_cannot_break_the_page() -> None:
    data = report()
    data["calibration"]["data"] = "</dl><script>alert(1)</script>.txt"
    data["relative_error"] = {"<b>": 1.0}
    text = report_html.render(data, title="<i>")
    assert "<script>" not in text
    assert "<b>" not in text
    assert Page(text).tables[0][1][0] == "<b>"


def test_report_of_a_large_model_stays_small() -> None:
    data = report(layers=80)
    assert len(report_html.render(data)) < 3 * len(json.dumps(data, indent=2)) + 10_000
