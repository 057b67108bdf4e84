"""A folder of safetensors that another tool wrote: its tensors as numpy sees them, and what can be told of all of them.

The formats build on it and say how one matrix is unpacked. It writes nothing, and it knows no format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from toolchain import family
from toolchain.checkpoint import Checkpoint, TensorInfo
from toolchain.errors import ArtifactError, PlanError
from toolchain.quantizers import layout
from toolchain.quantizers.layout import Scheme
from toolchain.quantizers.shards import Unit
from toolchain.safetensors_file import Bytes, TensorPlan

FLOATS = ("F16", "BF16", "F32")
START_ANEW = "Start from the unquantized model: scalellm quantize --recipe RECIPE --model DIR"
DAMAGED = "Download or copy the model again."
KEPT_GROUPS = (128, 64, 32)
"""The group sizes that the carrier has, largest first; the first one stands in schemes that have no groups."""

_NUMPY = {
    "F16": "<f2",
    "BF16": "<u2",
    "F32": "<f4",
    "F8_E4M3": "u1",
    "U8": "u1",
    "I8": "i1",
    "I32": "<i4",
    "I64": "<i8",
}
_EXPONENT = {"F16": 0x7C00, "BF16": 0x7F80}
_PIECE_BYTES = 16 * 2**20
_IGNORED = (".rotary_emb.inv_freq",)

Array = npt.NDArray[Any]


class Folder:
    """What every foreign folder of safetensors has in common.

    A format sets ``scheme`` (None where the weights are plain) and gives ``linear``; ``suffixes`` are the tensors that
    a matrix has beside a bias.
    """

    suffixes: tuple[str, ...] = ("weight",)
    extra: tuple[str, ...] = ()
    """Endings of other tensors that the format knows and reads itself, or that say nothing."""
    scheme: Scheme | None = None

    def __init__(self, path: Path, raw: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
        self.path = path
        self.raw = raw
        self.config = family.read_config(raw, str(path / "config.json"))
        self.store = Checkpoint(path, self.config, dict(tensors), None)
        self.tensors = self.store.tensors
        self.linears = {family.linear_name(layer, linear) for layer, linear in family.layer_linears(self.config)}

    @property
    def nbytes(self) -> int:
        return self.store.nbytes

    def side_files(self) -> dict[str, bytes]:
        """The tokenizer's files and the generation configuration, by name."""
        return {file.name: file.read_bytes() for file in self.store.side_files}

    @property
    def fingerprint(self) -> str:
        return self.store.fingerprint

    @property
    def document(self) -> dict[str, Any]:
        """The model's ``config.json`` without what it says of its quantization."""
        return {key: value for key, value in self.raw.items() if key != "quantization_config"}

    def units(self) -> list[Unit]:
        """What is to be written, in order."""
        if self.scheme is not None:
            return layout.units(self.config, self.dtype_of, self.scheme)
        return plain_units(family.expected_tensors(self.config), self.dtype_of)

    def dtype_of(self, name: str) -> str:
        """The safetensors dtype that a tensor that is copied will have; for a matrix, that of the unquantized model."""
        info = self.tensors.get(name)
        if info is not None and info.dtype in FLOATS:
            return info.dtype
        return {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}[self.config.dtype]

    def check(self, advance: Callable[[int], None]) -> None:
        """Look at every number that could make the import wrong, before anything is written.

        ``advance`` gets bytes, in all at most ``nbytes``. Raises PlanError or ArtifactError.
        """

    def read(self, plan: TensorPlan) -> Iterator[Bytes]:
        """One tensor of the layout, in pieces of flat uint8."""
        module, _, suffix = plan.name.rpartition(".")
        if self.scheme is not None and module in self.linears and suffix != "bias":
            yield np.ascontiguousarray(self.linear(module, suffix)).reshape(-1).view(np.uint8)
            for name in self.suffixes:
                if f"{module}.{name}" in self.tensors:
                    self.store.release(f"{module}.{name}")
        else:
            yield from self.pieces(plan)

    def linear(self, module: str, suffix: str) -> Array:
        """``weight``, ``weight_scale`` or another tensor that the layout has for a matrix, with its shape and dtype."""
        raise NotImplementedError

    def array(self, name: str, dtypes: Sequence[str] = (), shape: tuple[int, ...] | None = None) -> Array:
        """A tensor as a read-only view; BF16 as uint16, e4m3 as uint8. ArtifactError unless it is of that kind."""
        info = self.tensors.get(name)
        if info is None:
            raise ArtifactError(f"{self.path}: {name} is missing", hint=DAMAGED)
        if (dtypes and info.dtype not in dtypes) or (shape is not None and info.shape != shape):
            wanted = f"{' or '.join(dtypes)} {list(shape) if shape is not None else ''}".strip()
            raise ArtifactError(
                f"{info.file}: {name} is {info.dtype} {list(info.shape)}, where this format has {wanted}",
                hint="Is this config.json the one that was published with the weights?",
            )
        return self.store.bytes_of(name).view(_NUMPY[info.dtype]).reshape(info.shape)

    def wide(self, name: str, shape: tuple[int, ...] | None = None) -> npt.NDArray[np.float32]:
        """A 16- or 32-bit float tensor as float32, which holds it exactly. ArtifactError for NaN and infinity."""
        array = self.array(name, FLOATS, shape)
        found = widen(array, self.tensors[name].dtype)
        if not np.isfinite(found).all():
            raise self.not_finite(name)
        return found

    def pieces(self, plan: TensorPlan) -> Iterator[Bytes]:
        """A tensor that is copied, in pieces of bounded size. ArtifactError for NaN and infinity."""
        self.array(plan.name, (plan.dtype,), plan.shape)
        whole = self.store.bytes_of(plan.name)
        for start in range(0, whole.nbytes, _PIECE_BYTES):
            piece = whole[start : start + _PIECE_BYTES].copy()
            if not all_finite(piece, plan.dtype):
                raise self.not_finite(plan.name)
            yield piece
        self.store.release(plan.name)

    def not_finite(self, name: str) -> ArtifactError:
        return ArtifactError(f"{self.tensors[name].file}: {name} holds NaN or infinity", hint=DAMAGED)

    def check_names(self) -> None:
        """Every tensor must be one that the format or a Llama has; zero biases, which some tools write, are left out.

        What is copied must be there. Raises PlanError that names the first others, ArtifactError for what is missing.
        """
        shapes = family.expected_tensors(self.config)
        for name, shape in shapes.items():
            if self.scheme is None or name.removesuffix(".weight") not in self.linears:
                self.array(name, FLOATS, shape)
        known = set(shapes) | {"lm_head.weight"}
        known |= {f"{module}.{suffix}" for module in self.linears for suffix in self.suffixes}
        other = sorted(set(self.tensors) - known)
        strange = [
            name for name in other if not name.endswith((*_IGNORED, *self.extra)) and not self._is_zero_bias(name)
        ]
        if strange:
            raise PlanError(
                f"{self.path}: holds tensors that scalellm does not know in such a folder, so it would be computed "
                f"wrongly: {', '.join(strange[:4])}{' ...' * (len(strange) > 4)}",
                hint=START_ANEW,
            )

    def _is_zero_bias(self, name: str) -> bool:
        module, _, suffix = name.rpartition(".")
        return suffix == "bias" and module in self.linears and not self.store.bytes_of(name).any()


def widen(array: Array, dtype: str) -> npt.NDArray[np.float32]:
    """A float tensor as ``Folder.array`` gives it -> float32, exactly."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def all_finite(data: Bytes, dtype: str) -> bool:
    """Whether flat bytes of a 16- or 32-bit float tensor hold neither NaN nor infinity."""
    if dtype == "F32":
        return bool(np.isfinite(data.view("<f4")).all())
    mask = np.uint16(_EXPONENT[dtype])
    return not bool(((data.view("<u2") & mask) == mask).any())


def plain_units(shapes: Mapping[str, tuple[int, ...]], dtype_of: Callable[[str], str]) -> list[Unit]:
    """Name -> shape of an unquantized model, as ``family.expected_tensors`` has it -> what is written, by layer."""
    found: dict[str, list[TensorPlan]] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        inside = parts[:2] == ["model", "layers"]
        unit = layout.layer_name(int(parts[2])) if inside else layout.EMBEDDINGS if not found else layout.HEAD
        found.setdefault(unit, []).append(TensorPlan(name, dtype_of(name), shape))
    return [Unit(unit, tuple(tensors)) for unit, tensors in found.items()]
