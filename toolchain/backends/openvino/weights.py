"""A checkpoint's tensors as IR constants, a block of rows at a time.

int4 codes are moved from the layout's packing (two output rows in a byte) to IR's (two input columns in a byte) and
never requantized; int8 codes, scales and unquantized weights go through byte for byte. Scales of activations
(``input_scale``, and the ``weight_scale_2`` that goes with it) have no use here: activations keep 16 or 32 bits.

fp8 codes are written as the f16 numbers that they are (every e4m3 number is an f16 and a bf16 number, so nothing is
rounded and each code can be read back), and the matrix's scale multiplies the product. OpenVINO 2026.4.1 has no CPU
kernel for fp8 weights. Measured on an AVX512-BF16 machine with matrices of 35 million weights: a constant f8e4m3 ->
Convert -> Multiply is expanded at load, kept beside its repacked copy (4 bytes a weight in memory, 8 with f32
arithmetic) and, under bf16, rounded once more by the scale; f16 constants need 2 bytes a weight (4 with f32) and run at
the same speed, about a third of int4's when one token is decoded.

It knows nothing of the graph around a matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from toolchain.backends.openvino.ir import IrWriter, Port
from toolchain.checkpoint import Checkpoint, TensorInfo
from toolchain.errors import ArtifactError

_ELEMENT_TYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_BLOCK_BYTES = 2**20
"""One block and its temporaries fit a core's second-level cache."""
_GROUP_SIZE = 128
"""Of a checkpoint that states none, as ModelOpt's W4A16_AWQ has it."""
_AGAIN = "Copy it again, or quantize the model again."


@dataclass(frozen=True)
class Matrix:
    """A linear layer in the graph: ``weight`` f32 [out, in]; its product is multiplied by ``scale`` f32 [], if any."""

    weight: Port
    scale: Port | None = None


