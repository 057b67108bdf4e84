"""How weights become int4, int8 or fp8, one matrix at a time, in memory that one matrix bounds.

``int4``, ``int8``, ``fp8``, ``awq``, ``gptq`` and ``smoothquant`` hold the arithmetic; ``forward``, ``statistics``
and ``calibration`` tell them of the activations on the text of ``samples``; ``rows`` holds the threads, ``layout`` the
names and documents of the unified Hugging Face layout, ``shards`` the files, and ``convert`` ties them together. None
of them knows a recipe, a device from the fact tables, or a stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SCALES = ("modelopt", "mse")
"""How int4 scales are chosen: amax/7 as NVIDIA ModelOpt does, or searched for the least squared error."""

METHODS = ("rtn", "awq", "gptq")
"""How int4 weights are rounded: to the nearest, after scaling input channels, or making up for each rounding error."""


class NotFiniteError(ValueError):
    """The weights hold NaN or an infinity; the caller knows the tensor's name and file."""


@dataclass(frozen=True)
class WeightError:
    """How far a quantized matrix is from the original."""

    squared_error: float
    """Sum over all elements of (dequantized - original)^2."""
    squared_norm: float
    """Sum over all elements of original^2."""

    @property
    def relative(self) -> float:
        """The relative Frobenius error ||dequantized - original|| / ||original||; 0 for an all-zero matrix."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0


def total(parts: list[WeightError]) -> WeightError:
    """The error of a matrix from those of its row blocks."""
    return WeightError(math.fsum(part.squared_error for part in parts), math.fsum(part.squared_norm for part in parts))
