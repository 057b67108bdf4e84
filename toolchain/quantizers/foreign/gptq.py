"""AutoGPTQ and GPTQModel (``quant_method: gptq``): int4 or int8 in groups, symmetric or with zero points.

A linear layer has qweight int32 [in * bits / 32, out] (the codes of a word are input channels, from the lowest bits),
qzeros int32 [in/g, out * bits / 32], scales [in/g, out] and g_idx int32 [in], the group of each input channel. The
checkpoint format "gptq" stores zero points minus one, "gptq_v2" as they are. A g_idx that is not in order (desc_act)
would need a permuted activation, which our layout does not have.

Source: https://github.com/AutoGPTQ/AutoGPTQ auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py (2024-06) and
https://github.com/ModelCloud/GPTQModel gptqmodel/utils/model.py, convert_gptq_v1_to_v2_format (2025-12).
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
from toolchain.quantizers.foreign.grouped import Codes, GroupedFolder

NAME = "gptq"
_FORMATS = {"gptq": 1, "gptq_v2": 0}
"""Checkpoint format -> what its zero points lack."""


def facts(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``quantization_config``, or the older ``quantize_config.json`` -> what can be said of the folder."""
    bits, group = int(settings.get("bits", 4)), _group(settings)
    spoken = "one scale per row" if group == -1 else f"groups of {group}"
    asymmetric = settings.get("sym") is False
    quantizer = (settings.get("meta") or {}).get("quantizer") or ["AutoGPTQ or GPTQModel"]
    return {
        "format": NAME,
        "producer": str(quantizer[0] if isinstance(quantizer, list) and quantizer else quantizer),
        "title": f"GPTQ int{bits}, {spoken}{', with zero points' * asymmetric}"
        + ", calibrated in order of activation size" * bool(settings.get("desc_act")),
        "weights": {4: "int4", 8: "int8"}.get(bits),
        "group_size": group if group > 0 and bits == 4 else None,
        "zero_points": asymmetric,
        "act_order": bool(settings.get("desc_act")),
    }


def _group(settings: Mapping[str, Any]) -> int:
    return int(settings.get("group_size") or -1)


def _format(settings: Mapping[str, Any]) -> str:
    if settings.get("is_marlin_format"):
        return "marlin"
    return str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()


def _refuse(path: Path, settings: Mapping[str, Any]) -> None:
    bits, kind = int(settings.get("bits", 4)), _format(settings)
    reason = ""
    if bits not in (4, 8):
        reason = f"its weights have {bits} bits; 4 and 8 are read"
    elif kind not in _FORMATS:
        reason = f"its checkpoint format is {kind!r}; read are {', '.join(_FORMATS)}"
    elif settings.get("dynamic"):
        reason = "its layers are quantized in different ways (key dynamic)"
    elif settings.get("lm_head"):
        reason = "its lm_head is quantized too, which our layout keeps in 16 bits"
    elif settings.get("pack_dtype", "int32") not in ("int32", "torch.int32", None):
        reason = f"its codes are packed in {settings['pack_dtype']}, not in int32"
    if reason:
        raise PlanError(f"{path}: GPTQ, but {reason}", hint=START_ANEW)


class Gptq(GroupedFolder):
    """One such folder, its headers checked."""

    suffixes = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(
        self,
        path: Path,
        raw: Mapping[str, Any],
        tensors: Mapping[str, TensorInfo],
        settings: Mapping[str, Any],
    ) -> None:
        _refuse(path, settings)
        super().__init__(path, raw, tensors, bits=int(settings.get("bits", 4)), group=_group(settings))
        self._lacking = _FORMATS[_format(settings)]
        self._in_word = 32 // self.bits
        self.check_names()
        for module in sorted(self.linears):
            rows, columns = self.shape(module)
            count, size = self.groups(module)
            self.array(f"{module}.qweight", ("I32",), (columns // self._in_word, rows))
            self.array(f"{module}.qzeros", ("I32",), (count, rows // self._in_word))
            self.array(f"{module}.scales", ("F16", "BF16", "F32"), (count, rows))
            self.check_order(f"{module}.g_idx", ("I32",), columns, size, " (desc_act)")

    def codes(self, module: str, columns: slice) -> Codes:
        words = self.array(f"{module}.qweight")[columns.start // self._in_word : columns.stop // self._in_word]
        return self.unpack(words).transpose(0, 2, 1).reshape(-1, words.shape[1])

    def zeros(self, module: str) -> Codes:
        words = self.array(f"{module}.qzeros")
        stored = self.unpack(words).reshape(len(words), -1)
        top = (1 << self.bits) - 1
        if self._lacking and (stored == top).any():
            raise PlanError(
                f"{self.path}: {module}.qzeros holds zero points stored as {top}: written as -1 or as {top}, which "
                "readers of this format take for different numbers",
                hint=START_ANEW,
            )
        return stored + np.uint8(self._lacking)

    def scales(self, module: str) -> npt.NDArray[np.float32]:
        return self.wide(f"{module}.scales")
