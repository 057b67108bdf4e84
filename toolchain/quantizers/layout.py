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
from toolchain.quantizers.shards import Unit
from toolchain.safetensors_file import TensorPlan

EXCLUDED = ("lm_head", "model.embed_tokens")
"""What stays in the model's dtype besides the norms, as ModelOpt lists it."""

KV_SCALES = ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale")
"""Dequantization factors of an fp8 KV cache, float32 scalars. ModelOpt writes amax/448 but never less than 1.0 into a
TensorRT-LLM checkpoint, which makes it 1.0 for normal models; releases up to 0.13 use 1.0 whatever is stored."""

EMBEDDINGS, HEAD = "embeddings", "head"
"""The units before and behind the decoder layers."""

UNFOLDED = ("self_attn.o_proj", "mlp.down_proj")
"""Linears that no norm comes before: what AWQ scales there is undone by a ``pre_quant_scale`` on the activation."""

_LARGEST_E4M3 = 448.0

HF_QUANT_CONFIG = "hf_quant_config.json"


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint is quantized, in the words of the recipe."""

    weights: str
    """A key of ``quantization.WEIGHTS``."""
    group_size: int
    """int4 and int4_fp8 only."""
    scales: str
    """int4 and int4_fp8 only: ``"modelopt"`` or ``"mse"``."""
    kv: str
    """A key of ``quantization.KV``."""
    method: str = "rtn"
    """int4 only: ``"rtn"``, ``"awq"`` or ``"gptq"``; the last two need calibration. int4_fp8 always goes by AWQ."""
    clip: bool = False
    """AWQ only: search for a narrower range of each group as well."""
    fp8_scales: str = "shared"
    """fp8 only: ``"shared"`` by the matrices that read one input, or ``"separate"`` as ModelOpt's unified export."""
    propagate: str = "clean"
    """What the next layer's statistics see: the output of the ``"clean"`` layer or of the ``"quantized"`` one."""
    calibrated: bool = False
    """Whether activations were observed: fp8 then has input scales, and the ranges of K and V are known."""
    compute: str = "auto"
    """How a float16 model is run for calibration: in bfloat16 with ``"auto"``, in its own dtype with ``"model"``."""

    smoothquant_alpha: float = 0.5
    """int8_sq only: the weight of the activations against the weights, 0..1."""

    @property
    def awq(self) -> bool:
        """Whether AWQ scales input channels: folded into the norms, or a ``pre_quant_scale`` where there is none."""
        return self.weights == "int4_fp8" or (self.weights == "int4" and self.method == "awq")

    @property
    def gptq(self) -> bool:
        return self.weights == "int4" and self.method == "gptq"

    @property
    def smoothed(self) -> bool:
        """Whether input channels are scaled at all, by AWQ or by SmoothQuant."""
        return self.awq or self.weights == "int8_sq"


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
            copied(*kept_names(config, layer))
            + tuple(
                tensor
                for linear in family.LINEARS
                for tensor in linear_tensors(
                    config, layer, linear, scheme, dtype_of(f"{family.linear_name(layer, linear)}.weight")
                )
            )
            + kv_tensors(layer, scheme.kv),
        )
        for layer in range(config.num_layers)
    ]
    return [
        Unit(EMBEDDINGS, copied("model.embed_tokens.weight")),
        *layers,
        Unit(HEAD, copied("model.norm.weight", "lm_head.weight")),
    ]


def layer_name(layer: int) -> str:
    return f"layer {layer}"


def layer_of(unit_name: str) -> int | None:
    """The inverse of ``layer_name``; None for the units before and behind the layers."""
    kind, _, number = unit_name.partition(" ")
    return int(number) if kind == "layer" else None


def copied_names(unit: Unit, config: LlamaConfig) -> list[str]:
    """The tensors of a unit that keep the model's dtype: norms and biases of a layer, everything of other units."""
    layer = layer_of(unit.name)
    return [tensor.name for tensor in unit.tensors] if layer is None else kept_names(config, layer)


def kept_names(config: LlamaConfig, layer: int) -> list[str]:
    return [f"model.layers.{layer}.{name}" for name in family.kept_tensors(config)]


