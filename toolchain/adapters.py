"""LoRA adapters as PEFT saves them: which matrices a folder holds, and whether they fit a model.

    W x + scaling B (A x),  A [rank, in], B [out, rank], scaling = lora_alpha / r (lora_alpha / sqrt(r) with rslora)

Source: https://huggingface.co/docs/peft/developer_guides/checkpoint and peft/tuners/lora/config.py (read 2026-11). Only
safetensors are read. What an adapter may say beyond that formula (biases, DoRA, whole layers) is refused by name. It
does not know how an engine takes adapters.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from toolchain.checkpoint import TensorInfo, read_header, read_json
from toolchain.errors import ArtifactError
from toolchain.family import LINEARS, LlamaConfig, linear_name, linear_shape

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NOTHING: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "fan_in_fan_out": (None, False),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
}
"""Keys of adapter_config.json -> the values with which they ask for nothing."""
_TENSOR = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(.+)\.lora_([AB])(?:\.default)?\.weight")
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_AGAIN = "Save it again with peft: model.save_pretrained(DIR)"

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Adapter:
    """One adapter of a model."""

    name: str
    path: Path
    rank: int
    scaling: float
    tensors: Mapping[tuple[int, str, str], TensorInfo]
    """(layer, linear, ``"A"`` or ``"B"``) -> where it is."""

    def has(self, layer: int, linear: str) -> bool:
        return (layer, linear, "A") in self.tensors

    def matrices(self, layer: int, linear: str) -> tuple[Floats, Floats]:
        """A [rank, in] and B [out, rank], times ``scaling``. ArtifactError for numbers that are none."""
        first, second = (self._floats(self.tensors[layer, linear, which]) for which in "AB")
        return first, second * np.float32(self.scaling)

    def _floats(self, info: TensorInfo) -> Floats:
        raw = np.fromfile(info.file, np.uint8, info.nbytes, offset=info.offset).view(_DTYPES[info.dtype])
        wide = (raw.astype(np.uint32) << 16).view(np.float32) if info.dtype == "BF16" else raw.astype(np.float32)
        if not np.isfinite(wide).all():
            raise ArtifactError(f"{info.file}: damaged: {info.name} holds numbers that are not finite", hint=_AGAIN)
        return wide.reshape(info.shape)


def open_adapter(name: str, path: Path, config: LlamaConfig) -> Adapter:
    """The adapter in the folder ``path``, as it fits ``config``. Raises ArtifactError with everything that does not."""
    told = read_json(path / CONFIG, hint="An adapter is a folder that peft has saved")
    if not (path / WEIGHTS).is_file():
        pickled = " (only pickled weights, which can run code)" if (path / "adapter_model.bin").is_file() else ""
        raise ArtifactError(f"{path}: has no {WEIGHTS}{pickled}", hint=_AGAIN)
    problems = list(_config_problems(told))
    tensors: dict[tuple[int, str, str], TensorInfo] = {}
    for full, info in read_header(path / WEIGHTS).items():
        place = _TENSOR.fullmatch(full)
        if place is None or place[2] not in LINEARS or int(place[1]) >= config.num_layers:
            problems.append(f"{full} belongs to no linear layer of this model's {config.num_layers} decoder layers")
        else:
            tensors[int(place[1]), place[2], place[3]] = info
    rank, alpha = told.get("r"), told.get("lora_alpha")
    if not problems:
        problems = list(_shape_problems(tensors, int(rank or 0), config))
    if problems:
        listed = "".join(f"\n  - {line}" for line in problems[:10])
        raise ArtifactError(f"{path}: the adapter {name} does not fit the model:{listed}", hint=_AGAIN)
    width = math.sqrt(int(rank or 0)) if told.get("use_rslora") else int(rank or 0)
    return Adapter(name, path, int(rank or 0), float(alpha or 0) / width, tensors)


def digest(path: Path) -> str:
    """sha256 of the folder's two files: what an engine made from it depends on. Raises ArtifactError."""
    found = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        try:
            found.update((path / name).read_bytes())
        except OSError as error:
            raise ArtifactError(f"{path / name}: {error.strerror}", hint="Correct lora[].path in the recipe") from error
    return found.hexdigest()


def _config_problems(told: Mapping[str, Any]) -> Iterator[str]:
    if told.get("peft_type") != "LORA":
        yield f"{CONFIG}: peft_type is {told.get('peft_type')!r}, not LORA"
    if told.get("task_type") not in (None, "CAUSAL_LM"):
        yield f"{CONFIG}: task_type is {told['task_type']!r}, not CAUSAL_LM"
    rank, alpha = told.get("r"), told.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        yield f"{CONFIG}: r is {rank!r}, not a rank"
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
        yield f"{CONFIG}: lora_alpha is {alpha!r}, not a number"
    for key, nothing in _NOTHING.items():
        if told.get(key) not in nothing:
            yield f"{CONFIG}: {key} {str(told[key])[:60]} is not supported"


def _shape_problems(
    tensors: Mapping[tuple[int, str, str], TensorInfo], rank: int, config: LlamaConfig
) -> Iterator[str]:
    if not tensors:
        yield f"{WEIGHTS} holds no matrices"
    for (layer, linear, which), info in tensors.items():
        rows, columns = linear_shape(config, linear)
        wanted = (rank, columns) if which == "A" else (rows, rank)
        if info.shape != wanted:
            yield f"{info.name} is {list(info.shape)}, for this model and r {rank} it must be {list(wanted)}"
        if info.dtype not in _DTYPES:
            yield f"{info.name} is {info.dtype}, not a 16- or 32-bit float"
        if (layer, linear, "B" if which == "A" else "A") not in tensors:
            yield f"{linear_name(layer, linear)} has lora_{which} alone"
