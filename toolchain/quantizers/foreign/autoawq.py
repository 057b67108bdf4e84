"""AutoAWQ (``quant_method: awq``, version ``gemm``): int4 in groups, with zero points.

A linear layer has qweight int32 [in, out/8], qzeros int32 [in/g, out/8] and scales float16 [in/g, out]; the eight
nibbles of a word, from the lowest, are the outputs 0, 2, 4, 6, 1, 3, 5, 7 of its eight. AWQ's own scales are folded
into the norms and matrices before, so the weights act on the activations as they come and no pre_quant_scale is left.

Source: https://github.com/casper-hansen/AutoAWQ awq/modules/linear/gemm.py, awq/utils/packing_utils.py (2025-05).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from toolchain.checkpoint import TensorInfo
from toolchain.errors import PlanError
from toolchain.quantizers.foreign.folder import START_ANEW
from toolchain.quantizers.foreign.grouped import Codes, GroupedFolder, nibbles_of

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
NAME, PRODUCER = "autoawq", "AutoAWQ"


def facts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``quantization_config``, or the older ``quant_config.json`` -> what can be said of the folder."""
    bits, group = _bits(settings), _group(settings)
    zero_points = bool(settings.get("zero_point", True))
    spoken = "one scale per row" if group == -1 else f"groups of {group}"
    return {
        "format": NAME,
        "producer": PRODUCER,
        "title": f"AutoAWQ int{bits}, {spoken}{', with zero points' * zero_points}",
        "weights": "int4" if bits == 4 else None,
        "group_size": group if group > 0 else None,
        "zero_points": zero_points,
    }


def _bits(settings: Mapping[str, Any]) -> int:
    return int(settings.get("bits") or settings.get("w_bit") or 4)


def _group(settings: Mapping[str, Any]) -> int:
    return int(settings.get("group_size") or settings.get("q_group_size") or 128)


class AutoAwq(GroupedFolder):
    """One such folder, its headers checked."""

    suffixes = ("qweight", "qzeros", "scales")

    def __init__(
        self,
        path: Path,
        raw: Mapping[str, Any],
        tensors: Mapping[str, TensorInfo],
        settings: Mapping[str, Any],
    ) -> None:
        version = str(settings.get("version", "gemm")).lower()
        if version != "gemm":
            raise PlanError(
                f"{path}: AutoAWQ's version {version!r} is packed in another order than 'gemm', and is not read",
                hint=START_ANEW,
            )
        if _bits(settings) != 4:
            raise PlanError(f"{path}: AutoAWQ with {_bits(settings)} bits; only 4 are read", hint=START_ANEW)
        super().__init__(path, raw, tensors, bits=4, group=_group(settings))
        self.check_names()
        for module in sorted(self.linears):
            rows, columns = self.shape(module)
            count = self.groups(module)[0]
            self.array(f"{module}.qweight", ("I32",), (columns, rows // 8))
            self.array(f"{module}.scales", ("F16", "BF16", "F32"), (count, rows))
            if f"{module}.qzeros" in self.tensors or settings.get("zero_point", True):
                self.array(f"{module}.qzeros", ("I32",), (count, rows // 8))

    def codes(self, module: str, columns: slice) -> Codes:
        words = self.array(f"{module}.qweight")[columns]
        return nibbles_of(words, ORDER).reshape(len(words), -1)

    def zeros(self, module: str) -> Codes:
        if f"{module}.qzeros" not in self.tensors:
            rows = self.shape(module)[0]
            return np.full((self.groups(module)[0], rows), self.middle, np.uint8)
        words = self.array(f"{module}.qzeros")
        return nibbles_of(words, ORDER).reshape(len(words), -1)

    def scales(self, module: str) -> npt.NDArray[np.float32]:
        return self.wide(f"{module}.scales")
