"""What a TensorRT-LLM release's loader must know to read a checkpoint, and what it makes of int8 weights. Pure.

The other side, which release reads what, is the section ``loader`` of ``facts/releases.yaml``; ``decisions`` joins the
two. It knows no release and reads no weights.
"""

from __future__ import annotations

from toolchain.family import LlamaConfig, RopeScaling
from toolchain.memory import linear_parameters
from toolchain.quantization import WeightScheme
from toolchain.units import format_bytes

_LLAMA_3_1 = (8.0, 1.0, 4.0, 8192)
"""factor, low_freq_factor, high_freq_factor, original_max_position_embeddings of Llama 3.1 (its config.json)."""


def features(config: LlamaConfig, weights: WeightScheme, dtype: str) -> frozenset[str]:
    """What is particular to this model in a TensorRT-LLM checkpoint, in the words of the section ``loader``.

    ``dtype``: the engine's.
    """
    qwen2 = config.architecture == "Qwen2ForCausalLM"
    scaling = config.rope_scaling
    has = {
        "qwen2": qwen2,
        "qwen2-tied": qwen2 and config.tied_embeddings,
        "rope-llama3": scaling is not None and scaling.kind == "llama3",
        "rope-llama3-numbers": scaling is not None and scaling.kind == "llama3" and _numbers(scaling) != _LLAMA_3_1,
        "head-size": config.head_dim * config.num_heads != config.hidden_size,
        "w4a8-bfloat16": weights.name == "int4_fp8" and dtype == "bfloat16",
    }
    return frozenset(name for name, there in has.items() if there)


def _numbers(scaling: RopeScaling) -> tuple[float, float, float, int]:
    factors = (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor)
    return (*factors, scaling.original_max_position_embeddings)


def rounds_again(config: LlamaConfig, ranks: int) -> str:
    """What ``trtllm-build`` does with int8 weights, for the plan; ``ranks``: tp x pp."""
    held = 2 * linear_parameters(config) // ranks
    return (
        "trtllm-build rounds int8 weights once more, each row by its amax/128, since no release reads rows of int8 "
        "as we have them: errors of up to half a step more than what is measured on the checkpoint. It holds "
        f"{format_bytes(held)} of 16-bit matrices for each rank while it does"
    )


ROUNDS_AGAIN_SOURCE = (
    "TensorRT-LLM models/convert_utils.py weight_only_quantize_dict @03961722, @9b3c7124 and "
    "models/modeling_utils.py preprocess_weights @01ea6d79"
)
"""Weights that are int8 already are taken for permuted ones, whose ``per_channel_scale`` is in the file, too."""
