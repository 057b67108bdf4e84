"""Triton model ``tensorrt_llm`` of the ``tensorrt_llmapi`` backend: TensorRT-LLM's PyTorch runtime in a thread."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from asked import Limits, Specification
from engine_model import EngineModel, OnEvents, RunningEngine
from llm_thread import LlmThread
from specification import specify
from tensors import refuse_unsound_numpy


class TritonPythonModel(EngineModel):
    """The one instance of the model."""

    def start_engine(
        self, folder: Path, parameters: dict[str, str], on_events: OnEvents, on_death: Callable[[str], None]
    ) -> RunningEngine:
        refuse_unsound_numpy()
        return LlmThread(arguments(folder.parent / "model.yaml"), on_events=on_events, on_death=on_death)

    def specify(self, inputs: dict[str, np.ndarray], limits: Limits) -> Specification:
        return specify(inputs, limits)


def arguments(file: Path) -> dict[str, Any]:
    """``model.yaml`` -> the keyword arguments of ``tensorrt_llm.LLM``; a model beside the file gets its whole path."""
    told: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    told.pop("triton_config", None)
    beside = file.parent / str(told["model"])
    return {**told, "model": str(beside)} if beside.is_dir() else told
