"""How a worker's engine calls what it takes: requests travel by the newest names, and older releases of TensorRT-LLM
have others, or lack some. It is what ``tensorrt_llm_bls`` does before it asks the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from toolchain.fleet.wire import listed
from toolchain.gateway.failures import refused
from toolchain.gateway.shared import load_together

Spoken = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Inputs by their newest names -> inputs as the engine calls them. Raises ApiError for what its release lacks."""
SHARED = ("common/shared", "common/tensorrt_llm_bls/1")
"""Folders of what ships to Triton and runs here too."""


def engine_names(parameters: Mapping[str, Any]) -> Any:
    """How the engine of a repository differs, by its ``repository.Repository.parameters``."""
    told = {name: str(parameters.get(name, "")) for name in ("engine_release", "engine_renamed", "engine_lacks")}
    return load_together(SHARED, ("tensors", "wiring"))["wiring"].EngineNames.of(told)


def dialect(parameters: Mapping[str, Any]) -> Spoken:
    """Of the engine of a repository."""
    names = engine_names(parameters)
    if not names.renamed and not names.lacks:
        return dict
    refusal = load_together(SHARED, ("tensors", "wiring"))["tensors"].RefusedError

    def spoken(inputs: Mapping[str, Any]) -> dict[str, Any]:
        arrays = {name: np.array([listed(value)]) for name, value in inputs.items()}
        try:
            renamed = names.inputs(arrays)
        except refusal as error:
            raise refused(str(error)) from None
        return {name: array.reshape(-1).tolist() for name, array in renamed.items()}

    return spoken
