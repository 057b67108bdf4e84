"""A quantized Llama folder as its format's documentation describes it, run by transformers in float32.

The second opinion of `bench_quality.py`: it imports nothing of the toolchain. Weights are dequantized, activations and
the KV cache are rounded as TensorRT-LLM's kernels round them, and everything else is transformers' LlamaForCausalLM.

Sources: the layout of NVIDIA ModelOpt's unified checkpoints (modelopt/torch/export/unified_export_hf.py and
quant_utils.py, https://github.com/NVIDIA/TensorRT-Model-Optimizer, 0.47.0); e4m3: OCP OFP8 specification 1.0 (2023-12);
KV cache: tensorrt_llm/layers/attention.py, https://github.com/NVIDIA/TensorRT-LLM (0.17): one scale for K and V.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

E4M3_LARGEST = 448.0
KV = ("fp16", "fp8", "int8", "int8-two")
"""fp16: left alone. int8-two is no engine's: int8 with a scale for the keys and another one for the values."""

Rounding = Callable[[torch.Tensor], torch.Tensor]


def round_e4m3(x: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * e4m3(x / scale), to nearest even, saturating at 448 * scale."""
    held = (x / scale).clamp(-E4M3_LARGEST, E4M3_LARGEST)
    return held.to(torch.float8_e4m3fn).to(x.dtype) * scale


def round_int8(x: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * clamp(round_half_even(x / scale), -128, 127)."""
    return (x / scale).round().clamp(-128, 127) * scale


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [out/2, in] -> float32 [out, in]: row 2r in the low nibbles, 2r+1 in the high ones, two's complement."""
    both = torch.stack((packed % 16, packed // 16), dim=1).reshape(-1, packed.shape[1]).float()
    return torch.where(both > 7, both - 16, both)


def dequantize(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tensors of one linear by suffix -> float32 [out, in] for an input that `pre_quant_scale` was applied to."""
    weight = tensors["weight"]
    if weight.dtype == torch.uint8:
        scale = tensors["weight_scale"].float()
        codes = unpack_int4(weight)
        whole = (codes.view(len(scale), scale.shape[1], -1) * scale[:, :, None]).view(codes.shape)
        # W4A8 multiplies in fp8: the int4 weights become e4m3 with the second scale on their way.
        return round_e4m3(whole, float(tensors["weight_scale_2"])) if "weight_scale_2" in tensors else whole
    if weight.dtype == torch.int8:
        return weight.float() * tensors["weight_scale"].float()[:, None]
    if weight.dtype == torch.float8_e4m3fn:
        return weight.float() * tensors["weight_scale"].float()
    return weight.float()


def input_rounding(tensors: dict[str, torch.Tensor]) -> Rounding | None:
    """How the input of one linear is rounded, after `pre_quant_scale`; None where it stays in 16 bits."""
    if "input_scale" not in tensors:
        return None
    rule = round_int8 if tensors["weight"].dtype == torch.int8 else round_e4m3
    return partial(rule, scale=float(tensors["input_scale"]))


def load(folder: Path) -> LlamaForCausalLM:
    """transformers' model in float32 with the folder's weights; hooks treat the inputs of its linears."""
    read = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    read.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**read)).float().eval()
    stored = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    if read.get("tie_word_embeddings"):
        stored.setdefault("lm_head.weight", stored["model.embed_tokens.weight"])
    weights = {}
    for name in model.state_dict():
        prefix = name.removesuffix("weight")
        tensors = {other.removeprefix(prefix): stored[other] for other in stored if other.startswith(prefix)}
        weights[name] = dequantize(tensors)
        if {"input_scale", "pre_quant_scale"} & tensors.keys():
            linear = model.get_submodule(prefix.removesuffix("."))
            linear.register_forward_pre_hook(treatment(tensors.get("pre_quant_scale"), input_rounding(tensors)))
    model.load_state_dict(weights)
    return model


def treatment(factor: torch.Tensor | None, rounding: Rounding | None) -> Callable[..., tuple[torch.Tensor]]:
    """A hook in front of a linear: x * factor, then rounded."""

    def treat(_module: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        x = args[0] if factor is None else args[0] * factor.float()
        return (rounding(x) if rounding else x,)

    return treat


def kv_amaxes(folder: Path) -> list[tuple[float, float]]:
    """(max |K| after rotation, max |V|) of each layer, from `scalellm_kv_cache.json`."""
    document = json.loads((folder / "scalellm_kv_cache.json").read_text(encoding="utf-8"))
    return [(layer["k_amax"], layer["v_amax"]) for layer in document["layers"]]


def kv_rounding(kv: str, amaxes: list[tuple[float, float]]) -> list[tuple[Rounding, Rounding]]:
    """One of `KV` and the ranges of each layer -> how keys and values of each layer are rounded.

    int8: scale = max(k, v) / 127. fp8: scale = max(1, max(k, v) / 448). Both as ModelOpt exports them for engines.
    """
    if kv == "fp16":
        return []
    if kv == "int8-two":
        return [(partial(round_int8, scale=k / 127), partial(round_int8, scale=v / 127)) for k, v in amaxes]
    found = []
    for largest in (max(pair) for pair in amaxes):
        one: Rounding = partial(round_int8, scale=largest / 127)
        if kv == "fp8":
            one = partial(round_e4m3, scale=max(1.0, largest / E4M3_LARGEST))
        found.append((one, one))
    return found


class RoundedCache(DynamicCache):
    """A KV cache that rounds all it is given: keys come here after rotation, and attention reads what is stored."""

    def __init__(self, rounding: list[tuple[Rounding, Rounding]]) -> None:
        super().__init__()
        self.rounding = rounding

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.rounding:
            key, value = self.rounding[layer_idx]
            key_states, value_states = key(key_states), value(value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@torch.inference_mode()
def log_probabilities(
    model: LlamaForCausalLM, ids: list[int], rounding: list[tuple[Rounding, Rounding]]
) -> torch.Tensor:
    """Of every token but the first: float32 [len(ids) - 1, vocabulary]."""
    logits = model(torch.tensor([ids]), past_key_values=RoundedCache(rounding), use_cache=True).logits[0, :-1]
    return logits.log_softmax(-1)


def negative_log_likelihood(log_probability: torch.Tensor, ids: list[int]) -> float:
    """The sum over all tokens but the first, in nats."""
    return -float(log_probability.gather(1, torch.tensor(ids[1:])[:, None]).sum(dtype=torch.float64))


def divergence(original: torch.Tensor, other: torch.Tensor) -> float:
    """KL(original || other), log-probabilities [n, vocabulary], summed over the n tokens, in nats.

    What `other` costs more on text that the original itself would write.
    """
    return float((original.exp() * (original - other)).sum(dtype=torch.float64))
