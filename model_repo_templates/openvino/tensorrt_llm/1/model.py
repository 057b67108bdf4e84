"""Triton model ``tensorrt_llm`` of the CPU engine: OpenVINO GenAI in a process of its own (``engine_process.py``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from asked import Limits, Specification
from engine_client import EngineClient
from engine_model import EngineModel, OnEvents, RunningEngine
from specification import specify
from tensors import refuse_unsound_numpy


class TritonPythonModel(EngineModel):
    """The one instance of the model."""

    def start_engine(
        self, folder: Path, parameters: dict[str, str], on_events: OnEvents, on_death: Callable[[str], None]
    ) -> RunningEngine:
        refuse_unsound_numpy(strict=True)
        return EngineClient(folder, on_events=on_events, on_death=on_death)

    def specify(self, inputs: dict[str, np.ndarray], limits: Limits) -> Specification:
        return specify(inputs, limits)
