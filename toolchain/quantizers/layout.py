"""The unified Hugging Face layout of quantized checkpoints, as NVIDIA ModelOpt writes it: names, shapes, documents.

Which tensors a quantized Llama has, in which order they are written, and what ``hf_quant_config.json`` and the
``quantization_config`` of ``config.json`` say. It does no arithmetic and touches no file.

Source: modelopt/torch/export/unified_export_hf.py and convert_hf_config.py,
https://github.com/NVIDIA/TensorRT-Model-Optimizer (2025-12; output of nvidia-modelopt 0.47.0 looked at, 2026-11).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import toolchain
from toolchain import family
from toolchain.family import LlamaConfig
from toolchain.quantization import KV, WEIGHTS
from toolchain.quantizers.shards import TensorPlan, Unit

EXCLUDED = ("lm_head", "model.embed_tokens")
"""What stays in the model's dtype besides the norms, as ModelOpt lists it."""

KV_SCALES = ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale")
"""Dequantization factors of an fp8 KV cache, float32 scalars. ModelOpt writes amax/448 but never less than 1.0 into a
TensorRT-LLM checkpoint, which makes it 1.0 for normal models; releases up to 0.13 use 1.0 whatever is stored."""

HF_QUANT_CONFIG = "hf_quant_config.json"


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint is quantized, in the words of the recipe."""

    weights: str
    """A key of ``quantization.WEIGHTS``."""
    group_size: int
    """int4 only."""
    scales: str
    """int4 only: ``"modelopt"`` or ``"mse"``."""
    kv: str
    """A key of ``quantization.KV``."""


def units(config: LlamaConfig, dtype_of: Callable[[str], str], scheme: Scheme) -> list[Unit]:
    """What a quantized checkpoint holds, in the order of writing: embeddings, each decoder layer, final norm and head.

    ``dtype_of`` gives the safetensors dtype of a tensor that is copied. A tied ``lm_head`` is left out.
    """
    shapes = family.expected_tensors(config)

    def copied(*names: str) -> tuple[TensorPlan, ...]:
        return tuple(TensorPlan(name, dtype_of(name), shapes[name]) for name in names if name in shapes)

    layers = [
        Unit(
            layer_name(layer),
            copied(*norm_names(layer))
            + tuple(tensor for linear in family.LINEARS for tensor in linear_tensors(config, layer, linear, scheme))
            + kv_tensors(layer, scheme.kv),
        )
        for layer in range(config.num_layers)
    ]
    return [
        Unit("embeddings", copied("model.embed_tokens.weight")),
        *layers,
        Unit("head", copied("model.norm.weight", "lm_head.weight")),
    ]


def layer_name(layer: int) -> str:
    return f"layer {layer}"


def layer_of(unit_name: str) -> int | None:
    """The inverse of ``layer_name``; None for the units before and behind the layers."""
    kind, _, number = unit_name.partition(" ")
    return int(number) if kind == "layer" else None


def copied_names(unit: Unit) -> list[str]:
    """The tensors of a unit that keep the model's dtype: the norms of a layer, everything of the other units."""
    layer = layer_of(unit.name)
    return [tensor.name for tensor in unit.tensors] if layer is None else norm_names(layer)


def norm_names(layer: int) -> list[str]:
    return [f"model.layers.{layer}.{norm}.weight" for norm in family.NORMS]


def linear_tensors(config: LlamaConfig, layer: int, linear: str, scheme: Scheme) -> tuple[TensorPlan, ...]:
    """int4: weight U8 [out/2, in], weight_scale F32 [out, in/group]. fp8: weight F8_E4M3 [out, in], scale F32 []."""
    rows, columns = family.linear_shape(config, linear)
    name = family.linear_name(layer, linear)
    if scheme.weights == "fp8":
        return (
            TensorPlan(f"{name}.weight", "F8_E4M3", (rows, columns)),
            TensorPlan(f"{name}.weight_scale", "F32", ()),
        )
    return (
        TensorPlan(f"{name}.weight", "U8", (rows // 2, columns)),
        TensorPlan(f"{name}.weight_scale", "F32", (rows, columns // scheme.group_size)),
    )


def kv_tensors(layer: int, kv: str) -> tuple[TensorPlan, ...]:
    """The scale tensors of a KV scheme. Only fp8 has any: ModelOpt's layout refuses INT8 caches."""
    if kv != "fp8":
        return ()
    return tuple(TensorPlan(f"model.layers.{layer}.{name}", "F32", ()) for name in KV_SCALES)


def kv_algo(kv: str) -> str | None:
    """What the layout can say of a KV scheme: ``"FP8"`` or None. An INT8 cache is configured behind this checkpoint."""
    return KV[kv].quant_algo if kv == "fp8" else None


def hf_quant_config(scheme: Scheme) -> dict[str, Any]:
    """The document ``hf_quant_config.json``, with ModelOpt's keys in ModelOpt's order."""
    weights = WEIGHTS[scheme.weights]
    quantization: dict[str, Any] = {"quant_algo": weights.quant_algo, "kv_cache_quant_algo": kv_algo(scheme.kv)}
    if weights.group_sizes:
        # W4A16_AWQ carries plain group-wise int4 as well: without smoothing there is no pre_quant_scale.
        quantization |= {"group_size": scheme.group_size, "has_zero_point": False, "pre_quant_scale": False}
    if weights.quant_algo:
        quantization["exclude_modules"] = list(EXCLUDED)
    producer = {"name": "scalellm", "version": toolchain.__version__}
    return {"producer": producer, "quantization": quantization}


def quantization_config(document: dict[str, Any]) -> dict[str, Any]:
    """``hf_quant_config.json`` -> the object ``quantization_config`` of ``config.json``."""
    quantization = document["quantization"]
    found: dict[str, Any] = {}
    if quantization["quant_algo"] == "FP8":
        number = {"num_bits": 8, "type": "float"}
        # ModelOpt says "dynamic": False for activations because it stores an input_scale, and we store none.
        groups = {"input_activations": {"dynamic": True, **number}, "weights": {"dynamic": False, **number}}
        found["config_groups"] = {"group_0": {**groups, "targets": ["Linear"]}}
    found["ignore"] = list(quantization.get("exclude_modules", ()))
    if quantization["quant_algo"]:
        found["quant_algo"] = quantization["quant_algo"]
    if quantization["kv_cache_quant_algo"] == "FP8":
        found["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return {**found, "producer": document["producer"], "quant_method": "modelopt"}
