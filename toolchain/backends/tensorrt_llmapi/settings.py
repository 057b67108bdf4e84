"""What TensorRT-LLM's PyTorch runtime is told, by release: arguments of ``LLM()``, YAML files, trtllm-serve's argv.

Pure: it looks at no machine and imports no TensorRT-LLM. Names and sources: ``facts/llmapi.yaml``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from toolchain import workspace
from toolchain.planning.plan import Plan
from toolchain.release import within

ENGINE_FOLDER = "engine"
"""What ``model.yaml`` calls the model: the folder beside it in a Triton repository."""

_HEADERS = {
    "model.yaml": """\
# What tensorrt_llm.LLM() is told, and under triton_config what Triton is: the file format of NVIDIA's llmapi model
# (TensorRT-LLM triton_backend/all_models/llmapi/tensorrt_llm/1/model.yaml). To serve this engine with NVIDIA's own
# model.py instead, which takes text and has other tensors: put this file beside it in the version folder, and replace
# the value of model by the absolute path of the engine's folder.
""",
    "trtllm-serve.yaml": """\
# What trtllm-serve is told besides its flags: trtllm-serve DIR --extra_llm_api_options DIR/trtllm-serve.yaml ...
# scalellm commands prints the whole command.
""",
}


def arguments(plan: Plan) -> dict[str, Any]:
    """The keyword arguments of ``LLM()``, ``model`` first; every name is one that the plan's release knows.

    Limits and cache are those of one service of the plan. A prompt that is longer than a step is cut into pieces, which
    takes chunked prefill. The cache holds as many tokens as the plan has counted, at most ``free_gpu_memory_fraction``
    of the memory that is free then.
    """
    limits = plan.limits
    found: dict[str, Any] = {
        "model": ENGINE_FOLDER,
        "backend": "pytorch",
        "tensor_parallel_size": plan.tp,
        "pipeline_parallel_size": plan.pp,
        "max_batch_size": limits.max_batch_size,
        "max_num_tokens": limits.max_num_tokens,
        "max_seq_len": limits.max_seq_len,
        "max_beam_width": 1,
        "enable_chunked_prefill": limits.max_num_tokens < limits.max_input_len,
        "kv_cache_config": {
            "dtype": "fp8" if plan.kv.name == "fp8" else "auto",
            "enable_block_reuse": plan.kv_reuse,
            "free_gpu_memory_fraction": workspace.facts("llmapi")["arguments"]["free_gpu_memory_fraction"],
            "max_tokens": plan.max_kv_tokens,
        },
        "cuda_graph_config": {"enable_padding": True, "max_batch_size": limits.max_batch_size},
    }
    return found | sampler(plan.release.version if plan.release else "")


def sampler(release: str) -> dict[str, Any]:
    """The argument that chooses the sampler with all of the client contract's features; empty where none is known."""
    rows = workspace.facts("llmapi")["samplers"] if release else ()
    return next(({row["key"]: row["value"]} for row in rows if within(release, row)), {})


def model_yaml(told: Mapping[str, Any]) -> str:
    """``model.yaml`` for Triton: the arguments, and what NVIDIA's model.py reads of ``triton_config``.

    ``max_batch_size`` 0 there means that Triton does not batch; NVIDIA's model takes one prompt a request.
    """
    triton = {"max_batch_size": 0, "decoupled": True, "cancellation_check_period_ms": 100}
    return _HEADERS["model.yaml"] + _dump({**told, "triton_config": triton})


def serve_yaml(told: Mapping[str, Any]) -> str:
    """``trtllm-serve.yaml``: the arguments that have no flag, and those whose flag the YAML would overrule."""
    flagged = {"model", "backend", "tensor_parallel_size", "pipeline_parallel_size"}
    limits = {"max_batch_size", "max_num_tokens", "max_seq_len", "max_beam_width"}
    rest = {name: value for name, value in told.items() if name not in flagged | limits}
    return _HEADERS["trtllm-serve.yaml"] + _dump(rest)


def _dump(document: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(document), sort_keys=False, default_flow_style=False)


def serve_command(plan: Plan, folder: str, *, host: str = "127.0.0.1", port: int = 8000) -> tuple[str, ...]:
    """The argv of ``trtllm-serve`` for the engine in ``folder``; the same spellings for every release of the table."""
    serve = workspace.facts("llmapi")["serve"]
    values = {
        "backend": "pytorch",
        "host": host,
        "port": port,
        "tp": plan.tp,
        "pp": plan.pp,
        "max_batch_size": plan.limits.max_batch_size,
        "max_num_tokens": plan.limits.max_num_tokens,
        "max_seq_len": plan.limits.max_seq_len,
        "options": f"{folder}/trtllm-serve.yaml",
    }
    flags = (word for name, value in values.items() for word in (serve["flags"][name], str(value)))
    return (serve["program"], folder, *flags)


def container_command(image: str, engine: str, argv: tuple[str, ...]) -> tuple[str, ...]:
    """``docker run`` of ``argv`` in NVIDIA's image, with the engine's folder read-only at the same path.

    Limits and IPC as TensorRT-LLM's own pages have them (nvidia.github.io/TensorRT-LLM/1.0.0, quick start, 2026-11-22).
    """
    machine = ("--gpus=all", "--network=host", "--ipc=host", "--ulimit=memlock=-1", "--ulimit=stack=67108864")
    return ("docker", "run", "--rm", *machine, f"--volume={engine}:{engine}:ro", image, *argv)


def others(plan: Plan, folder: str, *, static_inputs: bool = True) -> list[tuple[str, tuple[str, ...], str]]:
    """The other servers that load the engine's folder, by their source text: (title, argv, source).

    ``static_inputs``: whether the checkpoint holds the scales of the linear layers' inputs.
    """
    found = []
    for row in workspace.facts("llmapi")["others"].values():
        algo = plan.weights.quant_algo
        complete = algo is None or static_inputs or "input_scale" not in row["needs"]
        if algo in row["quant_algos"] and complete and (algo is None or (plan.device.sm or 0) >= row["least_sm"]):
            split = (row["tp"], str(plan.tp)) if plan.tp > 1 else ()
            found.append((str(row["title"]), (*row["argv"], folder, *split), str(row["source"])))
    return found
