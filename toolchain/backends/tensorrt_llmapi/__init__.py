"""TensorRT-LLM's PyTorch runtime: the unified quantized checkpoint is served as it is, behind Triton or trtllm-serve.

Nothing is computed and no GPU is needed: the checkpoint is checked against what the runtime's loader needs, and its
shards are linked into the engine's folder, with the documents as the loader reads them and the runtime's settings. It
works for every release of the table with ``llmapi``, and goes on where TensorRT-LLM has no engines any more. scalellm's
authors had no GPU with TensorRT-LLM: this is written against its source text.
"""

from __future__ import annotations

from typing import Any

from toolchain.backends import Order
from toolchain.backends.tensorrt_llmapi.checks import check
from toolchain.backends.tensorrt_llmapi.folder import write
from toolchain.backends.tensorrt_llmapi.settings import arguments
from toolchain.checkpoint import Checkpoint
from toolchain.planning.plan import Plan

name = "tensorrt_llmapi"
VERSION = "1"


def inputs(plan: Plan) -> dict[str, Any]:
    """What the runtime is told: with other settings it is another engine."""
    return {"arguments": arguments(plan)}


def lacks(order: Order) -> tuple[str, ...]:
    """Nothing: the folder is made on any machine; the GPU is needed where it is served."""
    return ()


def build(order: Order) -> None:
    """Check the quantized checkpoint and fill the order's draft folder.

    Raises PlanError with everything that the loader would refuse, or take and compute wrongly.
    """
    checkpoint = Checkpoint.open(order.source)
    check(checkpoint, order.plan)
    with order.progress.task("build: link the checkpoint", checkpoint.nbytes, "bytes") as task:
        write(checkpoint, order.plan, order.out)
        task.advance(checkpoint.nbytes)


def runtime(plan: Plan) -> dict[str, Any]:
    """The keyword arguments of ``tensorrt_llm.LLM``; also in the engine's ``model.yaml``."""
    return {"llm": arguments(plan)}


def versions() -> dict[str, str]:
    """None of this machine: the passport names the release that serves it."""
    return {}
