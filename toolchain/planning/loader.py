"""What a TensorRT-LLM release's loader must know to read a checkpoint, and what it makes of int8 weights. Pure.

Which shapes its kernels take is the same for all releases and is here. Which release reads what is the section
``loader`` of ``facts/releases.yaml``; ``decisions`` joins the two. It knows no release and reads no weights.
"""

from __future__ import annotations

from collections.abc import Iterator

from toolchain.family import LlamaConfig, RopeScaling
from toolchain.planning.memory import linear_parameters
from toolchain.quantization import WeightScheme
from toolchain.units import format_bytes

_LLAMA_3_1 = (8.0, 1.0, 4.0, 8192)
"""factor, low_freq_factor, high_freq_factor, original_max_position_embeddings of Llama 3.1 (its config.json)."""


_GROUP_SIZES = {"W4A16_AWQ": (64, 128), "W4A8_AWQ": (128,)}
"""What the group-wise GEMM has kernels for (quantization/functional.py, ``validate_group_size``, 0.14 and later)."""

_LEAST_MULTIPLE = {"W8A16": 64, "W4A16_AWQ": 64, "W4A8_AWQ": 128}
"""Both sides of a matrix are multiples of this on each rank, or of the group, or the layer is padded to that, which
weights from a checkpoint are not (quantization/layers.py, ``is_padded``, 0.13 and later; earlier releases fail)."""


def misfits(config: LlamaConfig, quant_algo: str | None, group_size: int, tp: int) -> Iterator[tuple[str, str]]:
    """(why, the next thing to type or nothing) of every shape that the builder would not take over ``tp`` ranks.

    That the heads divide by tp is not asked here. ``group_size``: of int4 weights, else of no meaning.
    """
    if config.intermediate_size % tp:
        yield f"intermediate_size {config.intermediate_size} does not divide by tp {tp}", ""
        return
    if quant_algo not in _LEAST_MULTIPLE:
        return
    sizes = _GROUP_SIZES.get(quant_algo, ())
    group = group_size if sizes else 1
    if sizes and group not in sizes:
        words = " or ".join(map(str, sizes))
        yield (
            f"its int4 groups are of {group}, and TensorRT-LLM has {quant_algo} for {words}",
            f"group_size: {sizes[-1]}",
        )
        return
    multiple = max(_LEAST_MULTIPLE[quant_algo], group)
    for module, cut in _cut(config, tp).items():
        # The other side is not cut, and yet TensorRT-LLM pads it to a multiple of tp times as much.
        if cut % multiple or config.hidden_size % (multiple * tp):
            yield (
                f"{module} is {cut} by {config.hidden_size} on each of {tp} ranks, and {quant_algo} needs multiples of "
                f"{multiple} and {multiple * tp}",
                "Choose a smaller tp, with pp for the rest, or another quantization.",
            )


def _cut(config: LlamaConfig, tp: int) -> dict[str, int]:
    """The features of a rank along the side that is cut: outputs of qkv, fc and gate, inputs of dense and proj."""
    heads, inner = config.q_size // tp, config.intermediate_size // tp
    kv_heads = max(1, config.num_kv_heads // tp) * config.head_dim
    qkv = heads + 2 * kv_heads
    return {"attention.qkv": qkv, "attention.dense": heads, "mlp.fc": inner, "mlp.gate": inner, "mlp.proj": inner}


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


def rounds_again(config: LlamaConfig, tp: int, pp: int) -> str:
    """What ``trtllm-build`` does with int8 weights, for the plan."""
    held = 2 * linear_parameters(config) // (tp * pp)
    cut = (
        "; with tp, parts of o_proj's and down_proj's rows that lack the largest code are rounded anew, by half a step "
        "(their own largest by one)"
    )
    return (
        "no release reads rows of int8 as we have them: they go out as 16-bit numbers, which trtllm-build rounds "
        "again, by amax/128. They are made so that it finds the same codes and scales, but for one code in rows whose "
        f"largest are all -127, which becomes -128{cut if tp > 1 else ''}. It holds {format_bytes(held)} of 16-bit "
        "matrices for each rank meanwhile"
    )


ROUNDS_AGAIN_SOURCE = (
    "TensorRT-LLM models/convert_utils.py weight_only_quantize_dict @03961722, @9b3c7124; models/modeling_utils.py "
    "preprocess_weights @01ea6d79; cutlass_preprocessors.cpp symmetric_quantize"
)
"""Weights that are int8 already are taken for permuted ones, whose ``per_channel_scale`` is in the file, too."""
