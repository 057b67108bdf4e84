"""The TensorRT-LLM engine: ``trtllm-build`` on a GPU of its own kind, from a TensorRT-LLM checkpoint.

The checkpoint is written on any machine (``tensorrt_llm``), the builder's command comes from ``build_flags``, and a
``Host`` runs it. scalellm's authors had no GPU with TensorRT-LLM: this is written against its source text.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from toolchain.adapters import Adapter, digest, open_adapter
from toolchain.backends import Order
from toolchain.backends.tensorrt_llm.adapters import write_adapters
from toolchain.errors import ArtifactError, ToolError
from toolchain.host import EngineJob
from toolchain.planning import build_flags
from toolchain.planning.lora import MAX_RANK
from toolchain.planning.plan import Plan

name = "tensorrt_engine"
VERSION = "1"

_FROM_CHECKPOINT = ("config.json",)
"""Files of the TensorRT-LLM checkpoint that are not the tokenizer's; the builder writes its own of the first."""


def inputs(plan: Plan) -> dict[str, Any]:
    """The builder's command: an engine with other flags is another engine. Raises PlanError where it would refuse."""
    guided = {"guided_decoding": plan.recipe.guided_decoding} if plan.recipe.guided_decoding else {}
    lora = {"lora": [{"name": one.name, "sha256": digest(Path(one.path))} for one in plan.recipe.lora]}
    argv = list(build_flags.command(plan, Path("CHECKPOINT"), Path("ENGINE")))
    return {"argv": argv, **guided, **(lora if plan.recipe.lora else {})}


def lacks(order: Order) -> tuple[str, ...]:
    """What the order's host lacks."""
    assert order.host is not None  # the pipeline names one for this backend
    return order.host.lacks(job(order))


def job(order: Order) -> EngineJob:
    """The order as a host takes it."""
    plan = order.plan
    assert plan.release is not None  # choose_release has refused this backend without one

    def argv(checkpoint: str, out: str) -> tuple[str, ...]:
        return build_flags.command(plan, Path(checkpoint), Path(out))

    gpus = plan.tp * plan.pp
    return EngineJob(plan.recipe.name, plan.release, plan.device, gpus, order.source, order.out, argv, order.key)


def build(order: Order) -> None:
    """Let the host run ``trtllm-build``; then the tokenizer's files come from the checkpoint.

    Raises ToolError when the builder fails, or leaves less than ``config.json`` and a file for each rank.
    """
    assert order.host is not None
    assert order.log is not None
    wanted, adapters = job(order), _adapters(order.plan)
    _clear(order.out)
    order.host.build(wanted, order.log, order.progress)
    missing = [file for file in ("config.json", *ranks(wanted.gpus)) if not (order.out / file).is_file()]
    if missing:
        raise ToolError(
            f"{build_flags.PROGRAM} ended well and left no {', '.join(missing)}", hint=f"The whole log: {order.log}"
        )
    if order.log.is_file():
        _take(order.log, order.out)
    write_adapters(adapters, order.plan.config, order.out)
    for file in order.source.iterdir():
        if file.is_file() and file.name not in _FROM_CHECKPOINT and file.suffix != ".safetensors":
            _take(file, order.out)


def _adapters(plan: Plan) -> list[Adapter]:
    """The recipe's adapters. Raises ArtifactError for one that does not fit the model or the engine."""
    found = [open_adapter(one.name, Path(one.path), plan.config) for one in plan.recipe.lora]
    for adapter in found:
        if adapter.rank > MAX_RANK:
            raise ArtifactError(f"{adapter.path}: its rank is {adapter.rank}, the engine's at most {MAX_RANK}")
    return found


def ranks(count: int) -> tuple[str, ...]:
    """The files of an engine's ranks (TensorRT-LLM tensorrt_llm/builder.py @0.12 to 1.2)."""
    return tuple(f"rank{rank}.engine" for rank in range(count))


def runtime(plan: Plan) -> dict[str, Any]:
    """What the C++ backend of Triton is told.

    With a window, chunks of a prompt would overwrite what later ones attend to: it is one piece then.
    """
    found: dict[str, Any] = {
        "max_tokens_in_paged_kv_cache": plan.max_kv_tokens,
        "enable_kv_cache_reuse": plan.kv_reuse,
        "enable_chunked_context": plan.chunked_context,
    }
    if plan.window:
        found |= {"max_attention_window_size": plan.window.tokens, "sink_token_length": plan.window.sinks}
    if plan.recipe.lora:
        found["lora"] = [one.name for one in plan.recipe.lora]
    if plan.recipe.guided_decoding:
        found["guided_decoding"] = plan.recipe.guided_decoding
    if plan.speculation:
        found["draft"] = {"tokens": plan.speculation.tokens}
    return found


def versions() -> dict[str, str]:
    """None of this machine: the passport names the release, and the engine's own config.json says it again."""
    return {}


def _clear(out: Path) -> None:
    """What an interrupted build left in the draft folder is no engine."""
    for left in ("config.json", *(file.name for file in out.glob("rank*"))):
        (out / left).unlink(missing_ok=True)


def _take(file: Path, out: Path) -> None:
    if file.name.startswith("stamp"):
        return
    shutil.copyfile(file, out / file.name)
    with (out / file.name).open("rb") as stream:
        os.fsync(stream.fileno())
