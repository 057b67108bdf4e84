"""Write the TensorRT-LLM checkpoint that ``trtllm-build`` takes, from the quantized one. Quantizes nothing again."""

from __future__ import annotations

from typing import Any

from toolchain.backends import tensorrt_llm
from toolchain.checkpoint import Checkpoint
from toolchain.planning.plan import Plan
from toolchain.progress import Progress
from toolchain.workspace import Draft

VERSION = "2"
"""Raised when the same quantized checkpoint would give other files."""


def inputs(plan: Plan, checkpoint_key: str) -> dict[str, Any]:
    """What the files depend on, as plain JSON: their key is the hash of this."""
    return {**plan.slice("convert"), "convert_version": VERSION, "checkpoint": checkpoint_key}


def convert(plan: Plan, checkpoint: Checkpoint, draft: Draft, *, progress: Progress) -> None:
    """Write ``config.json`` and a file for each of tp x pp ranks into ``draft``; what is not quantized in plan.dtype.

    Raises PlanError with every reason why this checkpoint cannot be written so, ArtifactError for too little room and
    for a number that the dtype does not reach.
    """
    hashes = tensorrt_llm.write(
        checkpoint, draft.path, tp=plan.tp, pp=plan.pp, kv=plan.kv.name, dtype=plan.dtype, progress=progress
    )
    for file, digest in hashes.items():
        draft.known_hash(file, digest)