def linear_tensors(config: LlamaConfig, layer: int, linear: str, scheme: Scheme, dtype: str) -> tuple[TensorPlan, ...]:
    """The tensors of one linear layer, in the order of writing; ``dtype`` is the model's.

    weight: F8_E4M3 [out, in] for fp8, I8 [out, in] for int8 and int8_sq, U8 [out/2, in] for int4 and int4_fp8.
    weight_scale: F32, [] for fp8, [out] for int8 and int8_sq, [out, in/group] for int4 and int4_fp8.
    weight_scale_2: F32 [], int4_fp8 only. input_scale: F32 [], where activations get 8 bits and were observed.
    pre_quant_scale: [in] in the model's dtype, for int8_sq, and for AWQ where ``UNFOLDED``.
    """
    rows, columns = family.linear_shape(config, linear)
    stored = WEIGHTS[scheme.weights]
    tensors = {
        "weight": {
            "matrix": ("F8_E4M3", (rows, columns)),
            "row": ("I8", (rows, columns)),
            "group": ("U8", (rows // 2, columns)),
        }[stored.scale],
        "weight_scale": (
            "F32",
            {"matrix": (), "row": (rows,), "group": (rows, columns // scheme.group_size)}[stored.scale],
        ),
    }
    if stored.group_sizes and stored.activations:
        tensors["weight_scale_2"] = ("F32", ())
    if stored.activations and scheme.calibrated:
        tensors["input_scale"] = ("F32", ())
    if scheme.smoothed and (linear in UNFOLDED or not scheme.awq):
        tensors["pre_quant_scale"] = (dtype, (columns,))
    name = family.linear_name(layer, linear)
    return tuple(TensorPlan(f"{name}.{suffix}", *kind) for suffix, kind in tensors.items())


def kv_tensors(layer: int, kv: str) -> tuple[TensorPlan, ...]:
    """The scale tensors of a KV scheme. Only fp8 has any: ModelOpt's layout refuses INT8 caches."""
    if kv != "fp8":
        return ()
    return tuple(TensorPlan(f"model.layers.{layer}.{name}", "F32", ()) for name in KV_SCALES)


def kv_scales(scheme: Scheme, amaxes: tuple[float, float] | None) -> tuple[float, float]:
    """max |K| and max |V|, or None where nothing was observed -> the dequantization factors of an fp8 cache.

    amax / 448, and like ModelOpt's TensorRT-LLM export never less than 1.0, unless its unified export is reproduced.
    """
    if amaxes is None:
        return 1.0, 1.0
    least = 0.0 if scheme.fp8_scales == "separate" else 1.0
    key, value = (max(least, amax / _LARGEST_E4M3) or 1.0 for amax in amaxes)
    return key, value


def kv_algo(kv: str) -> str | None:
    """What the layout can say of a KV scheme: ``"FP8"`` or None. An INT8 cache is configured behind this checkpoint."""
    return KV[kv].quant_algo if kv == "fp8" else None


def hf_quant_config(scheme: Scheme) -> dict[str, Any]:
    """The document ``hf_quant_config.json``, with ModelOpt's keys in ModelOpt's order."""
    weights = WEIGHTS[scheme.weights]
    quantization: dict[str, Any] = {"quant_algo": weights.quant_algo, "kv_cache_quant_algo": kv_algo(scheme.kv)}
    if weights.group_sizes:
        # W4A16_AWQ carries plain group-wise int4 as well: without smoothing there is no pre_quant_scale.
        smoothed = scheme.smoothed
        quantization |= {"group_size": scheme.group_size, "has_zero_point": False, "pre_quant_scale": smoothed}
    if weights.quant_algo:
        quantization["exclude_modules"] = list(EXCLUDED)
    producer = {"name": "scalellm", "version": toolchain.__version__}
    return {"producer": producer, "quantization": quantization}


def quantization_config(document: dict[str, Any], *, static_inputs: bool) -> dict[str, Any]:
    """``hf_quant_config.json`` -> the object ``quantization_config`` of ``config.json``.

    ``static_inputs``: whether fp8 linears come with an ``input_scale``, as they always do from ModelOpt.
    """
    quantization = document["quantization"]
    found: dict[str, Any] = {}
    if quantization["quant_algo"] == "FP8":
        number = {"num_bits": 8, "type": "float"}
        groups = {
            "input_activations": {"dynamic": not static_inputs, **number},
            "weights": {"dynamic": False, **number},
        }
        found["config_groups"] = {"group_0": {**groups, "targets": ["Linear"]}}
    found["ignore"] = list(quantization.get("exclude_modules", ()))
    if quantization["quant_algo"]:
        found["quant_algo"] = quantization["quant_algo"]
    if quantization["kv_cache_quant_algo"] == "FP8":
        found["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return {**found, "producer": document["producer"], "quant_method": "modelopt"}
