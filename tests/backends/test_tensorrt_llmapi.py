"""Promises about the llmapi engine: a folder that the real loaders' rules accept, linked from the checkpoint."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from tests.quantizers.unified_folder import dense_of
from toolchain import workspace
from toolchain.backends import Order, tensorrt_llmapi
from toolchain.backends.tensorrt_llmapi.settings import arguments, others, serve_command
from toolchain.checkpoint import Checkpoint
from toolchain.engine import Engine
from toolchain.errors import PlanError
from toolchain.family import published
from toolchain.pipeline import Job
from toolchain.planning.plan import Plan, make_plan
from toolchain.progress import Silent
from toolchain.recipe import Recipe, parse_recipe
from toolchain.release import releases

TEXT = "calibration: {samples: 2, tokens: 16, data: %s}\n"
LIMITS = "limits: {max_batch_size: 4, max_seq_len: 256}\n"
RELEASES = [release.version for release in releases().values() if release.llmapi]


def recipe_of(text: str, limits: str = LIMITS) -> Recipe:
    return parse_recipe(f"model: some/folder\nbackend: tensorrt_llmapi\n{limits}{text}", Path("mine.yaml"))


def plan_13b(text: str, limits: str = LIMITS) -> Plan:
    config = published("meta-llama/Llama-2-13b-chat-hf")
    assert config is not None
    return make_plan(recipe_of(text, limits), config)


@pytest.fixture(scope="module")
def stand_in() -> Any:
    """The stand-in for TensorRT-LLM, under another name."""
    file = Path(__file__).parent / "stand_in" / "tensorrt_llm" / "__init__.py"
    spec = importlib.util.spec_from_file_location("stand_in_tensorrt_llm", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(random_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Job]:
    """``made(recipe text, **model)`` -> a job whose engine is built, once for each text and model."""
    known: dict[str, Job] = {}

    def make(text: str, **model: object) -> Job:
        key = f"{text}{sorted(model.items())}"
        if key not in known:
            work = tmp_path_factory.mktemp("work")
            rows = work / "rows.jsonl"
            rows.write_text("".join(json.dumps({"text": "The quick brown fox. " * 9}) + "\n" for _ in range(2)))
            text = text + (TEXT % rows if "none" not in text and "rtn" not in text else "")
            job = Job(recipe_of(text), str(random_llama(**model)), work, Silent())
            job.run("engine")
            known[key] = job
        return known[key]

    return make


FP8 = "device: l4\nquantization: {weights: fp8}\nkv_cache: {dtype: fp8}\n"
AWQ = "device: a100\nquantization: {weights: int4, method: awq}\n"
RTN = "device: a100\nquantization: {weights: int4, method: rtn, group_size: 64}\n"
W4A8 = "device: h100\nquantization: {weights: int4_fp8}\nkv_cache: {dtype: fp8}\n"
PLAIN = "device: a100\nquantization: {weights: none}\n"
PLAIN_FP8_KV = "device: l4\nquantization: {weights: none}\nkv_cache: {dtype: fp8}\ncalibration: {data: builtin}\n"
ALL = [FP8, AWQ, RTN, W4A8, PLAIN]


def folders(job: Job) -> tuple[Path, Path]:
    return job.folder / "checkpoint", job.folder / "engine"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """As TensorRT-LLM's HfWeightLoader: every *.safetensors of the folder whose name has no "consolidated"."""
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        assert "consolidated" not in file.name
        found |= load_file(file)
    return found


@pytest.mark.parametrize("text", ALL)
def test_the_weights_are_those_of_the_checkpoint_and_take_no_second_room(made: Callable[..., Job], text: str) -> None:
    checkpoint, engine = folders(made(text))
    shards = sorted(file.name for file in checkpoint.glob("*.safetensors"))
    assert shards
    for name in shards:
        assert (engine / name).samefile(checkpoint / name)
    before, after = tensors_of(checkpoint), tensors_of(engine)
    assert before.keys() <= after.keys()
    assert all(name.endswith(".pre_quant_scale") and bool((after[name] == 1).all()) for name in after.keys() - before)


@pytest.mark.parametrize("text", ALL)
def test_the_engine_holds_what_a_server_needs_besides_and_is_stamped(made: Callable[..., Job], text: str) -> None:
    _checkpoint, folder = folders(made(text))
    engine = Engine.open(folder)
    assert engine.passport.backend == "tensorrt_llmapi"
    assert engine.passport.release == RELEASES[-1]
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.yaml"} <= set(
        engine.stamp.files
    )
    assert engine.passport.runtime["llm"]["max_seq_len"] == 256


