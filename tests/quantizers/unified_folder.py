"""A second reading of the unified quantized layout: numpy and transformers, and nothing of ours.

Written from the format's description alone, so that what our quantizers write is checked by code that shares nothing
with them. ``model_of`` gives the float32 model of transformers that a folder stands for.

    linear           tensors beside ``weight``                        W[out, in] for a plain activation
    float8_e4m3      weight_scale [], input_scale []                  weight * weight_scale
    uint8 [out/2]    weight_scale [out, in/group]                     codes * weight_scale of their group
    int8             weight_scale [out]                               weight * weight_scale of their row
    any of them      pre_quant_scale [in]                             ... * pre_quant_scale of their column

uint8 holds two rows in a byte, row 2r in the low nibble, row 2r + 1 in the high one, two's complement. The activation
is multiplied by pre_quant_scale, where there is one, and then rounded to float8_e4m3 or int8 with input_scale.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

_E4M3_LARGEST, _INT8_LARGEST = 448, 127


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the shards of a folder."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def model_of(folder: Path, *, activations: bool = False) -> Any:
    """transformers' Llama with the weights that the folder stands for, in float32.

    With ``activations`` the inputs of its linears are rounded too, where the folder has an ``input_scale``.
    """
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("quantization_config", None)
    stored, state = tensors_of(folder), dense_of(folder)
    linears = {name.rpartition(".")[0] for name in stored if name.endswith(".weight_scale")}
    model = LlamaForCausalLM(LlamaConfig(**raw)).float().eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    model.tie_weights()
    if activations:
        for module in sorted(linears):
            if f"{module}.input_scale" in stored:
                _round_inputs(model.get_submodule(module), module, stored)
    return model


def dense_of(folder: Path) -> dict[str, torch.Tensor]:
    """Name -> float32, of every weight and bias that a folder stands for."""
    quantized = json.loads((folder / "config.json").read_text()).get("quantization_config", {}).get("quant_algo")
    stored, state = tensors_of(folder), {}
    for name, tensor in stored.items():
        module, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):
            continue
        if f"{module}.weight_scale" in stored and kind == "weight":
            assert quantized, f"{name} has a scale, and config.json says nothing of a quantization"
            state[name] = torch.from_numpy(_linear(module, stored))
        else:
            state[name] = tensor.float()
    return state


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[samples, tokens] -> [samples, tokens, vocabulary]."""
    found: torch.Tensor = model(ids.long(), use_cache=False).logits
    return found


def _linear(module: str, stored: dict[str, torch.Tensor]) -> np.ndarray:
    weight, scale = stored[f"{module}.weight"], stored[f"{module}.weight_scale"].numpy()
    if weight.dtype == torch.uint8:
        packed = weight.numpy()
        codes = np.empty((2 * len(packed), packed.shape[1]), np.int16)
        codes[0::2], codes[1::2] = packed % 16, packed // 16
        codes[codes > 7] -= 16
        restored = codes * np.repeat(scale, codes.shape[1] // scale.shape[1], axis=1)
    elif weight.dtype == torch.int8:
        restored = weight.numpy() * scale[:, None]
    else:
        restored = _e4m3_values()[weight.view(torch.uint8).numpy()] * scale
    if f"{module}.pre_quant_scale" in stored:
        restored = restored * stored[f"{module}.pre_quant_scale"].float().numpy()
    return restored.astype(np.float32)


def _e4m3_values() -> np.ndarray:
    """What the 256 bytes mean (OCP OFP8 specification 1.0: bias 7, no infinities, S.1111.111 is NaN)."""
    values = np.empty(256, np.float32)
    for byte in range(256):
        sign, exponent, mantissa = -1.0 if byte & 128 else 1.0, byte >> 3 & 15, byte & 7
        size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        values[byte] = np.nan if exponent == 15 and mantissa == 7 else sign * size
    return values


def _round_inputs(linear: Any, module: str, stored: dict[str, torch.Tensor]) -> None:
    """The weight stands for a plain activation, so what is scaled up for rounding is scaled down again."""
    scale = stored[f"{module}.input_scale"]
    factor = stored.get(f"{module}.pre_quant_scale", torch.ones(())).float()
    whole = stored[f"{module}.weight"].dtype == torch.int8

    def rounded(_module: Any, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        x = inputs[0] * factor / scale
        if whole:
            return x.round().clamp(-_INT8_LARGEST - 1, _INT8_LARGEST) * scale / factor
        x = x.clamp(-_E4M3_LARGEST, _E4M3_LARGEST)
        return x.to(torch.float8_e4m3fn).float() * scale / factor

    linear.register_forward_pre_hook(rounded)
