"""Promises about the printed command lines: a shell reads them as they are meant, and what is missing is said."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from toolchain import hosts
from toolchain.backends import Order
from toolchain.errors import PlanError
from toolchain.family import published
from toolchain.planning.build_flags import command
from toolchain.planning.plan import Plan, make_plan
from toolchain.progress import Silent
from toolchain.recipe import parse_recipe
from toolchain.stages import build
from toolchain.stages.commands import Lane, commands, paste

ENGINE = "device: l4\nquantization: {weights: fp8}\nkv_cache: {dtype: fp8}\nlimits: {max_batch_size: 4}"
INT8_KV = "device: a100\nquantization: {weights: int4}\nkv_cache: {dtype: int8}"


def plan_of(text: str) -> Plan:
    config = published("meta-llama/Llama-2-13b-chat-hf")
    assert config is not None
    return make_plan(parse_recipe(f"model: some/folder\n{text}", Path("mine.yaml")), config)


def lane(text: str, work: Path = Path("work"), model: str | None = None, on: str = "local") -> Lane:
    plan = plan_of(text)
    folder = work / "mine"
    host = hosts.load(on)
    order = Order(plan, folder / "trtllm-checkpoint", folder / "trtllm-engine", Silent(), "5f2c0a91d3e4", host)
    built = build.commands(order)
    return commands(plan, "mine.yaml", model, work, built)


def as_a_shell_reads(pasted: str) -> tuple[str, ...]:
    """The argv that a shell makes of a pasted command."""
    script = f"printf '%s\\0' {pasted}"
    done = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True, check=True)
    return tuple(done.stdout.split("\0")[:-1])


def test_an_engine_is_quantized_converted_and_built() -> None:
    steps = lane(ENGINE).steps
    assert [step.name for step in steps] == ["quantize", "convert", "build"]
    assert steps[0].argv == ("scalellm", "quantize", "--recipe", "mine.yaml", "--work", "work")
    assert steps[1].argv == ("scalellm", "convert", "--recipe", "mine.yaml", "--work", "work")
    folder = Path("work/mine").absolute()
    assert steps[2].argv == command(plan_of(ENGINE), folder / "trtllm-checkpoint", folder / "trtllm-engine")


def test_the_build_says_its_release_and_its_gpu() -> None:
    comment, pasted = lane(ENGINE).steps[2].lines()
    assert "TensorRT-LLM 1.2.1, as in nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3" in comment
    assert "SM 89" in comment
    assert pasted.startswith("trtllm-build \\\n")


@pytest.mark.parametrize(("on", "first"), [("container", "mkdir"), ("ssh:gpu-box", "ssh"), ("sky", "sh")])
def test_another_host_has_its_own_commands(on: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    built = [step for step in lane(ENGINE, on=on).steps if step.name == "build"]
    assert built[0].argv[0] == first
    assert "trtllm-build" in str([step.argv for step in built])
    for step in built:
        assert as_a_shell_reads(paste(step.argv)) == step.argv


def test_another_model_and_a_folder_with_blanks_survive_the_shell() -> None:
    steps = lane(ENGINE, Path("my work"), "/models/it's here").steps
    for step in steps:
        if step.argv:
            assert as_a_shell_reads(paste(step.argv)) == step.argv
    assert "/models/it's here" in steps[0].argv
    assert str(Path("my work/mine/trtllm-engine").absolute()) in steps[2].argv


def test_notes_tell_the_driver_the_traps_and_what_the_server_must_not_do() -> None:
    notes = "\n".join(lane(INT8_KV).notes)
    assert "needs driver 590.44" in notes
    assert "enable_kv_cache_reuse false" in notes
    assert "issue 1543" in notes
    assert "enable_kv_cache_reuse false," not in "\n".join(lane(ENGINE).notes)


def test_a_driver_that_was_taken_over_from_a_neighbor_is_told_as_such() -> None:
    assert "not confirmed" in "\n".join(lane(ENGINE + "\ntensorrt_llm: 0.14.0").notes)
    assert "not confirmed to" not in "\n".join(lane(ENGINE + "\ntensorrt_llm: 1.2.1").notes)


LLMAPI = "backend: tensorrt_llmapi\n"


def test_llmapi_is_quantized_linked_and_served_by_triton_or_without_it() -> None:
    steps = lane(LLMAPI + ENGINE, model="/models/llama").steps
    assert [step.name for step in steps] == [
        "quantize", "build", "serve", "trtllm-serve", "trtllm-serve", "serve", "serve",
    ]  # fmt: skip
    assert steps[1].argv == ("scalellm", "build", "--recipe", "mine.yaml", "--model", "/models/llama", "--work", "work")
    assert steps[2].argv == ("scalellm", "serve", "--recipe", "mine.yaml", "--work", "work", "--server", "container")


@pytest.mark.parametrize("release", ["1.0.0", "1.1.0", "1.2.1"])
def test_trtllm_serve_gets_the_plans_numbers_and_the_file_with_the_rest(release: str) -> None:
    text = f"{LLMAPI}{ENGINE}\nparallel: {{tp: 2}}\ntensorrt_llm: {release}"
    argv = next(step.argv for step in lane(text).steps if step.argv[:1] == ("trtllm-serve",))
    told = dict(zip(argv[2::2], argv[3::2], strict=True))
    assert argv[1] == "work/mine/engine"
    assert told["--extra_llm_api_options"] == "work/mine/engine/trtllm-serve.yaml"
    assert (told["--tp_size"], told["--max_batch_size"], told["--backend"]) == ("2", "4", "pytorch")
    limits = plan_of(text).limits
    assert (told["--max_seq_len"], told["--max_num_tokens"]) == (str(limits.max_seq_len), str(limits.max_num_tokens))


def test_the_container_sees_the_engine_where_the_command_names_it() -> None:
    argv = next(step.argv for step in lane(LLMAPI + ENGINE).steps if step.argv[:1] == ("docker",))
    image = argv.index("nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3")
    engine = argv[image + 2]
    assert engine == str(Path("work/mine/engine").absolute())
    assert f"--volume={engine}:{engine}:ro" in argv[:image]
    assert argv[image + 1] == "trtllm-serve"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (ENGINE, {"vLLM", "SGLang"}),
        ("device: l4\nquantization: {weights: int4}", set()),
        ("device: h100\nquantization: {weights: int4_fp8}\nkv_cache: {dtype: fp8}", set()),
    ],
)
def test_other_servers_are_named_for_the_formats_that_they_load_only(text: str, names: set[str]) -> None:
    says = [step.says for step in lane(LLMAPI + text).steps]
    assert {name for name in ("vLLM", "SGLang") if any(name in one for one in says)} == names


def test_openvino_has_no_foreign_command() -> None:
    (step,) = lane("device: cpu\nquantization: {weights: int4}").steps
    assert step.argv[:2] == ("scalellm", "build")
    assert "no foreign command" in step.says


def test_a_plan_that_the_builder_would_not_build_prints_nothing() -> None:
    wrong = replace(plan_of(INT8_KV), paged_context_fmha=True)
    with pytest.raises(PlanError, match="INT8 KV excludes it"):
        build.commands(Order(wrong, Path("a"), Path("b"), Silent(), "key", hosts.load("local")))


def test_a_t4_is_told_once_that_its_kernels_must_be_built_and_how() -> None:
    found = lane("device: t4\nquantization: {weights: int4}\nlimits: {max_seq_len: 1024}")
    assert sum("75-real" in note for note in found.notes) == 1
    (wheel,) = (step for step in found.steps if step.name == "wheel")
    assert wheel.argv == (
        *("python3", "scripts/build_wheel.py", "--clean", "--cuda_architectures", "75-real"),
        *("--trt_root", "/usr/local/tensorrt"),
    )
    assert "devel container" in wheel.says
    assert all(line.startswith("#") for line in wheel.lines())  # another way to the same: not to be pasted along
    names = [step.name for step in found.steps]
    assert names.index("image") < names.index("build")
    assert "in the image made above" in found.steps[-1].where


def test_a_t4_in_16_bits_and_other_cards_build_nothing_of_nvidias() -> None:
    for text in ("device: t4\nparallel: {tp: 4}\nlimits: {max_seq_len: 512, max_batch_size: 1}", ENGINE, INT8_KV):
        assert {step.name for step in lane(text).steps} == {"quantize", "convert", "build"}
