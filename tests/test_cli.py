"""The command line as a person meets it: help at once, mistakes explained, JSON on request."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

FIVE_MISTAKES = """\
name: mine
model: meta-llama/Llama-2-13b-chat-hf
device: rtx409
quantisation: {weights: int4}
kv_cache:
  dtype: int9
limits:
  max_batch_size: none
  max_seq_len: -4
"""


def test_help_answers_in_under_300_ms(scalellm):
    def once() -> float:
        started = time.perf_counter()
        assert scalellm("--help").returncode == 0
        return time.perf_counter() - started

    assert min(once() for _ in range(5)) < 0.3


def test_help_imports_no_heavy_library():
    code = (
        "import sys, click; from toolchain.cli import verbs\n"
        "heavy = {'torch', 'openvino', 'pydantic', 'numpy', 'rich', 'yaml', 'tritonclient', 'matplotlib'}\n"
        "try: verbs.main(['--help'], standalone_mode=False)\n"
        "finally: print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "verb",
    [
        "init",
        "plan",
        "commands",
        "quantize",
        "build",
        "package",
        "serve",
        "infer",
        "gateway",
        "conformance",
        "recipes",
        "doctor",
        "inspect",
        "import",
        "model",
    ],
)
def test_every_verb_has_help_with_an_example(scalellm, verb):
    done = scalellm(verb, "--help")
    assert done.returncode == 0
    assert f"scalellm {verb}" in done.stdout.split("Example")[1]


def test_plan_prints_estimates_as_estimates_with_floors_and_errors(scalellm):
    text = scalellm("plan", "--recipe", "l4").stdout
    assert "our estimate, not a measurement" in text
    assert "TTFT, 1024 tokens" in text
    assert "floor: the data sheet's peaks" in text
    assert "may be off by a factor of 1.55" in text
    assert "no published TensorRT-LLM latencies of the L4 were fitted" in text


def test_plan_for_a_cpu_says_that_it_has_no_estimate(scalellm):
    text = scalellm("plan", "--recipe", "cpu").stdout
    assert "Speed: no estimate for a CPU" in text
    assert "TTFT" not in text


def test_a_mistyped_verb_is_answered_with_the_nearest(scalellm):
    done = scalellm("biuld")
    assert done.returncode == 2
    assert "Did you mean 'build'?" in done.stderr


def test_an_unknown_recipe_is_answered_with_the_nearest(scalellm):
    done = scalellm("plan", "--recipe", "rtx4099")
    assert done.returncode == 2
    assert "rtx4090" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_recipe_with_five_mistakes_reports_all_five_with_their_lines(scalellm, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(FIVE_MISTAKES)
    done = scalellm("plan", "--recipe", recipe)
    assert done.returncode == 2
    for line, what in ((3, "rtx4090"), (4, "quantization"), (6, "int8"), (8, "max_batch_size"), (9, "max_seq_len")):
        assert any(f"mine.yaml:{line}: " in text and what in text for text in done.stderr.splitlines()), (
            line,
            done.stderr,
        )


def test_five_mistakes_as_json_are_five_problems(scalellm, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(FIVE_MISTAKES)
    done = scalellm("plan", "--recipe", recipe, "--json")
    assert done.returncode == 2
    assert [problem["line"] for problem in json.loads(done.stdout)["problems"]] == [3, 4, 6, 8, 9]


def test_recipes_lists_all_that_ship(scalellm):
    done = scalellm("recipes", "--json")
    assert {"rtx4090", "l4", "t4", "a100", "a100-x3", "h100", "cpu", "tiny"} <= set(json.loads(done.stdout))


def test_recipes_show_prints_a_recipe_that_can_be_used(scalellm, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(scalellm("recipes", "show", "rtx4090").stdout)
    assert scalellm("plan", "--recipe", mine, "--json").returncode == 0


def test_schema_is_json_schema(scalellm):
    schema = json.loads(scalellm("recipes", "schema").stdout)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["additionalProperties"] is False


@pytest.fixture
def recorders(tmp_path):
    """A folder for PATH with programs that write down their arguments instead of doing anything."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("scalellm", "trtllm-build", "docker", "git", "sed", "python3"):
        program = folder / name
        program.write_text(f'#!/bin/sh\n{{ printf "%s" {name}; printf " [%s]" "$@"; echo; }} >> "{tmp_path}/ran"\n')
        program.chmod(0o755)
    return folder


