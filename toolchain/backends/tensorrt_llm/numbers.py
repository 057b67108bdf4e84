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


def restored(codes: npt.NDArray[np.int8], scales: Floats, dtype: str) -> Floats:
    """int8 codes [rows, columns] and scales [rows] -> numbers of which, in F16 or BF16, ``trtllm-build`` makes the same
    codes again.

    It takes each row's amax / 128 for the scale, rounds to nearest and clips to -128..127 (``symmetric_quantize``,
    cpp/tensorrt_llm/kernels/cutlass_kernels/cutlass_preprocessors.cpp, read 2026-11). So one code of 127 in each row is
    stored as 128 scales: the scale is found again, and every code, that one by clipping. In a row whose largest are all
    -127 one becomes -128. A row with neither, a rank's part of a matrix that is cut along its inputs, is stored as it
    is: its codes are rounded anew, on a finer grid.

    The scales are rounded to ``dtype``, in which the engine has them anyway: then a product is off by 127/256 of a step
    at most in bfloat16, which rounds back, and not by two errors of that size.
    """
    scales = floats(narrow(128 * scales, dtype), dtype) / 128
    numbers: Floats = codes * scales[:, None]
    rows = np.arange(len(codes))
    largest, least = (codes == 127).argmax(axis=1), (codes == -127).argmax(axis=1)
    has_largest = codes[rows, largest] == 127
    has_least = ~has_largest & (codes[rows, least] == -127) & (codes.min(axis=1) > -128)
    numbers[rows[has_largest], largest[has_largest]] = 128 * scales[has_largest]
    numbers[rows[has_least], least[has_least]] = -128 * scales[has_least]
    return numbers


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
