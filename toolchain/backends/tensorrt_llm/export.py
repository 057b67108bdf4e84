"""What is exported, and the choices made for it: the checkpoint, its split over ranks, the KV cache, one form of int8.

Everything that depends on how the weights are quantized and that is one number for a matrix or a layer is read here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from toolchain.backends.tensorrt_llm.split import Split
from toolchain.checkpoint import Checkpoint
from toolchain.quantization import WEIGHTS, WeightScheme, weights_of

RESTORED, CODES = "restored", "codes"
INT8_FORMS = (RESTORED, CODES)

DTYPES = {"float16": "F16", "bfloat16": "BF16"}
DTYPE_NAMES = {short: name for name, short in DTYPES.items()}

_LARGEST_INT8, _LARGEST_E4M3 = np.float32(127), np.float32(448)


@dataclass(frozen=True)
class Export:
    """A checkpoint on its way out. Nothing in it is checked: see ``checks``."""

    checkpoint: Checkpoint
    split: Split
    kv: str = "fp16"
    """A key of ``quantization.KV`` that TensorRT-LLM has: ``"fp16"`` (the model's dtype), ``"int8"`` or ``"fp8"``."""
    int8_form: str = RESTORED
    """How weight-only int8 is stored, since TensorRT-LLM has no file format for it that holds on every GPU.

    ``"restored"``: as 16-bit numbers, code times scale, of which ``trtllm-build`` makes int8 again
    (models/convert_utils.py ``weight_only_quantize_dict``): the same codes, see ``numbers.restored``. ``"codes"``: int8
    and a scale for each row, as ModelOpt 0.47.0 exports W8A16; the loader that we read takes int8 weights for permuted
    ones and misses ``per_channel_scale``.
    """
    asked_dtype: str | None = None
    """What the engine computes in, a key of ``DTYPES``; None: the model's own."""

    @property
    def algo(self) -> str | None:
        """``quant_algo``, or None for weights of 16 bits."""
        return self.checkpoint.quantization.quant_algo if self.checkpoint.quantization else None

    @property
    def scheme(self) -> WeightScheme:
        return weights_of(self.algo) or WEIGHTS["none"]

    @property
    def group_size(self) -> int:
        quantization = self.checkpoint.quantization
        return (quantization.group_size if quantization else None) or 128

    @property
    def dtype_name(self) -> str:
        """The engine's dtype, of embeddings, norms, heads, biases, prequant factors and weights of 16 bits."""
        return self.asked_dtype or self.checkpoint.config.dtype

    @property
    def dtype(self) -> str:
        """The same as safetensors calls it; empty where TensorRT-LLM gets none from us."""
        return DTYPES.get(self.dtype_name, "")

    @property
    def restores_int8(self) -> bool:
        return self.algo == "W8A16" and self.int8_form == RESTORED

    @cached_property
    def pre_quant_scales(self) -> bool:
        """Whether every matrix gets a ``prequant_scaling_factor``: TensorRT-LLM wants it of all or of none.

        W4A8 always has them, because the loader divides them by the scale of the inputs.
        """
        stored = any(name.endswith(".pre_quant_scale") for name in self.checkpoint.tensors)
        return stored or self.algo == "W4A8_AWQ"

    def scalar(self, names: Iterable[str]) -> np.float32:
        """The largest of some float32 scalars."""
        return max(self.checkpoint.bytes_of(name).view("<f4")[0] for name in names)

    def kv_scale(self, layer: int) -> np.float32 | None:
        """The one factor that K and V of a layer are dequantized by, the larger of the two; None for a plain cache.

        INT8: amax / 127 of K and V, as ModelOpt has it; NVIDIA's own converter (models/llama/convert.py) takes the
        range of Q in, too, though no cache holds it. FP8: amax / 448, as the checkpoint has it, but never less than
        1.0: so does ModelOpt's export for TensorRT-LLM, and releases up to 0.13 use 1.0 whatever is stored.
        """
        if self.kv == "int8":
            ranges = self.checkpoint.kv_ranges
            assert ranges is not None
            return np.float32(max(ranges[layer])) / _LARGEST_INT8
        if self.kv != "fp8":
            return None
        names = [name for name in kv_scale_names(layer) if name in self.checkpoint.tensors]
        ranges = self.checkpoint.kv_ranges
        found = self.scalar(names) if names or ranges is None else np.float32(max(ranges[layer])) / _LARGEST_E4M3
        return max(np.float32(1), found)


def kv_scale_names(layer: int) -> tuple[str, str]:
    """The FP8 cache's scales of a layer in the unified layout."""
    prefix = f"model.layers.{layer}.self_attn"
    return f"{prefix}.k_proj.k_scale", f"{prefix}.v_proj.v_scale"
