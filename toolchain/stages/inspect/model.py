"""What a folder of a model, or a GGUF file, is: family, size, quantization, whether scalellm takes it and how.

It reads configurations, headers and, where there are zero points, one matrix. It changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from toolchain import family, workspace
from toolchain.checkpoint import KV_RANGES, read_headers, read_json
from toolchain.errors import ArtifactError, PlanError
from toolchain.family import LlamaConfig
from toolchain.quantization import WEIGHTS
from toolchain.quantizers import foreign
from toolchain.quantizers.foreign import Identity

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pth")
_CALIBRATED_METHODS = ("autoawq", "gptq")
_CALIBRATED_TENSORS = (".input_scale", ".pre_quant_scale", ".k_scale", ".v_scale")


@dataclass(frozen=True)
class Inspection:
    """What was found; ``identity`` says what it is and whether it can be used."""

    identity: Identity
    architecture: str
    """Empty where no configuration could be read."""
    parameters: int
    layers: int
    dtype: str
    calibrated: bool
    """Whether ranges of activations, or the rounding itself, were measured on text."""
    weight_files: int
    nbytes: int
    """Of all files."""
    stamp: str
    """What our stamp says, such as ``"checkpoint, made 2026-11-22T14:00:00Z"``; empty without one."""
    next: str
    """What to type."""


def inspect(path: Path) -> Inspection:
    """Look at a folder or file that is there."""
    stamp = workspace.read_stamp(path) if path.is_dir() else None
    files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]
    identity = foreign.identify(path)
    config = _config(identity.path)
    return Inspection(
        identity=identity,
        architecture=config.architecture if config else "",
        parameters=parameters(config) if config else 0,
        layers=config.num_layers if config else 0,
        dtype=config.dtype if config else "",
        calibrated=_calibrated(identity),
        weight_files=sum(file.suffix in _WEIGHT_SUFFIXES for file in files),
        nbytes=sum(file.stat().st_size for file in files),
        stamp=f"{stamp.stage}, made {stamp.created}" if stamp else "",
        next=_next(identity),
    )


def parameters(config: LlamaConfig) -> int:
    """The numbers of an unquantized model; tied embeddings count once."""
    return sum(math.prod(shape) for shape in family.expected_tensors(config).values())


def _config(path: Path) -> LlamaConfig | None:
    """The model's configuration, also where its weights are refused; None for another family."""
    try:
        if path.is_file():
            model = foreign.open_foreign(path)
            return model.config if model else None
        return family.read_config(read_json(path / "config.json"), str(path))
    except (PlanError, ArtifactError):
        return None


def _calibrated(identity: Identity) -> bool:
    if identity.format in _CALIBRATED_METHODS or (identity.path / KV_RANGES).exists():
        return True
    try:
        return any(name.endswith(_CALIBRATED_TENSORS) for name in read_headers(identity.path))
    except ArtifactError:
        return False


def _next(identity: Identity) -> str:
    if identity.use == "refused":
        return identity.hint
    build = f"scalellm build --recipe RECIPE --model {identity.path}"
    recipe = ""
    if identity.weights not in (None, "none"):
        recipe = f"   # the recipe says {WEIGHTS[identity.weights].in_recipe(identity.group_size or 128)}"
    if identity.use == "direct":
        return build + recipe
    return f"{build}{recipe}\nor once for all: scalellm import {identity.path} OUT"
