"""Triton requests as plain numpy dictionaries, and what every model of this repository checks first.

``triton_python_backend_utils`` only exists inside Triton's Python processes, so it is handed in by the models.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np


class RefusedError(ValueError):
    """This request cannot be served as it is. The message names the tensor and goes to the client."""


def refuse_unsound_numpy(strict: bool = False) -> None:
    """Raise RuntimeError where numpy 2 meets a Triton whose Python backend cannot read it.

    Triton up to 24.10 (2.51) returns wrong integers and kills the process on strings, without an error
    (python_backend pull request 384). Containers say their version in ``TRITON_SERVER_VERSION``; ``strict`` assumes
    an old Triton where that is not set.
    """
    if int(np.__version__.split(".")[0]) < 2:
        return
    version = os.environ.get("TRITON_SERVER_VERSION", "")
    new = tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) >= (2, 52)
    if not new and (strict or version):
        raise RuntimeError(
            f"numpy {np.__version__} is installed, and Triton {version or '2.51'} reads tensors wrongly with numpy 2. "
            "Cure: pip install 'numpy<2'   # then start the server again"
        )


def read(request: Any) -> dict[str, np.ndarray]:
    """All tensors that the client sent, by name."""
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}


def strings(array: np.ndarray | None) -> list[str]:
    """A BYTES tensor of any shape -> its strings, empty ones dropped."""
    if array is None:
        return []
    return [text for item in array.reshape(-1) if (text := as_text(item))]


def as_text(item: Any) -> str:
    """One element of a BYTES tensor."""
    return item.decode("utf-8", errors="replace") if isinstance(item, bytes) else str(item)


def scalar(inputs: dict[str, np.ndarray], name: str, default: Any) -> Any:
    """The single value of ``inputs[name]`` as a Python number or bool, or ``default``. Refused if there are more."""
    array = inputs.get(name)
    if array is None or array.size == 0:
        return default
    if array.size != 1:
        raise RefusedError(f"{name}: {array.size} values, expected one")
    return array.reshape(-1)[0].item()


def says_nothing(array: np.ndarray, neutral: float = 0.0) -> bool:
    """Whether the tensor holds only a neutral value: empty, zeros, false, empty strings, or ``neutral``."""
    if array.size == 0:
        return True
    if array.dtype.kind in "OSU":
        return not strings(array)
    return bool(np.all((array == 0) | (array == neutral)))


def refuse(inputs: dict[str, np.ndarray], unsupported: dict[str, str], neutral: dict[str, float] | None = None) -> None:
    """RefusedError for the first tensor that asks for something this model cannot do. ``unsupported``: name -> why."""
    for name, why in unsupported.items():
        array = inputs.get(name)
        if array is not None and not says_nothing(array, (neutral or {}).get(name, 0.0)):
            raise RefusedError(f"{name}: {why}")


def settings(args: dict[str, str]) -> tuple[dict[str, str], Path]:
    """What Triton gives ``initialize`` -> the parameters of config.pbtxt, and the tokenizer's folder."""
    parameters = {key: value["string_value"] for key, value in json.loads(args["model_config"])["parameters"].items()}
    return parameters, Path(args["model_repository"]) / args["model_version"] / parameters["tokenizer_dir"]
