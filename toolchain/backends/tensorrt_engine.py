"""The TensorRT-LLM engine lane. This release knows what it needs of a machine, and ends before ``trtllm-build``.

Everything up to here (plan, quantized checkpoint) is done on any machine; the engine itself can only be built on a GPU
of its own kind. Writing TensorRT-LLM checkpoints and driving ``trtllm-build`` is not part of this release, and it says
so rather than pretending: see CHANGELOG.md.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from toolchain import runner
from toolchain.checkpoint import Checkpoint
from toolchain.errors import ToolError
from toolchain.plan import Plan
from toolchain.progress import Progress

name = "tensorrt_engine"
VERSION = "0"


def visible_gpus() -> list[tuple[str, int]]:
    """(name, SM) of each GPU that ``nvidia-smi`` shows, such as ``("NVIDIA GeForce RTX 4090", 89)``; empty without one.

    Query field ``compute_cap``: https://docs.nvidia.com/deploy/nvidia-smi/ (2026-11-01).
    """
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        done = runner.run(["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"], timeout_s=20)
    except ToolError:
        return []
    rows = [line.rsplit(",", 1) for line in done.stdout.splitlines() if "," in line]
    return [(gpu.strip(), round(float(cap) * 10)) for gpu, cap in rows if cap.strip().replace(".", "").isdigit()]


def missing_gpu(plan: Plan) -> list[str]:
    """One line if no GPU of the plan's compute capability is visible here, else none."""
    gpus = visible_gpus()
    if any(sm == plan.device.sm for _, sm in gpus):
        return []
    seen = ", ".join(f"{gpu} (SM {sm})" for gpu, sm in gpus) or "no GPU"
    return [f"a GPU of SM {plan.device.sm}, such as the {plan.device.title}: this machine has {seen}"]


def lacks(plan: Plan) -> tuple[str, ...]:
    """The GPU, the builder, and the lane itself."""
    missing = missing_gpu(plan)
    if shutil.which("trtllm-build") is None:
        version = plan.release.version if plan.release else "the recipe's release"
        missing.append(f"trtllm-build of TensorRT-LLM {version}: it is not on PATH")
    missing.append(f"the engine lane of scalellm itself: {name} ends at the quantized checkpoint in this release")
    return tuple(missing)


def build(checkpoint: Checkpoint, out: Path, progress: Progress) -> None:
    """Never reached in this release: ``lacks`` is never empty."""
    raise ToolError(f"{name}: this release ends at the quantized checkpoint", hint=f"It lies in {checkpoint.path}")


def runtime(plan: Plan) -> dict[str, Any]:
    """Settings of the serving runtime; none before there is an engine."""
    return {}


def versions() -> dict[str, str]:
    """No foreign library is used yet."""
    return {}
