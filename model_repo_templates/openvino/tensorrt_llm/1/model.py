"""Triton model ``tensorrt_llm`` of the CPU engine: OpenVINO GenAI in a process of its own (``engine_process.py``)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from asked import Limits, Specification
from drafting import Drafting
from engine_client import EngineClient
from engine_model import EngineModel, OnEvents, RunningEngine
from judging import JUDGE, GuidedEngine
from specification import specify
from tensors import refuse_unsound_numpy, scalar


class TritonPythonModel(EngineModel):
    """The one instance of the model."""

    def start_engine(
        self, folder: Path, parameters: dict[str, str], on_events: OnEvents, on_death: Callable[[str], None]
    ) -> RunningEngine:
        refuse_unsound_numpy(strict=True)
        self._drafting = Drafting.of(json.loads((folder / "engine.json").read_text(encoding="utf-8"))["runtime"])
        services = int(parameters["services"])
        client = EngineClient(folder, on_events=on_events, on_death=on_death, services=services)
        return GuidedEngine(client, folder, on_events) if (folder / JUDGE).is_dir() else client

    def specify(self, inputs: dict[str, np.ndarray], limits: Limits) -> Specification:
        if self._drafting is None:
            return specify(inputs, limits)
        metrics = bool(scalar(inputs, "return_perf_metrics", False))
        found = specify({name: array for name, array in inputs.items() if name != "return_perf_metrics"}, limits)
        self._drafting.check(found.options)
        return replace(found, count_drafts=metrics)
