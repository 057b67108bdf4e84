"""``config.json`` of a TensorRT-LLM checkpoint: the keys that every release from 0.12 to 1.2 reads, and no others.

Source: ``PretrainedConfig`` and ``QuantConfig`` (tensorrt_llm/models/modeling_utils.py), ``LLaMAConfig`` and
``QWenConfig`` (models/llama/config.py, models/qwen/config.py) of NVIDIA/TensorRT-LLM, read 2026-11. A key that
``PretrainedConfig`` does not know is a warning there, one that ``QuantConfig`` does not know is an error.
"""

from __future__ import annotations

from typing import Any

import toolchain
from toolchain.backends.tensorrt_llm.export import Export
from toolchain.family import LlamaConfig, RopeScaling

_QWEN_SEQ_LENGTH = 8192
"""``seq_length`` that TensorRT-LLM takes for a Qwen2 without one; only log-n attention would use it."""


def config_document(export: Export) -> dict[str, Any]:
    """The whole document. ``logits_dtype`` is the format's default, float32; ModelOpt writes float16 there."""
    config, split = export.checkpoint.config, export.split
    return {
        "producer": {"name": "scalellm", "version": toolchain.__version__},
        "architecture": config.architecture,
        "dtype": export.dtype_name,
        "logits_dtype": "float32",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_size": config.head_dim,
        "hidden_act": "silu",
        "norm_epsilon": config.rms_norm_eps,
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": config.max_position_embeddings,
        "rotary_base": config.rope_theta,
        "rotary_scaling": _rotary_scaling(config.rope_scaling),
        "attn_bias": bool(config.biased),
        "mlp_bias": False,
        "disable_weight_only_quant_plugin": False,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        **_of_architecture(config),
        "mapping": {"world_size": split.world_size, "tp_size": split.tp, "pp_size": split.pp},
        "quantization": _quantization(export),
    }


def _of_architecture(config: LlamaConfig) -> dict[str, Any]:
    if config.architecture == "Qwen2ForCausalLM":
        return {"qwen_type": "qwen2", "use_logn_attn": False, "seq_length": _QWEN_SEQ_LENGTH}
    return {"residual_mlp": False}


def _rotary_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """With the kind under both names: releases differ in which they read first, and all know one of the two."""
    if scaling is None:
        return None
    found: dict[str, Any] = {"type": scaling.kind, "rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        found |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    return found


def _quantization(export: Export) -> dict[str, Any]:
    """Two keys, and three more where weights have groups. Modules that stay as they are are TensorRT-LLM's default."""
    found: dict[str, Any] = {
        "quant_algo": export.algo,
        "kv_cache_quant_algo": {"int8": "INT8", "fp8": "FP8"}.get(export.kv),
    }
    if export.scheme.group_sizes:
        scales = export.pre_quant_scales
        found |= {"group_size": export.group_size, "has_zero_point": False, "pre_quant_scale": scales}
    return found
