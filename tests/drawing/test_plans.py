"""Promises of ``plan --plot``: every term of the memory in true proportion, floors and limits, what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.drawn import Picture
from toolchain.cli import verbs
from toolchain.drawing import Lines, Stacks, plans
from toolchain.errors import ArtifactError, PlanError, RecipeError
from toolchain.family import published
from toolchain.planning.load import Load, Slo
from toolchain.planning.option import Asked, options
from toolchain.planning.plan import make_plan
from toolchain.recipe import load_recipe
from toolchain.units import GIB

MODEL = "meta-llama/Llama-2-13b-chat-hf"
TOO_LARGE = """
model: meta-llama/Llama-2-13b-chat-hf
device: t4
limits: {max_batch_size: 1, max_seq_len: 1024}
"""


def plan(*words: str) -> Result:
    return CliRunner().invoke(verbs, ["plan", *words])


@pytest.fixture(scope="module")
def asked() -> Asked:
    config = published(MODEL)
    assert config
    recipe = load_recipe("rtx4090").model_copy(update={"model": MODEL})
    return Asked(recipe, config, Load(1024, 256), Slo(ttft_s=1.0))


def test_a_plans_bar_is_its_memory_term_by_term(tmp_path: Path) -> None:
    result = plan("--recipe", "rtx4090", "--model", MODEL, "--plot", str(tmp_path / "plan.svg"), "--json")
    memory = json.loads(result.stdout)["memory"]
    drawn = Picture(tmp_path / "plan.svg")
    scale = drawn.width("room-0") / memory["available"]
    for number, line in enumerate(memory["lines"]):
        assert drawn.width(f"part-0-{number}") == pytest.approx(line["bytes"] * scale, abs=1.5), line["name"]
        assert any(text.startswith(f"{line['name']} ") for text in drawn.texts), line["name"]
    assert "beyond-0" not in drawn.ids
    assert "23.01 of 23.99 GiB, 5 sequences at once" in drawn.texts


def test_what_does_not_fit_is_drawn_before_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "large.yaml").write_text(TOO_LARGE)
    result = plan("--recipe", str(tmp_path / "large.yaml"), "--plot", str(tmp_path / "plan.svg"))
    assert isinstance(result.exception, PlanError)
    drawn = Picture(tmp_path / "plan.svg")
    missing = 27.03 - 15.0  # the refusal's own figures, in GiB
    assert drawn.width("beyond-0") / drawn.width("room-0") == pytest.approx(missing / 15.0, abs=0.05)
    assert any(text.startswith("does not fit: ") for text in drawn.texts)


def test_curves_are_the_plans_estimates_with_floor_band_and_limit(asked: Asked) -> None:
    made = make_plan(asked.recipe, asked.config)
    assert made.latency
    figures = list(plans.plan_figures(made, asked, list(options(asked, "rtx4090"))))
    chart = figures[1].chart
    assert isinstance(chart, Lines)
    lines = {line.name: line for line in chart.lines}
    for told in made.latency.ttft:
        index = [x for x, _ in lines["fp8"].points].index(told.tokens)
        assert lines["fp8"].points[index][1] == told.seconds
        assert lines["fp8"].floor[index] == told.floor_s
        assert lines["fp8"].high[index] == pytest.approx(told.seconds * (1 + made.latency.ttft_band.worst))
    assert lines["fp16: does not fit"].faint
    assert [level.value for level in chart.levels] == [1.0]
    assert all(
        low <= y <= high for one in chart.lines for (_, y), low, high in zip(one.points, one.low, one.high, strict=True)
    )


def test_unpacked_weights_have_the_floor_of_what_they_are_unpacked_to(asked: Asked) -> None:
    figures = list(plans.plan_figures(make_plan(asked.recipe, asked.config), asked, list(options(asked, "rtx4090"))))
    assert isinstance(figures[1].chart, Lines)
    lines = {line.name.split(",")[0].split(":")[0]: line for line in figures[1].chart.lines}
    assert lines["int4"].floor[-1] == lines["fp16"].floor[-1] > lines["fp8"].floor[-1]
    assert "not time" in figures[1].caption


def test_a_comparison_has_every_device_and_a_score_for_each_price(tmp_path: Path) -> None:
    words = ("--recipe", "llama2-13b", "--device", "rtx4090,t4,h100", "--slo", "ttft=1s", "--price", "2")
    assert plan(*words, "--plot", str(tmp_path / "all.svg")).exit_code == 0
    drawn = Picture(tmp_path / "all.svg")
    assert {"Memory of the device", "Economic score by device", "limit: 1 s"} <= set(drawn.texts)
    assert {"RTX 4090", "T4", "H100 80GB"} <= set(drawn.texts)
    found = json.loads(plan(*words, "--json").stdout)["options"]
    best = {one["device"]: 0.0 for one in found}
    for one in found:
        if one["score"] and one["score"]["value"]:
            best[one["device"]] = max(best[one["device"]], one["score"]["value"])
    first, second, *_ = sorted(best.values(), reverse=True)
    assert drawn.width("bar-1") / drawn.width("bar-0") == pytest.approx(second / first, abs=0.01)
    assert f"{first:.2f}" in drawn.texts


def test_one_device_is_compared_by_formats_and_the_too_large_one_stands_out(tmp_path: Path) -> None:
    words = ("--model", MODEL, "--device", "rtx4090", "--plot", str(tmp_path / "one.html"))
    assert plan(*words).exit_code == 0
    text = (tmp_path / "one.html").read_text(encoding="utf-8")
    assert "does not fit: " in text
    assert "Economic score on the RTX 4090" in text


def test_a_cpu_has_memory_and_no_estimates(tmp_path: Path) -> None:
    assert plan("--recipe", "tiny", "--model", MODEL, "--plot", str(tmp_path / "cpu.svg")).exit_code == 0
    assert "time to first token" not in Picture(tmp_path / "cpu.svg").texts


@pytest.mark.parametrize(("name", "error"), [("plan.pdf", RecipeError), ("none/plan.svg", ArtifactError)])
def test_a_file_that_cannot_be_is_refused_before_the_plan(tmp_path: Path, name: str, error: type[Exception]) -> None:
    result = plan("--recipe", "no-such-recipe", "--plot", str(tmp_path / name))
    assert isinstance(result.exception, error)


def test_no_term_of_the_memory_is_left_without_a_color(asked: Asked) -> None:
    for name in ("rtx4090", "t4", "cpu", "a100-x3"):
        recipe = load_recipe(name).model_copy(update={"model": MODEL})
        memory = make_plan(recipe, asked.config, host_memory_bytes=64 * GIB).memory
        figure = plans.refused_figures(Asked(recipe, asked.config, Load(1, 1)), memory)[0]
        assert isinstance(figure.chart, Stacks)
        colors = [(part.color, part.shade) for part in figure.chart.stacks[0].parts]
        assert len(colors) == len(set(colors)), [part.name for part in figure.chart.stacks[0].parts]
