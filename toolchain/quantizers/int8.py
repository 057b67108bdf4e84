"""Symmetric int8 with one scale per output channel, plain or after the input channels were scaled (SmoothQuant).

scale = row amax / 127, code = round_half_even(W / scale), -127..127; W ~= code * scale. Without channel scales these
are the bits of NVIDIA ModelOpt 0.47.0's INT8_WEIGHT_ONLY_CFG. It knows no activation and no layer.

Layout: modelopt/torch/export/quant_utils.py, https://github.com/NVIDIA/TensorRT-Model-Optimizer (0.47.0, 2026-11).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from toolchain.quantizers import NotFiniteError, WeightError, total
from toolchain.quantizers.int4 import measured
from toolchain.quantizers.rows import Scratch, Workers

LARGEST = 127.0
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Int8Matrix:
    """W[out, in] * by[in] ~= code[out, in] * scale[out]."""

    code: torch.Tensor
    """int8 [out, in], within -127..127."""
    scale: torch.Tensor
    """float32 [out]; 1 for a row that is all zero."""
    error: WeightError
    """Of what is stored for W itself, ``code * scale / by``."""


def quantize(weight: torch.Tensor, workers: Workers, by: torch.Tensor | None = None) -> Int8Matrix:
    """[out, in] of any float dtype; ``by`` float32 [in], positive, multiplies the input channels first -> Int8Matrix.

    Computed in float32; the result does not depend on the number of workers. Raises NotFiniteError for NaN or infinity.
    """
    code = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    undo = None if by is None else by.reciprocal()

    def block(part: slice, scratch: Scratch) -> WeightError:
        source = weight[part]
        x = scratch("x", source, torch.float32).copy_(source)
        if by is not None:
            x.mul_(by)
        step = _steps(x)
        scale[part] = step[:, 0]
        exact = torch.div(x, step, out=scratch("t", x, torch.float32))
        rounded = torch.round(exact, out=scratch("code", x, torch.float32))  # |exact| is at most 127, so no clamp
        code[part] = rounded
        return measured(rounded.sub_(exact), step, source, undo, x)

    return Int8Matrix(code, scale, total(workers.over_rows(weight, block)))


def _steps(x: torch.Tensor) -> torch.Tensor:
    """float32 [rows, in] -> row scales [rows, 1]. Raises NotFiniteError."""
    largest = torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_())
    if not torch.isfinite(largest.max()):
        raise NotFiniteError
    step = largest.div_(LARGEST)
    return step.masked_fill_(step < _TINY, 1.0)


def scale_of(amax: float) -> torch.Tensor:
    """max |x| of an input -> its scale, float32 []: amax / 127, and 1 where that is zero."""
    scale = torch.tensor(amax, dtype=torch.float32) / LARGEST
    return scale if scale >= _TINY else torch.tensor(1.0)


def dequantize(code: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """int8 [out, in], float32 [out] -> float32 [out, in]."""
    return code.float() * scale[:, None]