def test_commands_are_printed_ready_to_paste_and_none_is_run(scalellm, tmp_path, recorders):
    path = f"{recorders}:/usr/bin:/bin"
    done = scalellm("commands", "--recipe", "t4", "--work", tmp_path / "my work", PATH=path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "my work").exists()

    subprocess.run(["sh", "-e"], input=done.stdout, text=True, check=True, env={"PATH": path})
    quantize, convert, clone, patch, image, build = (tmp_path / "ran").read_text().splitlines()
    assert convert == quantize.replace("[quantize]", "[convert]")
    assert quantize == f"scalellm [quantize] [--recipe] [t4] [--work] [{tmp_path}/my work]"
    assert clone.startswith("git [clone] [--branch] [v0.13.0] [--recurse-submodules]")
    assert "[s/build_wheel.py /build_wheel.py --cuda_architectures 75-real /]" in patch
    assert image.startswith("docker [build] [--tag] [tritonserver-trtllm-0.13.0-75-real]")
    assert build.startswith(f"trtllm-build [--checkpoint_dir] [{tmp_path}/my work/t4/trtllm-checkpoint] [--output_dir]")
    assert "[--context_fmha] [disable]" in build
    assert "[--gpt_attention_plugin] [float16]" in build
    comments = [line for line in done.stdout.splitlines() if line.startswith("#")]
    assert sum("75-real" in line for line in comments if line.startswith("# note")) == 1
    wheel = "python3 scripts/build_wheel.py --clean --cuda_architectures 75-real --trt_root /usr/local/tensorrt"
    assert f"#   {wheel}" in comments


def test_commands_as_json_hold_the_argv_and_the_release(scalellm):
    said = json.loads(scalellm("commands", "--recipe", "rtx4090", "--json").stdout)
    assert (said["tensorrt_llm"], said["container"]) == ("1.2.1", "tritonserver:26.07-trtllm-python-py3")
    assert [step["name"] for step in said["steps"]] == ["quantize", "convert", "build"]
    assert said["steps"][1]["argv"][:2] == ["scalellm", "convert"]
    assert said["steps"][2]["argv"][0] == "trtllm-build"


def test_commands_for_a_container_are_those_of_docker(scalellm, recorders):
    path = f"{recorders}:/usr/bin:/bin"
    said = json.loads(scalellm("commands", "--recipe", "l4", "--on", "container", "--json", PATH=path).stdout)
    assert [step["argv"][:2] for step in said["steps"][2:]] == [["mkdir", "-p"], ["docker", "run"]]


def test_commands_of_a_cpu_recipe_say_that_there_is_no_foreign_one(scalellm):
    done = scalellm("commands", "--recipe", "cpu")
    assert done.returncode == 0
    assert "there is no foreign command" in done.stdout
    assert "trtllm-build" not in done.stdout


def test_commands_of_a_release_without_an_engine_path_are_refused_with_what_goes_on(scalellm, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "model: meta-llama/Llama-2-13b-chat-hf\ndevice: l4\ntensorrt_llm: 1.3.0\nquantization: {weights: fp8}\n"
    )
    done = scalellm("commands", "--recipe", recipe)
    assert done.returncode == 3
    assert "no engine path" in done.stderr
    assert "tensorrt_llmapi" in done.stderr


@pytest.mark.parametrize("name", ["rtx4090", "l4", "t4", "a100", "a100-x3", "h100", "cpu"])
def test_plan_of_every_shipped_recipe_needs_neither_gpu_nor_model(scalellm, name):
    made = json.loads(scalellm("plan", "--recipe", name, "--json").stdout)
    assert all(decision["reason"] for decision in made["decisions"])
    assert made["memory"]["fits"] is True


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_name_the_command(scalellm, shell):
    assert "_SCALELLM_COMPLETE" in scalellm("completion", shell).stdout


def test_completion_offers_recipes(scalellm):
    done = scalellm(_SCALELLM_COMPLETE="bash_complete", COMP_WORDS="scalellm plan --recipe rtx", COMP_CWORD="3")
    assert "rtx4090" in done.stdout


def test_a_model_that_is_nowhere_is_named(scalellm, tmp_path):
    done = scalellm("build", "--recipe", "tiny", "--model", tmp_path / "absent", "--work", tmp_path)
    assert done.returncode == 5
    assert str(tmp_path / "absent") in done.stderr
    assert "Traceback" not in done.stderr


def test_infer_without_a_server_says_how_to_start_one(scalellm, free_ports):
    done = scalellm("infer", "Hello", "--http-port", free_ports[0])
    assert done.returncode == 6
    assert "make serve" in done.stderr


def test_doctor_looks_at_this_machine(scalellm, tmp_path):
    findings = json.loads(scalellm("doctor", "--work", tmp_path, "--json").stdout)
    by_name = {finding["name"]: finding for finding in findings}
    assert by_name["python"]["ok"]
    assert by_name["tritonserver"]["ok"], by_name["tritonserver"]


def test_serve_with_a_gateway_takes_no_log_of_its_own(scalellm, tmp_path):
    done = scalellm("serve", "--repository", tmp_path, "--gateway", "--log", tmp_path / "mine.log")
    assert done.returncode == 2
    assert "--log goes without --gateway" in done.stderr
