"""TensorRT-LLM's PyTorch runtime behind Triton's ``llmapi`` model. This release ends before it.

The runtime loads the unified quantized checkpoint as it is, so there is nothing to build but a check and a passport;
writing its Triton repository is not part of this release, and it says so: see CHANGELOG.md.
"""

from __future__ import annotations

from typing import Any

from toolchain.backends import Order
from toolchain.errors import ToolError
from toolchain.gpu import missing_gpu
from toolchain.plan import Plan

name = "tensorrt_llmapi"
VERSION = "0"


def inputs(plan: Plan) -> dict[str, Any]:
    """Nothing beyond the plan's slice."""
    return {}


def lacks(order: Order) -> tuple[str, ...]:
    """The GPU, and the lane itself."""
    return (
        *missing_gpu(order.plan.device.sm, order.plan.device.title),
        f"the {name} lane of scalellm itself: it ends at the quantized checkpoint in this release",
    )


def build(order: Order) -> None:
    """Never reached in this release: ``lacks`` is never empty."""
    raise ToolError(f"{name}: this release ends at the quantized checkpoint", hint=f"It lies in {order.source}")


def runtime(plan: Plan) -> dict[str, Any]:
    """Settings of the serving runtime; none before there is a repository."""
    return {}


def versions() -> dict[str, str]:
    """No foreign library is used yet."""
    return {}