class Weights:
    """The tensors of one checkpoint, written into one IR. ``advance`` is told the bytes read."""

    def __init__(self, checkpoint: Checkpoint, ir: IrWriter, advance: Callable[[int], None]) -> None:
        self._checkpoint = checkpoint
        self._ir = ir
        self._advance = advance
        self._floats: dict[str, Port] = {}

    def has(self, name: str) -> bool:
        return name in self._checkpoint.tensors

    def floats(self, name: str) -> Port:
        """An unquantized tensor, in its own dtype on disk -> f32 in the graph. Asked for twice, it is stored once."""
        if name not in self._floats:
            info = self._checkpoint.tensors[name]
            if info.dtype not in _ELEMENT_TYPES:
                raise ArtifactError(f"{info.file}: {name} is {info.dtype}, not a 16- or 32-bit float", hint=_AGAIN)
            element_type = _ELEMENT_TYPES[info.dtype]
            self._floats[name] = self._ir.constant(element_type, info.shape, self._blocks(info), name=name)
        return self._ir.decompressed(self._floats[name])

    def linear(self, name: str) -> Matrix:
        """The matrix of the linear layer ``name``, however it is stored."""
        info = self._checkpoint.tensors[f"{name}.weight"]
        if info.dtype == "U8":
            return Matrix(self._int4(name, info))
        if info.dtype == "I8":
            return Matrix(self._int8(name, info))
        if info.dtype == "F8_E4M3":
            pieces = (decode_fp8(info, block) for block in self._blocks(info))
            values = self._ir.constant("f16", info.shape, pieces, name=info.name)
            return Matrix(self._ir.decompressed(values), self._scales(f"{name}.weight_scale", ()))
        return Matrix(self.floats(info.name))

    def _int4(self, name: str, info: TensorInfo) -> Port:
        """U8 [out/2, in] and F32 [out, in/group] -> i4 [out, groups, group] * f32 [out, groups, 1] -> [out, in]."""
        rows, columns = info.shape[0] * 2, info.shape[1]
        groups = self._checkpoint.tensors[f"{name}.weight_scale"].shape[1]
        self._check_groups(info, columns, groups)
        pieces = (repack_int4(block.reshape(-1, columns)) for block in self._blocks(info, columns))
        codes = self._ir.constant("i4", (rows, groups, columns // groups), pieces, name=info.name)
        numbers = self._ir.node("Convert", "opset1", (codes,), "f32", {"destination_type": "f32"})
        factors = (numbers, self._scales(f"{name}.weight_scale", (rows, groups, 1)))
        product = self._ir.node("Multiply", "opset1", factors, "f32", {"auto_broadcast": "numpy"})
        shape = self._ir.values("i64", [rows, columns])
        return self._ir.node("Reshape", "opset1", (product, shape), "f32", {"special_zero": False})

    def _int8(self, name: str, info: TensorInfo) -> Port:
        """I8 [out, in] and F32 [out] -> i8 [out, in] * f32 [out, 1]."""
        codes = self._ir.constant("i8", info.shape, self._blocks(info), name=info.name)
        numbers = self._ir.node("Convert", "opset1", (codes,), "f32", {"destination_type": "f32"})
        factors = (numbers, self._scales(f"{name}.weight_scale", (info.shape[0], 1)))
        return self._ir.node("Multiply", "opset1", factors, "f32", {"auto_broadcast": "numpy"})

    def _check_groups(self, info: TensorInfo, columns: int, groups: int) -> None:
        """A last group cut short would shift every scale after the first row."""
        quantization = self._checkpoint.quantization
        stated = (quantization.group_size if quantization else None) or _GROUP_SIZE
        if columns != groups * stated:
            raise ArtifactError(
                f"{info.file}: {info.name} has {columns} columns, not {groups} groups of {stated}", hint=_AGAIN
            )

    def _scales(self, name: str, shape: tuple[int, ...]) -> Port:
        """Scales as they are, once they are known to be finite numbers."""
        info = self._checkpoint.tensors[name]
        if not np.isfinite(self._checkpoint.bytes_of(name).view(np.float32)).all():
            raise ArtifactError(f"{info.file}: damaged: {name} holds numbers that are not finite", hint=_AGAIN)
        return self._ir.constant("f32", shape, self._blocks(info), name=name)

    def _blocks(self, info: TensorInfo, row_bytes: int = 1) -> Iterator[npt.NDArray[np.uint8]]:
        """The tensor's bytes in blocks of whole rows; its pages are given back at the end."""
        data = self._checkpoint.bytes_of(info.name)
        step = max(1, _BLOCK_BYTES // row_bytes) * row_bytes
        for start in range(0, len(data), step):
            block = data[start : start + step]
            yield block
            self._advance(len(block))
        self._checkpoint.release(info.name)


def repack_int4(block: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Nibbles along the output axis -> nibbles along the input axis: uint8 [n, in] -> uint8 [2 n, in / 2].

    Byte (r, c) of the input holds row 2r in its low nibble and row 2r + 1 in its high one; byte (r, j) of the output
    holds column 2j of row r in its low nibble and column 2j + 1 in its high one.
    """
    rows, columns = block.shape
    pairs = np.ascontiguousarray(block).view("<u2")
    packed = np.empty((rows, 2, columns // 2), np.uint8)
    shifted = pairs >> 4
    packed[:, 0] = (pairs & 0x0F) | (shifted & 0xF0)
    packed[:, 1] = (shifted & 0x0F) | ((pairs >> 8) & 0xF0)
    return packed.reshape(rows * 2, columns // 2)


def decode_fp8(info: TensorInfo, codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """e4m3 codes -> the same numbers in f16: uint8 [n] -> uint8 [2 n]. ArtifactError where a code is not a number."""
    if ((codes & 0x7F) == 0x7F).any():
        raise ArtifactError(f"{info.file}: damaged: {info.name} holds codes that are not numbers", hint=_AGAIN)
    return _e4m3_numbers()[codes].view(np.uint8)


@functools.cache
def _e4m3_numbers() -> npt.NDArray[np.float16]:
    """The 256 numbers of float8 e4m3: sign, 4 bits of exponent (bias 7), 3 of mantissa, no infinities.

    OCP 8-bit Floating Point Specification 1.0, June 2023. The two NaN codes are left as 480 and -480.
    """
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    size = np.where(exponent > 0, np.ldexp(8 + mantissa, exponent - 10), np.ldexp(mantissa, -9))
    return np.where(codes < 128, size, -size).astype("<f2")
