"""The order of the stages, and what is stale. Nothing else knows the order.

    recipe + model  ->  checkpoint (quantize)  ->  engine (build)  ->  repository (package)

A TensorRT-LLM engine is built from ``trtllm-checkpoint`` (convert), which stands between the first two. Each artifact
lies in ``WORK/RECIPE/NAME``; those of a draft model, which the repository needs too, in ``WORK/RECIPE/draft/NAME``. Its
key is the hash of its slice of the plan and of the key of what it is made from; same
key and intact files: skipped.
"""

from __future__ import annotations

from toolchain.pipeline.job import Job
from toolchain.pipeline.source import import_model, look
from toolchain.pipeline.state import NAMES, STAGE_OF, Result, State

__all__ = ["NAMES", "STAGE_OF", "Job", "Result", "State", "import_model", "look"]
