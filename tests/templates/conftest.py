"""Puts the templates' folders on the path, as Triton puts a model's version folder there."""

from __future__ import annotations

import sys
from pathlib import Path

TEMPLATES = Path(__file__).resolve().parents[2] / "model_repo_templates"

for folder in (
    "common/shared",
    "common/preprocessing/1",
    "common/postprocessing/1",
    "common/tensorrt_llm_bls/1",
    "openvino/tensorrt_llm/1",
):
    sys.path.append(str(TEMPLATES / folder))
