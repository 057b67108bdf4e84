"""The GPUs of this machine, as its driver names them. It does not know which device a recipe wants."""

from __future__ import annotations

import shutil

from toolchain import runner
from toolchain.errors import ToolError


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


def missing_gpu(sm: int | None, title: str) -> list[str]:
    """One line if no GPU of compute capability ``sm``, such as the device ``title``, is visible here, else none."""
    gpus = visible_gpus()
    if any(found == sm for _, found in gpus):
        return []
    seen = ", ".join(f"{gpu} (SM {found})" for gpu, found in gpus) or "no GPU"
    return [f"a GPU of SM {sm}, such as the {title}: this machine has {seen}"]
