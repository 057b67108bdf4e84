"""inspect: what a folder or a file is. It reads configurations, headers, stamps and passports, and changes nothing.

``model`` knows models, quantized or not, and GGUF files; ``built`` engines and model repositories; ``converted``
TensorRT-LLM checkpoints. Each says what it found, what is wrong with it, and what to type next.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from toolchain import workspace
from toolchain.engine import PASSPORT
from toolchain.errors import ArtifactError
from toolchain.repository import CONTENTS
from toolchain.stages.inspect import built, converted, model
from toolchain.stages.inspect.model import Inspection, parameters
from toolchain.stages.inspect.sheet import Sheet

__all__ = ["Inspection", "Sheet", "inspect", "parameters"]


def inspect(path: Path) -> Inspection | Sheet:
    """Look at a folder or file. Raises ArtifactError where there is none, or a damaged one."""
    if not path.exists():
        raise ArtifactError(f"{path}: no such file or folder", hint="scalellm inspect DIR|FILE.gguf")
    if path.is_file():
        return model.inspect(path)
    stamp = workspace.read_stamp(path)
    stage = stamp.stage if stamp else ""
    if stage == "engine" or (path / PASSPORT).is_file():
        return built.engine(path, stamp)
    if stage == "repository" or (path / CONTENTS).is_file():
        return built.repository(path, stamp)
    config = _config(path)
    if {"version", "pretrained_config", "build_config"} <= set(config):
        return built.foreign_engine(path)
    if stage == "trtllm-checkpoint" or {"mapping", "architecture"} <= set(config):
        return converted.checkpoint(path, stamp)
    return model.inspect(path)


def _config(path: Path) -> dict[str, Any]:
    """``config.json``, empty where there is none; what is wrong with it the room says that reads it."""
    try:
        found = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
