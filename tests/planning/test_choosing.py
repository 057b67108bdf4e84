"""``scalellm plan`` as a comparison, and ``scalellm init``: as a person types them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT, SCALELLM
from tests.quantizers.foreign import folders
from tests.stages.test_quantize import run as quantize
from toolchain.family import published
from toolchain.planning.plan import make_plan
from toolchain.recipe import load_recipe

MODEL = "meta-llama/Llama-2-13b-chat-hf"


def test_devices_are_compared_without_a_recipe(scalellm):
    done = scalellm("plan", "--model", MODEL, "--device", "all", "--goal", "cost", "--slo", "ttft=1s,itl=80ms")
    assert done.returncode == 0, done.stderr
    for part in (
        "RTX 4090",
        "T4",
        "CPU",
        "our estimate, not a measurement",
        "stops winning above",
        "days old!",
        "x1.55",
    ):
        assert part in done.stdout, part
    assert "Traceback" not in done.stderr


def test_a_comparison_as_json_is_one_object(scalellm):
    done = scalellm(
        "plan", "--recipe", "rtx4090", "--model", MODEL, "--device", "rtx4090,t4", "--json", "--price", "t4=0.3"
    )
    told = json.loads(done.stdout)
    assert {row["device"] for row in told["options"]} == {"rtx4090", "t4"}
    (own,) = (row for row in told["options"] if row["own"] and row["device"] == "rtx4090")
    assert (own["weights"], own["kv"], own["fits"]) == ("fp8", "fp8", True)
    t4 = next(row for row in told["options"] if row["device"] == "t4" and row["fits"])
    assert t4["price"] == {**t4["price"], "usd_per_hour": 0.3, "vendor": "yours"}


def test_one_device_without_a_wish_is_the_plan_for_it_as_build_makes_it(scalellm):
    told = json.loads(scalellm("plan", "--recipe", "llama2-13b", "--device", "t4", "--json").stdout)
    assert (told["device"], told["weights"], told["release"]) == ("t4", "int4", "0.13.0")


def test_explain_says_where_each_rule_comes_from(scalellm):
    plain, explained = (scalellm("plan", "--recipe", "t4", *more).stdout for more in ((), ("--explain",)))
    assert "fmhaRunner.cpp" not in plain
    assert "fmhaRunner.cpp" in explained


def test_nothing_that_fits_is_exit_code_3_and_names_the_nearest(scalellm):
    done = scalellm("plan", "--model", "meta-llama/Llama-2-70b-chat-hf", "--device", "t4", "--goal", "ttft")
    assert done.returncode == 3
    assert "nothing of this fits" in done.stderr
    assert "MiB more than the T4 has" in done.stdout


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--device", "rtx4099"], "did you mean 'rtx4090'"),
        (["--services", "0"], "a number from 1 to 64, or auto"),
        (["--prompt", "-5"], "--prompt"),
        (["--output", "0"], "--output"),
        (["--slo", "ttft=soon"], "write it as 50ms or 1.5s"),
        (["--slo", "p99=1s"], "write it as ttft=1s,itl=50ms"),
        (["--price", "l5=1"], "no device 'l5'"),
        (["--prices", "nowhere.yaml"], "nowhere.yaml"),
        (["--prompt", "5000"], "--prompt 5000"),
        (["--prompt", "4000", "--output", "200"], "--output 96"),
        (["--goal", "speed"], "ttft"),
    ],
)
def test_a_wrong_wish_is_refused_with_its_flag_and_what_would_do(scalellm, argv, said):
    done = scalellm("plan", "--recipe", "rtx4090", "--model", MODEL, *argv)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_plan_needs_a_recipe_or_a_model(scalellm):
    assert "--recipe" in scalellm("plan").stderr


@pytest.mark.parametrize(
    ("device", "goal"), [("rtx4090", "ttft"), ("t4", "cost"), ("a100", "density"), ("cpu", "ttft")]
)
def test_init_writes_a_recipe_that_plans_as_it_was_chosen(scalellm, tmp_path, device, goal):
    file = tmp_path / "mine.yaml"
    done = scalellm("init", "--model", MODEL, "--device", device, "--goal", goal, "--services", "auto", "-o", file)
    assert done.returncode == 0, done.stderr
    recipe = load_recipe(str(file))
    config = published(MODEL)
    assert config is not None
    plan = make_plan(recipe, config)
    asked = ["--model", MODEL, "--device", device, "--goal", goal, "--services", "auto"]
    options = json.loads(scalellm("plan", *asked, "--json").stdout)["options"]
    best = options[0]
    assert (plan.device.name, plan.weights.name, plan.kv.name) == (best["device"], best["weights"], best["kv"])
    assert (plan.services, plan.limits.max_batch_size) == (best["services"], best["limits"]["max_batch_size"])
    assert plan.memory.sequences_at_full_length == best["sequences"]
    text = file.read_text()
    assert "# Chosen for" in text
    assert device == "cpu" or "ur estimate, not a measurement" in text
    assert all(len(line) <= 200 for line in text.splitlines())


def test_init_says_its_command_line_and_the_next_thing_to_type(scalellm, tmp_path):
    file = tmp_path / "mine.yaml"
    wish = ["--slo", "ttft=1s,itl=80ms", "--prompt", "512", "--price", "l4=0.6"]
    done = scalellm("init", "--model", MODEL, "--device", "l4,t4", "--goal", "cost", *wish, "-o", file)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("The same again: scalellm "))
    assert f"Next: scalellm build --recipe {file}" in done.stdout
    before = file.read_text()
    again = scalellm(*line.removeprefix("The same again: scalellm ").split())
    assert again.returncode == 0, again.stderr
    assert file.read_text() == before


def test_init_never_overwrites_unless_it_must(scalellm, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("mine")
    argv = ["init", "--model", MODEL, "--device", "l4", "--goal", "ttft", "-o", file]
    done = scalellm(*argv)
    assert done.returncode == 2
    assert "exists already" in done.stderr
    assert file.read_text() == "mine"
    assert scalellm(*argv, "--force").returncode == 0
    assert load_recipe(str(file)).device == "l4"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def ask(typed: str, *argv: object) -> subprocess.CompletedProcess[str]:
    command = [str(SCALELLM), "init", *map(str, argv)]
    return subprocess.run(command, input=typed, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)


def test_init_asks_for_what_no_flag_says(tmp_path):
    file = tmp_path / "asked.yaml"
    done = ask(f"{MODEL}\nrtx490\nt4\ncost\n", "-o", file)
    assert done.returncode == 0, done.stderr
    assert "did you mean rtx4090?" in done.stderr
    assert load_recipe(str(file)).device == "t4"
    assert "--goal cost" in file.read_text()


def test_init_without_anybody_to_ask_names_the_flag(tmp_path):
    done = ask("", "--model", MODEL, "-o", tmp_path / "mine.yaml")
    assert done.returncode == 2
    assert "--device is missing" in done.stderr
    assert not (tmp_path / "mine.yaml").exists()


def test_init_refuses_what_fits_nowhere(scalellm, tmp_path):
    file = tmp_path / "mine.yaml"
    model = "meta-llama/Llama-2-70b-chat-hf"
    done = scalellm("init", "--model", model, "--device", "t4,l4", "--goal", "ttft", "-o", file)
    assert done.returncode == 3
    assert "MiB more than the T4 has" in done.stderr
    assert not file.exists()


def test_planning_loads_no_heavy_library():
    code = (
        "import sys; from toolchain import recipe, family; import datetime\n"
        "from toolchain.planning import choice, choice_table, starter, price_list\n"
        "from toolchain.planning.option import Asked; from toolchain.planning.load import Load\n"
        f"config = family.published({MODEL!r})\n"
        "asked = Asked(recipe.load_recipe('l4'), config, Load(1024, 256))\n"
        "made = choice.choose(asked, ['l4', 't4'], 'ttft', datetime.date(2026, 1, 1))\n"
        "starter.recipe_text(made, made.best, 'm', 'x')\n"
        "print([name for name in ('torch', 'openvino', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_model_that_is_quantized_already_has_no_other_weights(scalellm, tmp_path):
    model = folders.write(tmp_path / "awq", folders.awq(64), folders.AWQ | {"group_size": 64}, kv_heads=2)
    argv = ["--model", model.path, "--device", "rtx4090", "--prompt", "512", "--goal", "ttft"]
    told = json.loads(scalellm("plan", *argv, "--json").stdout)
    assert {row["weights"] for row in told["options"]} == {"int4"}
    assert any(row["fits"] for row in told["options"])
    file = tmp_path / "mine.yaml"
    assert scalellm("init", *argv, "-o", file).returncode == 0
    assert load_recipe(str(file)).quantization.group_size == 64
    assert scalellm("plan", "--recipe", file).returncode == 0


def test_a_reserve_is_left_and_written_down(scalellm, tmp_path):
    argv = ["--model", MODEL, "--device", "rtx4090", "--goal", "throughput"]
    free, kept = (
        json.loads(scalellm("plan", *argv, *more, "--json").stdout)["options"] for more in ((), ("--reserve", "4GiB"))
    )
    held = {row["name"]: row["sequences"] for row in free if row["fits"]}
    assert all(row["sequences"] <= held[row["name"]] for row in kept if row["fits"])
    assert sum(row["sequences"] for row in kept) < sum(held.values())
    file = tmp_path / "mine.yaml"
    assert scalellm("init", *argv, "--reserve", "4GiB", "-o", file).returncode == 0
    assert load_recipe(str(file)).reserve == "4GiB"


def test_a_checkpoint_of_our_own_layout_keeps_its_weights_too(scalellm, random_llama, tmp_path):
    folder = quantize(random_llama(), tmp_path / "made", weights="int4", group_size=64)
    (folder / "stamp.json").unlink()
    argv = ["--model", folder, "--device", "rtx4090,t4", "--prompt", "256", "--output", "64", "--json"]
    options = json.loads(scalellm("plan", *argv).stdout)["options"]
    assert {row["weights"] for row in options} == {"int4"}
    assert {row["device"] for row in options if row["fits"]} == {"rtx4090", "t4"}
