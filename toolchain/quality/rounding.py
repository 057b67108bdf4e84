"""What TensorRT-LLM's kernels round while they compute: the input of a linear layer, and the cache of K and V.

Sources: e4m3 is that of the OCP OFP8 specification 1.0 (2023-12), to nearest even, saturating at 448. The cache has one
static factor a layer, for K and V together: tensorrt_llm/layers/attention.py and quantization/functional.py
(https://github.com/NVIDIA/TensorRT-LLM, 0.17, 2025-02). It knows no model and no file.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

LARGEST_E4M3 = 448.0
LARGEST_INT8 = 127.0

Rounding = Callable[[torch.Tensor], torch.Tensor]
"""A tensor of any shape -> the same shape and dtype, with what is left of it."""


def round_e4m3(x: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * e4m3(x / scale)."""
    held = (x / scale).clamp_(-LARGEST_E4M3, LARGEST_E4M3)
    return held.to(torch.float8_e4m3fn).to(x.dtype).mul_(scale)


def round_int8(x: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * clamp(round_half_even(x / scale), -128, 127)."""
    return (x / scale).round_().clamp_(-128, 127).mul_(scale)


def cache_scale(kv: str, amax: float) -> float:
    """The factor that K and V of a layer are dequantized by, from the larger of max |K| and max |V|.

    int8: amax / 127. fp8: amax / 448, and never less than 1.0. As NVIDIA ModelOpt exports them, and ``convert`` writes.
    """
    if kv == "fp8":
        return max(1.0, amax / LARGEST_E4M3)
    return amax / LARGEST_INT8 or 1.0


def cache_rounding(kv: str, scale: float) -> Rounding:
    """``kv``: ``"int8"`` or ``"fp8"``."""
    return partial({"int8": round_int8, "fp8": round_e4m3}[kv], scale=scale)
