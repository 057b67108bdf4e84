"""Stored numbers as float32 and back, in numpy alone: float16, bfloat16, float8 e4m3, and int4 in pairs."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from toolchain.safetensors_file import Bytes

Floats = npt.NDArray[np.float32]

ONES = {"F16": 0x3C00, "BF16": 0x3F80}
"""The bits of 1.0, by safetensors dtype."""

LARGEST = {"F16": 65504.0, "BF16": float.fromhex("0x1.fep127")}
"""The largest number of a dtype (IEEE 754 binary16; bfloat16 is the upper half of binary32)."""


def floats(data: Bytes, dtype: str) -> Floats:
    """Flat bytes of F32, F16, BF16, F8_E4M3 or I8 -> the same numbers, flat. NaN stays NaN."""
    if dtype == "BF16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype == "F8_E4M3":
        return _e4m3_numbers()[data]
    kind = {"F32": "<f4", "F16": "<f2", "I8": "i1"}[dtype]
    return data.view(kind).astype(np.float32)


def narrow(numbers: Floats, dtype: str) -> Bytes:
    """float32, finite -> the bytes of F16 or BF16, rounded to nearest, ties to even; flat."""
    flat = np.ascontiguousarray(numbers).reshape(-1)
    if dtype == "F16":
        return flat.astype("<f2").view(np.uint8)
    bits = flat.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").view(np.uint8)


def unpack_int4(packed: Bytes) -> npt.NDArray[np.int8]:
    """[out/2, in] -> [out, in] of -8..7: row 2r from the low nibbles of row r, row 2r + 1 from the high ones."""
    codes = np.empty((2 * packed.shape[0], packed.shape[1]), np.int8)
    signed = packed.view(np.int8)
    codes[0::2], codes[1::2] = np.left_shift(signed, 4) >> 4, signed >> 4
    return codes


@functools.cache
def _e4m3_numbers() -> Floats:
    """The 256 numbers of float8 e4m3: sign, 4 bits of exponent (bias 7), 3 of mantissa, no infinities, two NaN.

    OCP 8-bit Floating Point Specification 1.0, June 2023.
    """
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    size = np.where(exponent > 0, np.ldexp(8 + mantissa, exponent - 10), np.ldexp(mantissa, -9))
    size[(codes & 127) == 127] = np.nan
    return np.where(codes < 128, size, -size).astype(np.float32)
