"""Every shipped GPU recipe in every release that can run it: what the plan decided is what Triton is told.

The engine's config.json is made from the exact ``trtllm-build`` command of the plan, as that program would leave it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from tests.engine_folder import config_json, write_engine
from tests.test_recipes_shipped import FOLDER, NAMES, config_of
from tests.test_triton_model import RELEASES
from toolchain.backends import tensorrt_engine
from toolchain.errors import ArtifactError, PlanError
from toolchain.planning import build_flags
from toolchain.planning.plan import Plan, make_plan
from toolchain.recipe import load_recipe
from toolchain.stages.package import package

NO_REUSE = {"t4", "a100", "a100-x3"}
"""INT8 KV, and an SM without fused attention: they exclude paged-context attention, and with it reuse and chunks."""


def plan_of(name: str, release: str) -> Plan | None:
    """None where the plan says that this release does not run the recipe, or it needs no engine."""
    recipe = load_recipe(name, search=[FOLDER])
    try:
        plan = make_plan(recipe.model_copy(update={"tensorrt_llm": release}), config_of(recipe.model))
        _ = tensorrt_engine.inputs(plan)
    except PlanError:
        return None
    return plan if plan.backend == "tensorrt_engine" else None


def built(plan: Plan) -> dict[str, Any]:
    """``config.json``, its numbers from the builder's argv."""
    assert plan.release is not None
    argv = build_flags.command(plan, Path("CHECKPOINT"), Path("ENGINE"))
    flags = dict(zip(argv[1::2], argv[2::2], strict=True))
    config = config_json(plan.release.version, tp=plan.tp, pp=plan.pp, vocab=plan.config.vocab_size)
    limits = ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens", "max_beam_width")
    config["build_config"] |= {name: int(flags[f"--{name}"]) for name in limits}
    paged = flags["--use_paged_context_fmha"] == "enable"
    config["build_config"]["plugin_config"]["use_paged_context_fmha"] = paged
    algos = {"quant_algo": plan.weights.quant_algo, "kv_cache_quant_algo": plan.kv.quant_algo}
    config["pretrained_config"]["quantization"] = algos
    return config


def packaged(plan: Plan, folder: Path) -> dict[str, str]:
    """The parameters of NVIDIA's model in the plan's repository."""
    assert plan.release is not None
    engine = write_engine(
        folder / "engine",
        plan.release.version,
        config=built(plan),
        tp=plan.tp,
        pp=plan.pp,
        runtime=tensorrt_engine.runtime(plan),
        limits=plan.limits,
        weights=plan.weights.name,
        group_size=plan.group_size,
        kv=plan.kv.name,
        vocab_size=plan.config.vocab_size,
        device=plan.device.name,
        sm=plan.device.sm,
    )
    package(engine, folder / "repository", services=plan.services)
    text = (folder / "repository" / "tensorrt_llm" / "config.pbtxt").read_text()
    parsed = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert parsed.max_batch_size == plan.limits.max_batch_size
    return {name: value.string_value for name, value in parsed.parameters.items()}


@pytest.mark.parametrize(
    ("name", "release"), [(name, release) for name in NAMES for release in RELEASES if plan_of(name, release)]
)
def test_triton_is_told_what_the_plan_decided(tmp_path: Path, name: str, release: str) -> None:
    plan = plan_of(name, release)
    assert plan is not None
    told = packaged(plan, tmp_path)
    assert told["max_tokens_in_paged_kv_cache"] == str(plan.max_kv_tokens)
    reuse = "true" if plan.kv_reuse else "false"
    assert (told["enable_kv_cache_reuse"], told["enable_chunked_context"]) == (reuse, reuse)
    if name in NO_REUSE:
        assert reuse == "false"
    assert told["batch_scheduler_policy"] == "guaranteed_no_evict"
    assert plan.max_kv_tokens >= plan.limits.max_seq_len, "or no request of full length would ever be scheduled"


def test_every_recipe_runs_in_some_release() -> None:
    """So that the test above does test something."""
    ran = {name: [release for release in RELEASES if plan_of(name, release)] for name in NAMES}
    assert ran["t4"] == ["0.12.0", "0.13.0"]
    assert ran["a100"][-1] == ran["a100-x3"][-1] == ran["h100"][-1] == ran["rtx4090"][-1] == ran["l4"][-1] == "1.2.1"
    assert ran["cpu"] == ran["tiny"] == []


def test_services_share_a_gpu_by_fixed_tokens(tmp_path: Path) -> None:
    plan = plan_of("a100-x3", "1.2.1")
    assert plan is not None
    told = packaged(plan, tmp_path)
    alone = make_plan(
        load_recipe("a100-x3", search=[FOLDER]).model_copy(update={"services": 1, "tensorrt_llm": "1.2.1"}),
        config_of("meta-llama/Llama-2-13b-chat-hf"),
    )
    assert int(told["max_tokens_in_paged_kv_cache"]) == plan.max_kv_tokens <= alone.max_kv_tokens
    assert plan.memory.available is not None
    assert plan.memory.total <= plan.memory.available, "three services of that many tokens fit"


def test_an_engine_that_was_built_for_other_limits_is_refused_before_it_is_packaged(tmp_path: Path) -> None:
    plan = plan_of("rtx4090", "1.2.1")
    assert plan is not None
    other = replace(plan, limits=replace(plan.limits, max_batch_size=plan.limits.max_batch_size * 2))
    engine = write_engine(
        tmp_path / "engine",
        "1.2.1",
        config=built(other),
        limits=plan.limits,
        weights=plan.weights.name,
        kv=plan.kv.name,
        vocab_size=plan.config.vocab_size,
        runtime=tensorrt_engine.runtime(plan),
    )
    with pytest.raises(ArtifactError, match="max_batch_size is 32, the passport says 16"):
        package(engine, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()
