"""Promises about choices: every option is there, the order is the goal's and nothing else's, money is told whole."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import golden
from toolchain.device import Price, devices
from toolchain.family import published
from toolchain.planning.choice import GOALS, Choice, best_of_each, choose, dominates, objectives, rank, rounded
from toolchain.planning.choice_table import break_even_line, sheet
from toolchain.planning.latency import unpacks
from toolchain.planning.load import Load, Slo
from toolchain.planning.option import MOST_SERVICES, Asked, Option
from toolchain.planning.plan import make_plan
from toolchain.planning.price_list import PriceList
from toolchain.quantization import WEIGHTS
from toolchain.recipe import Recipe, load_recipe, parse_recipe
from toolchain.variant import for_device

TODAY = datetime.date(2024, 6, 1)
_CONFIG = published("meta-llama/Llama-2-13b-chat-hf")
assert _CONFIG is not None
CONFIG = _CONFIG
SEVEN = published("meta-llama/Llama-2-7b-chat-hf")
assert SEVEN is not None
LOAD = Load(1024, 256)
ALL = list(devices())
GPUS = [name for name in ALL if name != "cpu"]


def plain(prompt: int = 1024, output: int = 256, more: str = "") -> Recipe:
    text = (
        f"model: some/folder\ndevice: l4\nlimits: {{max_seq_len: {prompt + output}, max_input_len: {prompt}}}\n{more}"
    )
    return parse_recipe(text, Path("mine.yaml"))


def choice(
    names: list[str] | None = None,
    goal: str = "ttft",
    load: Load = LOAD,
    recipe: Recipe | None = None,
    **more: object,
) -> Choice:
    asked = Asked(recipe or plain(load.prompt, load.output), CONFIG, load, **more)  # type: ignore[arg-type]
    return choose(asked, names or ALL, goal, TODAY)


@pytest.fixture(scope="module")
def every() -> Choice:
    return choice()


def found(made: Choice, name: str) -> Option:
    return next(one for one in made.ranked if one.name == name)


def test_every_device_is_there_with_every_pair_of_formats_that_its_backends_know(every: Choice) -> None:
    assert {one.device for one in every.ranked} == set(ALL)
    pairs = {(one.weights, one.kv) for one in every.ranked if one.device == "l4"}
    assert {("none", "fp16"), ("fp8", "fp8"), ("int4", "int8"), ("int8_sq", "fp16"), ("int4_fp8", "fp8")} <= pairs
    assert len({one.name for one in every.ranked}) == len(every.ranked)


def test_an_option_is_the_plan_of_its_recipe(every: Choice) -> None:
    for one in every.ranked:
        if one.fits:
            assert one.plan is not None
            again = make_plan(one.plan.recipe, CONFIG)
            assert again.memory == one.plan.memory
            assert again.max_kv_tokens // again.limits.max_seq_len == one.sequences
            assert (again.weights.name, again.kv.name, again.device.name) == (one.weights, one.kv, one.device)
            assert one.releases == () or one.releases[-1] == one.release


def test_what_cannot_run_says_why_and_what_would(every: Choice) -> None:
    none = found(every, "rtx4090 none/fp16 x1")
    assert not none.fits
    assert "MiB more than the RTX 4090 has, 24564 MiB" in none.why_not
    assert "weights: fp8 (" in none.nearest
    assert "FP8, which begins with SM 8.9" in found(every, "a100-80gb fp8/fp16 x1").why_not
    assert all(one.why_not and one.nearest for one in every.ranked if not one.fits)


def test_those_that_do_not_fit_come_last_and_have_no_numbers(every: Choice) -> None:
    order = [one.fits for one in every.ranked]
    assert order == sorted(order, reverse=True)
    assert all(one.speed is None and one.score is None for one in every.ranked if not one.fits)


def test_a_cpu_is_listed_without_a_prediction_behind_all_that_have_one(every: Choice) -> None:
    cpu = [one for one in every.ranked if one.device == "cpu" and one.fits]
    assert cpu
    assert all(one.speed is None and one.tokens_per_usd is None for one in cpu)
    last = max(place for place, one in enumerate(every.ranked) if one.speed)
    assert every.ranked.index(cpu[0]) > last
    assert cpu[0].weights in ("int4", "int4_fp8")  # the bytes of the weights decide there


@pytest.mark.parametrize(
    ("goal", "value"),
    [
        ("ttft", lambda one: one.speed.sure_ttft_s),
        ("throughput", lambda one: -one.speed.sure_tokens_per_s),
        ("cost", lambda one: -one.speed.sure_tokens_per_s / one.usd_per_hour),
        ("density", lambda one: -one.services * one.sequences),
    ],
)
def test_the_goal_decides_the_order(goal: str, value: object) -> None:
    made = choice(GPUS, goal)
    ranked = [one for one in made.ranked if one.fits and (goal != "cost" or one.price)]
    values = [rounded(value(one)) for one in ranked]  # type: ignore[operator]
    assert values == sorted(values)
    assert len(set(values)) > 5


def test_weights_that_are_unpacked_are_never_sold_as_a_faster_prefill() -> None:
    for prompt in (64, 256, 1024, 3000):
        made = choice(GPUS, "ttft", Load(prompt, 96), recipe=plain(prompt, 96))
        for name in GPUS:
            ranked = [one for one in made.ranked if one.device == name and one.fits]
            plain_16 = [place for place, one in enumerate(ranked) if one.weights in ("none", "fp8")]
            unpacked = [place for place, one in enumerate(ranked) if one.weights in ("int4", "int8")]
            assert not plain_16 or not unpacked or min(plain_16) < min(unpacked), (name, prompt)
    told = found(choice(["a100-80gb"]), "a100-80gb int4/fp16 x1")
    assert told.speed is not None
    assert told.speed.ttft.seconds > found(choice(["a100-80gb"]), "a100-80gb none/fp16 x1").speed.ttft.seconds  # type: ignore[union-attr]


def test_a_format_that_nobody_measured_ranks_by_the_bad_end_of_its_error() -> None:
    made = choice(["h100"])
    measured, guessed = (found(made, f"h100 {name}/fp16 x1").speed for name in ("fp8", "int8_sq"))
    assert measured is not None
    assert guessed is not None
    assert (measured.guessed, guessed.guessed) == ("", "int8")
    assert measured.sure_ttft_s == measured.ttft.seconds
    assert guessed.sure_ttft_s == pytest.approx(guessed.ttft.seconds * (1 + guessed.ttft_band.worst))


def test_limits_come_before_the_goal_and_what_forbids_them_is_unreachable() -> None:
    load = Load(4000, 96)
    made = choice(["t4", "h100"], "cost", load, slo=Slo(ttft_s=1.0))
    verdicts = {one.device: one.speed.verdict for one in made.ranked if one.speed}
    assert verdicts == {"h100": "met", "t4": "unreachable"}  # 65 TFLOPS at 100 % need 1.7 s
    assert [one.device for one in best_of_each(made.ranked)] == ["h100", "t4"]


def test_a_limit_on_itl_leaves_fewer_sequences_at_once() -> None:
    free, tight = (found(choice(["h100"], slo=Slo(itl_s=limit)), "h100 fp8/fp8 x1") for limit in (10.0, 0.012))
    assert free.limits is not None
    assert tight.limits is not None
    assert tight.limits.max_batch_size < free.limits.max_batch_size
    assert tight.speed is not None
    assert tight.speed.itl_verdict == "met"


def test_a_recipe_that_names_its_sequences_keeps_them_where_they_fit() -> None:
    recipe = load_recipe("rtx4090")
    made = choose(Asked(recipe, CONFIG, Load(1024, 256)), ["rtx4090"], "ttft", TODAY)
    own = [one for one in made.ranked if one.own]
    (mine,) = own
    assert (mine.weights, mine.kv) == ("fp8", "fp8")
    assert mine.plan is not None
    assert mine.plan.slice("build") == make_plan(for_device(recipe, "rtx4090"), CONFIG).slice("build")


def test_services_auto_tries_as_many_as_fit_and_each_holds_less() -> None:
    made = choice(["a100-80gb"], "density", services=None)
    int4 = sorted(
        (one for one in made.ranked if (one.weights, one.kv) == ("int4", "int8")), key=lambda one: one.services
    )
    assert [one.services for one in int4] == list(range(1, len(int4) + 1))
    assert 3 <= len(int4) <= MOST_SERVICES
    tokens = [one.plan.max_kv_tokens for one in int4 if one.plan]
    assert tokens == sorted(tokens, reverse=True)
    assert made.best is not None
    assert made.best.services == max(one.services for one in made.ranked)


def test_several_services_are_held_against_a_limit_while_all_are_busy() -> None:
    alone, three = (
        found(choice(["a100-80gb"], slo=Slo(ttft_s=0.35), services=count), f"a100-80gb int4/int8 x{count}")
        for count in (1, 3)
    )
    assert alone.speed is not None
    assert three.speed is not None
    assert three.speed.ttft == alone.speed.ttft
    assert (alone.speed.ttft_verdict, three.speed.ttft_verdict) == ("met", "open")


def test_tp_costs_as_many_gpus() -> None:
    made = choice(["rtx4090"], recipe=plain(more="parallel: {tp: 2}"))
    both = found(made, "rtx4090 fp8/fp8 x1")
    assert both.gpus == 2
    assert both.price is not None
    assert both.usd_per_hour == both.price.usd_per_hour * 2


@settings(max_examples=12, deadline=None)
@given(st.permutations(["l4", "t4", "a100-80gb", "rtx4090", "cpu", "h100"]), st.sampled_from(sorted(GOALS)))
def test_the_order_of_the_devices_changes_nothing(names: list[str], goal: str) -> None:
    kept = choice(sorted(names), goal)
    made = choice(names, goal)
    assert [one.name for one in made.ranked] == [one.name for one in kept.ranked]
    assert made.pareto == kept.pareto
    assert made.break_even == kept.break_even


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.sampled_from(GPUS), min_size=1, max_size=4, unique=True),
    st.integers(32, 3000),
    st.sampled_from(sorted(GOALS)),
    st.sampled_from([1, 2, None]),
)
def test_the_pareto_set_is_not_dominated_and_dominates_the_rest(
    names: list[str], prompt: int, goal: str, services: int | None
) -> None:
    made = choice(names, goal, Load(prompt, 64), services=services)
    kept = [objectives(one, goal) for one in made.pareto]
    assert not any(dominates(one, other) or dominates(other, one) for one, other in combinations(kept, 2))
    for one in made.ranked:
        if one.fits and one.speed and one not in made.pareto:
            mine = objectives(one, goal)
            assert any(dominates(other, mine) or other == mine for other in kept)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(GPUS),
    st.sampled_from(["none", "fp8", "int4", "int8_sq"]),
    st.integers(32, 3000),
    st.integers(1, 900),
)
def test_a_longer_prompt_never_has_a_shorter_ttft(name: str, weights: str, prompt: int, more: int) -> None:
    short, long = (
        next(
            (one for one in choice([name], load=Load(length, 64)).ranked if (one.weights, one.kv) == (weights, "fp16")),
            None,
        )
        for length in (prompt, prompt + more)
    )
    if short and long and short.speed and long.speed:
        assert long.speed.ttft.seconds >= short.speed.ttft.seconds
        assert long.speed.ttft.floor_s >= short.speed.ttft.floor_s


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(GPUS), st.sampled_from(["fp16", "int8"]), st.integers(64, 2000))
def test_smaller_weights_never_hold_fewer_sequences(name: str, kv: str, prompt: int) -> None:
    made = choice([name], load=Load(prompt, 64))
    held = {one.weights: one.sequences for one in made.ranked if one.kv == kv and one.fits}
    for small, large in (("fp8", "none"), ("int4", "fp8"), ("int4", "none")):
        if small in held and large in held:
            assert held[small] >= held[large]


def price(name: str, usd: float, **more: object) -> Price:
    given = {"vendor": "Here", "offer": "", "region": None, "kind": "on-demand", "date": "2024-05-01"} | more
    return Price(name, usd, source="test", estimated=False, **given)  # type: ignore[arg-type]


def test_above_the_break_even_price_the_rival_wins() -> None:
    def ranked(usd: float) -> Choice:
        prices = PriceList(rows=(price("rtx4090", usd), price("l4", 0.71)))
        return choice(["rtx4090", "l4"], "cost", prices=prices)

    (told,) = (one for one in ranked(0.64).break_even if one.measure == "tokens per dollar")
    assert told.winner.startswith("rtx4090 ")
    assert told.rival.startswith("l4 ")
    below, above = (ranked(told.until_usd_per_hour * times).best for times in (0.999, 1.001))
    assert below is not None
    assert above is not None
    assert (below.device, above.device) == ("rtx4090", "l4")
    line = break_even_line(told)
    assert f"stops winning above ${told.until_usd_per_hour:.2f}/h" in line
    assert "$0.64/h" in line
    assert "$0.71/h" in line


def test_no_break_even_is_told_where_one_device_has_a_price() -> None:
    assert choice(["rtx4090", "l4"], prices=PriceList(rows=(price("l4", 0.7),))).break_even == ()


def test_a_device_without_a_price_has_no_money_and_comes_last_where_that_decides() -> None:
    known = PriceList(rows=(price("l4", 0.7),))
    made = choice(["h100", "l4"], "cost", prices=known)
    assert [one.device for one in best_of_each(made.ranked)] == ["l4", "h100"]
    h100 = best_of_each(made.ranked)[1]
    assert (h100.price, h100.tokens_per_usd, h100.score) == (None, None, None)
    assert any("no price of h100: --price h100=0.44" in note for note in sheet(made, known).notes)


def test_the_score_is_fedmls_and_counts_nothing_beyond_the_limit() -> None:
    made = choice(["t4"], slo=Slo(ttft_s=1.0), prices=PriceList(rows=(price("t4", 0.5),)))
    slow = found(made, "t4 int4/int8 x1")
    assert slow.speed is not None
    assert slow.speed.ttft.seconds > 1
    assert slow.score is not None
    assert slow.score.value is None
    fast = found(choice(["h100"], prices=PriceList(rows=(price("h100", 2.0),))), "h100 fp8/fp8 x1")
    assert fast.speed is not None
    assert fast.score is not None
    assert fast.score.value == pytest.approx(1 / (fast.speed.ttft.seconds * 2.0))


def test_a_choice_is_plain_json_with_estimates_named_as_such(every: Choice) -> None:
    told = json.loads(json.dumps(every.to_json()))
    assert told["estimates"] == "our estimate, not a measurement"
    assert [row["rank"] for row in told["options"]] == list(range(1, len(every.ranked) + 1))
    assert {row["name"] for row in told["options"] if row["pareto"]} == {one.name for one in every.pareto}
    assert all("plan" not in row for row in told["options"])
    assert told["options"][0]["speed"]["ttft_band"]["worst"] > 0


def test_unequal_limits_of_devices_are_refused_by_name() -> None:
    recipe = load_recipe("llama2-13b")
    made = choose(Asked(recipe, CONFIG, Load(2000, 256)), ["t4", "rtx4090"], "ttft", TODAY)
    told = [one for one in made.ranked if one.device == "t4" and one.weights == "int4" and one.kv != "fp8"]
    assert len(told) == 2
    assert all("limits.max_input_len 1024: a prompt of 2000 tokens is longer" in one.why_not for one in told)
    assert made.best is not None
    assert made.best.device == "rtx4090"


def test_the_table_shows_each_device_once_and_all_when_asked(every: Choice) -> None:
    short, long = sheet(every, PriceList()), sheet(every, PriceList(), every=True)
    titles = {one.title for one in every.ranked}
    assert {row[1] for row in short.rows} == titles
    assert len(short.rows) < len(long.rows) == len(every.ranked)
    assert "our estimate, not a measurement" in short.title
    assert all(len(row) == len(short.columns) for row in long.rows)
    assert all(row[-1] for row, one in zip(long.rows, every.ranked, strict=True) if not one.fits)


def test_an_unpacked_format_says_what_it_costs_the_first_token(every: Choice) -> None:
    rows = {one.name: row for one, row in zip(every.ranked, sheet(every, PriceList(), every=True).rows, strict=True)}
    assert "unpacked: first token x1." in rows["a100-80gb int4/fp16 x1"][-1]
    assert "unpacked" not in rows["a100-80gb none/fp16 x1"][-1]
    assert all(unpacks(WEIGHTS[one.weights]) == ("unpacked" in rows[one.name][-1]) for one in every.ranked if one.speed)


def test_old_prices_are_marked_and_named(every: Choice) -> None:
    late = replace(every, today=datetime.date(2030, 1, 1))
    fresh, old = (sheet(one, PriceList()) for one in (every, late))
    assert not any("!" in row[11] for row in fresh.rows)
    assert all("!" in row[11] for row in old.rows if row[11] != "?")
    assert any(note.startswith("!: older than 180 days") for note in old.notes)
    assert any("2161 days old!" in note for note in old.notes)


def test_the_table_of_llama2_13b_is_this() -> None:
    assert golden.choice_text() == (golden.HERE / "choice.txt").read_text(encoding="utf-8"), "python -m tests.golden"


def test_ranking_again_changes_nothing(every: Choice) -> None:
    assert rank(list(every.ranked), GOALS["ttft"]) == list(every.ranked)
