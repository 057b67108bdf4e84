"""Models whose weights are pickled (``pytorch_model.bin``): plain tensors, taken out without running anything.

A pickle is a program. torch's restricted reader (weights_only) runs none of it: it builds tensors and refuses all else;
and the tensors stay in the mapped file until they are copied. Nothing but floating tensors by name is taken.

Source: https://docs.pytorch.org/docs/stable/generated/torch.load.html (torch 2.13, weights_only and mmap).
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from toolchain import family
from toolchain.checkpoint import SIDE_FILES, read_json, sample_into
from toolchain.errors import ArtifactError, PlanError
from toolchain.quantizers.foreign.folder import DAMAGED, all_finite, plain_units
from toolchain.quantizers.layout import Scheme
from toolchain.quantizers.shards import Unit
from toolchain.safetensors_file import Bytes, TensorPlan

if TYPE_CHECKING:
    import torch

NAME, FILE, INDEX = "pickle", "pytorch_model.bin", "pytorch_model.bin.index.json"
_PIECE_BYTES = 16 * 2**20


def is_pickled(path: Path) -> bool:
    """Whether a folder has pickled weights and no others."""
    return not any(path.glob("*.safetensors")) and any((path / name).is_file() for name in (FILE, INDEX))


def facts(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What can be said of the folder."""
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float16"
    return {"format": NAME, "title": f"unquantized, {dtype}, in pickled files (.bin)", "weights": "none"}


class Pickled:
    """One such folder, its tensors found and checked by name, dtype and shape."""

    scheme: Scheme | None = None

    def __init__(self, path: Path, raw: Mapping[str, Any]) -> None:
        self.path = path
        self.raw = raw
        self.config = family.read_config(raw, str(path / "config.json"))
        self.files = _files(path)
        self.tensors: dict[str, torch.Tensor] = {}
        for file in self.files:
            self.tensors |= _load(file)
        self._shapes = family.expected_tensors(self.config)
        self._check()

    def _check(self) -> None:
        import torch

        known = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
        lost = sorted(set(self._shapes) - set(self.tensors))
        if lost:
            raise ArtifactError(f"{self.path}: {len(lost)} tensors are missing: {', '.join(lost[:4])}", hint=DAMAGED)
        other = sorted(set(self.tensors) - set(self._shapes) - {"lm_head.weight"})
        strange = [name for name in other if not name.endswith("rotary_emb.inv_freq")]
        if strange:
            raise PlanError(f"{self.path}: holds tensors that a Llama does not have: {', '.join(strange[:4])}")
        for name, shape in self._shapes.items():
            tensor = self.tensors[name]
            if tuple(tensor.shape) != shape or tensor.dtype not in known:
                raise ArtifactError(
                    f"{self.path}: {name} is {tensor.dtype} {list(tensor.shape)}; config.json says {list(shape)} of a "
                    "16- or 32-bit float"
                )
        self._dtypes = {name: known[self.tensors[name].dtype] for name in self._shapes}

    @property
    def nbytes(self) -> int:
        return sum(self.tensors[name].nbytes for name in self._shapes)

    @property
    def document(self) -> dict[str, Any]:
        """``config.json`` as it is."""
        return dict(self.raw)

    def side_files(self) -> dict[str, bytes]:
        """The tokenizer's files."""
        return {name: (self.path / name).read_bytes() for name in SIDE_FILES if (self.path / name).is_file()}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the configuration and samples of every file."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for name, content in self.side_files().items():
            digest.update(name.encode() + content)
        for file in self.files:
            sample_into(digest, file)
        return digest.hexdigest()

    def units(self) -> list[Unit]:
        """The plain model, layer by layer."""
        return plain_units(self._shapes, self._dtypes.__getitem__)

    def check(self, advance: Callable[[int], None]) -> None:
        """Nothing is converted, so nothing can fail but what reading finds."""

    def read(self, plan: TensorPlan) -> Iterator[Bytes]:
        """One tensor in pieces. ArtifactError for NaN and infinity."""
        import torch

        flat = self.tensors[plan.name].contiguous().reshape(-1).view(torch.uint8).numpy()
        for start in range(0, flat.nbytes, _PIECE_BYTES):
            piece = np.array(flat[start : start + _PIECE_BYTES])
            if not all_finite(piece, plan.dtype):
                raise ArtifactError(f"{self.path}: {plan.name} holds NaN or infinity", hint=DAMAGED)
            yield piece


def _files(path: Path) -> list[Path]:
    if not (path / INDEX).is_file():
        return [path / FILE]
    named = read_json(path / INDEX).get("weight_map")
    if not isinstance(named, dict):
        raise ArtifactError(f"{path / INDEX}: has no weight_map")
    return [path / str(name) for name in sorted(set(named.values()))]


def _load(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file, mapped. ArtifactError, with nothing run, where it holds anything else."""
    try:
        import torch
    except ImportError as error:
        raise ArtifactError(
            f"{file}: pickled weights need torch to be read", hint="pip install 'scalellm-toolchain[import]'"
        ) from error
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError as error:
        raise ArtifactError(f"{file}: no such file, though the index names it", hint=DAMAGED) from error
    except pickle.UnpicklingError as error:
        raise ArtifactError(
            f"{file}: holds more than tensors, which only running the file could make; it was not run, and it will not "
            f"be: {str(error).splitlines()[0][:200]}",
            hint="Use the safetensors version of the model, from a source that you trust.",
        ) from error
    except (RuntimeError, OSError, ValueError, EOFError) as error:
        raise ArtifactError(
            f"{file}: not readable as the weights of a model: {str(error).splitlines()[0][:200]}", hint=DAMAGED
        ) from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in found.items()
    ):
        raise ArtifactError(f"{file}: holds a {type(found).__name__} of other things than tensors by name")
    return dict(found)
