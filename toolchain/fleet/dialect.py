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
_FOLDERS = ("common/shared", "common/tensorrt_llm_bls/1")


def dialect(parameters: Mapping[str, Any]) -> Spoken:
    """Of the engine of a repository, by its ``repository.Repository.parameters``."""
    shared = load_together(_FOLDERS, ("tensors", "wiring"))
    told = {name: str(parameters.get(name, "")) for name in ("engine_release", "engine_renamed", "engine_lacks")}
    names = shared["wiring"].EngineNames.of(told)
    if not names.renamed and not names.lacks:
        return dict

    def spoken(inputs: Mapping[str, Any]) -> dict[str, Any]:
        arrays = {name: np.array([listed(value)]) for name, value in inputs.items()}
        try:
            renamed = names.inputs(arrays)
        except shared["tensors"].RefusedError as error:
            raise refused(str(error)) from None
        return {name: array.reshape(-1).tolist() for name, array in renamed.items()}

    return spoken