@pytest.mark.parametrize("text", [FP8, AWQ, RTN, W4A8])
def test_every_matrix_has_the_tensors_that_the_loader_reads(made: Callable[..., Job], text: str) -> None:
    """The loader's own accesses, written down from tensorrt_llm/_torch/modules/linear.py: a KeyError or a failed
    assertion there is a failure here."""
    _checkpoint, engine = folders(made(text))
    found = tensors_of(engine)
    document = json.loads((engine / "hf_quant_config.json").read_text())["quantization"]
    algo, group = document["quant_algo"], document.get("group_size")
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for name in ("self_attn.o_proj", "mlp.down_proj"):  # load_weights_vanilla
            weight = found[f"{prefix}{name}.weight"]
            if algo == "FP8":
                assert weight.dtype == torch.float8_e4m3fn
                assert found[f"{prefix}{name}.weight_scale"].reshape([]).dtype == torch.float32
                continue
            columns = weight.shape[1]
            assert weight.dtype == torch.uint8
            assert found[f"{prefix}{name}.pre_quant_scale"].shape == (columns,)
            assert found[f"{prefix}{name}.weight_scale"].T.shape == (columns // group, weight.shape[0] * 2)
            if algo == "W4A8_AWQ":
                assert found[f"{prefix}{name}.pre_quant_scale"].dtype == torch.float16
        for fused in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert not [name for name in fused if f"{prefix}{name}.pre_quant_scale" in found]
            if algo == "W4A8_AWQ":  # load_weight_scales_w4a8
                for suffix in ("input_scale", "weight_scale_2"):
                    assert len({found[f"{prefix}{name}.{suffix}"].item() for name in fused}) == 1
                    assert found[f"{prefix}{fused[0]}.{suffix}"].float() > 0


def test_fp8_is_told_the_cache_in_both_documents_and_to_the_runtime(made: Callable[..., Job]) -> None:
    _checkpoint, engine = folders(made(FP8))
    document = json.loads((engine / "hf_quant_config.json").read_text())["quantization"]
    assert (document["quant_algo"], document["kv_cache_quant_algo"]) == ("FP8", "FP8")
    assert yaml.safe_load((engine / "model.yaml").read_text())["kv_cache_config"]["dtype"] == "fp8"


def test_int4_without_awq_gets_scales_of_one_and_says_that_it_has_some(made: Callable[..., Job]) -> None:
    checkpoint, engine = folders(made(RTN))
    assert not json.loads((checkpoint / "hf_quant_config.json").read_text())["quantization"]["pre_quant_scale"]
    assert json.loads((engine / "hf_quant_config.json").read_text())["quantization"]["pre_quant_scale"]
    ones = load_file(engine / "pre-quant-scales.safetensors")
    assert {name.split(".", 3)[3] for name in ones} == {
        "self_attn.o_proj.pre_quant_scale",
        "mlp.down_proj.pre_quant_scale",
    }
    assert all(tensor.dtype == torch.float16 and bool((tensor == 1).all()) for tensor in ones.values())
    index = json.loads((engine / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == tensors_of(engine).keys()
    assert all((engine / file).is_file() for file in index.values())


def test_scales_of_one_have_the_dtype_of_a_bfloat16_model(made: Callable[..., Job]) -> None:
    _checkpoint, engine = folders(made(RTN, dtype="bfloat16"))
    ones = load_file(engine / "pre-quant-scales.safetensors")
    assert all(tensor.dtype == torch.bfloat16 and bool((tensor == 1).all()) for tensor in ones.values())


@pytest.mark.parametrize("text", [PLAIN, PLAIN_FP8_KV])
def test_unquantized_weights_go_without_a_document_that_the_loader_would_refuse(
    made: Callable[..., Job], text: str
) -> None:
    """llm_utils.py raises "Pre-quantized checkpoint must have quant_algo." where the file or the key says none."""
    _checkpoint, engine = folders(made(text))
    assert not (engine / "hf_quant_config.json").exists()
    assert "quantization_config" not in json.loads((engine / "config.json").read_text())
    wanted = "fp8" if text == PLAIN_FP8_KV else "auto"
    assert yaml.safe_load((engine / "model.yaml").read_text())["kv_cache_config"]["dtype"] == wanted


ROPES = {
    "plain": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}


@pytest.mark.parametrize("kind", ROPES)
def test_the_configuration_means_the_same_to_transformers_4_and_5(made: Callable[..., Job], kind: str) -> None:
    checkpoint, engine = folders(made(PLAIN, **ROPES[kind]))
    written = json.loads((engine / "config.json").read_text())
    assert written["torch_dtype"] == "float16"  # the keys of transformers 4
    assert written["rope_theta"] == 500000.0
    assert (written["rope_scaling"] or {}).get("factor") == (8.0 if kind == "llama3" else None)
    assert not {"dtype", "rope_parameters"} & written.keys()
    ours, before = AutoConfig.from_pretrained(engine), AutoConfig.from_pretrained(checkpoint)  # transformers 5
    assert ours.rope_parameters == before.rope_parameters
    assert ours.dtype == before.dtype == torch.float16


def test_the_tokenizer_is_one_that_transformers_4_knows_and_5_reads_alike(
    random_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """transformers 5 writes a class of its own and a list that version 4 cannot read."""
    model = tmp_path / "model"
    shutil.copytree(random_llama(), model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<tool>"]})
    tokenizer.save_pretrained(model)
    assert json.loads((model / "tokenizer_config.json").read_text())["tokenizer_class"] == "TokenizersBackend"
    job = Job(recipe_of(PLAIN), str(model), tmp_path / "work", Silent())
    job.run("engine")
    written = json.loads((job.folder / "engine" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<tool>"]
    assert "extra_special_tokens" not in written
    served = AutoTokenizer.from_pretrained(job.folder / "engine")
    text = "a text <tool> with </s> in it"
    assert served(text).input_ids == tokenizer(text).input_ids
    assert served.all_special_tokens == tokenizer.all_special_tokens


@pytest.mark.parametrize("text", [AWQ, RTN])
def test_the_folder_stands_for_the_same_matrices_as_the_checkpoint(made: Callable[..., Job], text: str) -> None:
    """By a reader of the layout that shares nothing with us: scales of 1 change no bit."""
    checkpoint, engine = (dense_of(folder) for folder in folders(made(text)))
    assert checkpoint.keys() == engine.keys()
    assert all(torch.equal(checkpoint[name], engine[name]) for name in checkpoint)


def test_a_float32_model_is_served_in_float16(made: Callable[..., Job]) -> None:
    _checkpoint, engine = folders(made(PLAIN, dtype="float32"))
    assert json.loads((engine / "config.json").read_text())["torch_dtype"] == "float16"


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("text", [FP8, AWQ])
def test_every_argument_is_one_that_the_release_knows(stand_in: Any, release: str, text: str) -> None:
    told = arguments(plan_13b(f"{text}tensorrt_llm: {release}\n"))
    accepted = stand_in.args_of(release)(**told)
    assert accepted.kv_cache_config.max_tokens == told["kv_cache_config"]["max_tokens"] > 0
    known = workspace.facts("llmapi")["arguments"]
    samplers = {"enable_trtllm_sampler", "sampler_type"}
    assert set(told) - samplers == set(known["names"])
    assert len(set(told) & samplers) == 1
    for inner in ("kv_cache_config", "cuda_graph_config"):
        assert set(told[inner]) == set(known[inner])


def test_the_stand_in_refuses_what_pydantic_refuses(stand_in: Any) -> None:
    told = arguments(plan_13b(f"{FP8}tensorrt_llm: 1.0.0\n"))
    with pytest.raises(ValueError, match="enable_trtllm_sampler"):
        stand_in.args_of("1.2.1")(**told)


def test_numbers_are_those_of_the_plan() -> None:
    plan = plan_13b("device: h100\nquantization: {weights: fp8}\nkv_cache: {dtype: fp8}\nparallel: {tp: 2}\n")
    told = arguments(plan)
    assert told["kv_cache_config"]["max_tokens"] == plan.max_kv_tokens
    assert (told["tensor_parallel_size"], told["pipeline_parallel_size"]) == (2, 1)
    assert (told["max_batch_size"], told["max_seq_len"]) == (4, 256)
    assert told["max_num_tokens"] == plan.limits.max_num_tokens


def test_prompts_longer_than_a_step_are_cut() -> None:
    assert not arguments(plan_13b(FP8))["enable_chunked_prefill"]
    assert arguments(plan_13b(FP8, "limits: {max_seq_len: 2048, max_num_tokens: 512}\n"))["enable_chunked_prefill"]


def test_model_yaml_is_the_arguments_and_what_nvidias_model_reads(made: Callable[..., Job]) -> None:
    job = made(FP8)
    written = yaml.safe_load((job.folder / "engine" / "model.yaml").read_text())
    triton = written.pop("triton_config")
    assert (triton["max_batch_size"], triton["decoupled"]) == (0, True)
    assert written == arguments(job.plan)


def test_the_yaml_of_trtllm_serve_holds_what_has_no_flag(made: Callable[..., Job]) -> None:
    job = made(FP8)
    written = yaml.safe_load((job.folder / "engine" / "trtllm-serve.yaml").read_text())
    assert set(written) == {"kv_cache_config", "cuda_graph_config", "enable_chunked_prefill", "sampler_type"}
    argv = serve_command(job.plan, "/engine")
    assert argv[:2] == ("trtllm-serve", "/engine")
    assert argv[argv.index("--extra_llm_api_options") + 1] == "/engine/trtllm-serve.yaml"


def _broken(job: Job, target: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """The job's checkpoint with other tensors, in one file."""
    source = job.folder / "checkpoint"
    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors" and "index" not in file.name and file.is_file():
            shutil.copyfile(file, target / file.name)
    found = tensors_of(source)
    change(found)
    save_file(found, target / "model.safetensors")
    return target


def _refusal(job: Job, folder: Path, out: Path) -> str:
    out.mkdir()
    with pytest.raises(PlanError) as caught:
        tensorrt_llmapi.build(Order(job.plan, folder, out, Silent()))
    assert not list(out.iterdir()), "a refused checkpoint leaves nothing"
    return caught.value.message


Change = Callable[[dict[str, torch.Tensor]], object]


def _drop(name: str) -> Change:
    return lambda found: found.pop(f"model.layers.1.{name}")


def _set(name: str, value: torch.Tensor) -> Change:
    return lambda found: found.__setitem__(f"model.layers.0.{name}", value)


@pytest.mark.parametrize(
    ("text", "change", "words"),
    [
        (AWQ, _drop("self_attn.o_proj.pre_quant_scale"), "layers.1.self_attn.o_proj.pre_quant_scale .* missing"),
        (AWQ, _set("self_attn.q_proj.pre_quant_scale", torch.ones(256).half()), "q_proj.pre_quant_scale .* not read"),
        (FP8, _set("mlp.down_proj.pre_quant_scale", torch.ones(512).half()), "down_proj.pre_quant_scale .* not read"),
        (W4A8, _drop("mlp.down_proj.pre_quant_scale"), "down_proj.pre_quant_scale .* missing"),
        (W4A8, _set("mlp.down_proj.pre_quant_scale", torch.ones(512)), "pre_quant_scales are F32"),
        (W4A8, _set("self_attn.k_proj.input_scale", torch.tensor(0.5)), "k_proj.input_scale.* differ"),
        (W4A8, _set("mlp.up_proj.weight_scale_2", torch.tensor(0.5)), "up_proj.weight_scale_2 differ"),
        (FP8, _set("mlp.up_proj.weight_scale", torch.tensor(0.0)), "up_proj.weight_scale is 0, no scale"),
        (FP8, _set("self_attn.k_proj.k_scale", torch.tensor(math.nan)), "k_proj.k_scale is nan, no scale"),
    ],
)
def test_a_checkpoint_that_the_loader_would_refuse_or_misread_is_refused_by_name(
    made: Callable[..., Job], tmp_path: Path, text: str, change: Change, words: str
) -> None:
    job = made(text)
    message = _refusal(job, _broken(job, tmp_path / "broken", change), tmp_path / "out")
    assert str(tmp_path / "broken") in message
    assert re.search(words, message), message


def test_all_reasons_are_told_at_once(made: Callable[..., Job], tmp_path: Path) -> None:
    job = made(AWQ)

    def change(found: dict[str, torch.Tensor]) -> None:
        _drop("self_attn.o_proj.pre_quant_scale")(found)
        _set("mlp.up_proj.pre_quant_scale", torch.ones(256).half())(found)

    message = _refusal(job, _broken(job, tmp_path / "broken", change), tmp_path / "out")
    assert "o_proj.pre_quant_scale" in message
    assert "up_proj.pre_quant_scale" in message


def test_weights_of_another_kind_than_the_recipe_says_are_refused(made: Callable[..., Job], tmp_path: Path) -> None:
    job, other = made(FP8), made(AWQ)
    message = _refusal(job, other.folder / "checkpoint", tmp_path / "out")
    assert "its weights are W4A16_AWQ, and the recipe says fp8" in message


def test_a_cache_that_the_recipe_does_not_ask_for_is_refused(made: Callable[..., Job], tmp_path: Path) -> None:
    job = made(FP8)
    plain = make_plan(recipe_of("device: l4\nquantization: {weights: fp8}\n"), job.plan.config)
    (tmp_path / "out").mkdir()
    with pytest.raises(PlanError, match="its cache is FP8, and the recipe says fp16"):
        tensorrt_llmapi.build(Order(plain, job.folder / "checkpoint", tmp_path / "out", Silent()))


@pytest.mark.parametrize(("device", "instead"), [("l4", "fp16 or fp8"), ("h100", "fp16 or fp8"), ("a100", "fp16")])
def test_plan_refuses_an_int8_cache_and_names_what_the_device_has(device: str, instead: str) -> None:
    with pytest.raises(PlanError) as caught:
        plan_13b(f"device: {device}\nquantization: {{weights: int4}}\nkv_cache: {{dtype: int8}}\n")
    assert "has no such cache" in caught.value.message
    assert f"Use kv_cache dtype: {instead}" in caught.value.hint.splitlines()


@pytest.mark.parametrize("weights", ["int8", "int8_sq"])
def test_plan_refuses_int8_weights(weights: str) -> None:
    with pytest.raises(PlanError, match=f"takes no {weights} weights"):
        plan_13b(f"device: a100\nquantization: {{weights: {weights}}}\n")


def test_plan_refuses_awq_over_several_gpus_where_its_scales_were_not_split() -> None:
    text = "device: a100\nquantization: {weights: int4}\nparallel: {tp: 2}\n"
    with pytest.raises(PlanError) as caught:
        plan_13b(f"{text}tensorrt_llm: 1.0.0\n")
    assert "pull request 8432" in caught.value.message
    assert "tensorrt_llm" in caught.value.hint
    assert plan_13b(text).tp == 2


def _vllm_accepts(config: dict[str, Any]) -> bool:
    """vllm/model_executor/layers/quantization/modelopt.py @00155cde, from_config, by its words: the flat form."""
    stated = config.get("quantization_config")
    if stated is None:
        return True
    known = {"FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MXFP8", "MIXED_PRECISION"}
    return (
        stated["quant_method"].lower().startswith("modelopt")
        and isinstance(stated.get("ignore", []), list)
        and str(stated.get("quant_algo")).upper() in known
    )


def _sglang_accepts(config: dict[str, Any]) -> bool:
    """python/sglang/srt/layers/quantization/modelopt_quant.py @faeb9685, ModelOptFp8Config.from_config."""
    stated = config.get("quantization_config") or {}
    return "FP8" in (stated.get("quant_algo") or "")


@pytest.mark.parametrize("text", ALL)
def test_other_servers_are_named_where_their_rules_accept_the_folder(made: Callable[..., Job], text: str) -> None:
    job = made(text)
    config = json.loads((job.folder / "engine" / "config.json").read_text())
    named = {title for title, _argv, _source in others(job.plan, "engine")}
    assert ("vLLM" in named) == _vllm_accepts(config)
    assert ("SGLang" in named) == _sglang_accepts(config)
    if text == FP8:
        assert named == {"vLLM", "SGLang"}
        assert config["quantization_config"]["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
        assert all(f"model.layers.{n}.mlp.up_proj.input_scale" in tensors_of(job.folder / "engine") for n in range(2))


def test_other_servers_are_not_named_where_scales_of_the_inputs_are_missing() -> None:
    plan = plan_13b(FP8)
    assert others(plan, "engine")
    assert not others(plan, "engine", static_inputs=False)


def test_the_engine_can_be_read_as_a_checkpoint_again(made: Callable[..., Job]) -> None:
    _checkpoint, engine = folders(made(RTN))
    assert Checkpoint.open(engine).quantization is not None


def test_the_header_of_the_ones_is_aligned(made: Callable[..., Job]) -> None:
    """safetensors asks for data that begins at a multiple of 8 (https://huggingface.co/docs/safetensors)."""
    _checkpoint, engine = folders(made(RTN))
    with (engine / "pre-quant-scales.safetensors").open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
    assert length % 8 == 0
