"""The forward pass of a Llama, one decoder layer at a time, with taps on what quantization has to know.

It computes in the dtype of the hidden states it is given, and rounds where transformers rounds: norms in float32, the
rotary tables in float32 and then in the dtype, attention by torch's own kernel. It knows no file and no quantization.

Rotary scaling ``llama3``: https://github.com/meta-llama/llama-models (models/llama3/reference_impl/model.py, 2024-07).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
import torch.nn.functional as functional

from toolchain import family
from toolchain.family import LlamaConfig, RopeScaling

Tap = Callable[[str, torch.Tensor], None]
"""Called with ``"self_attn.q_proj"`` (the first linear of each group of ``family.SHARED_INPUT``) and its input
[rows, in]; with ``"k"`` and the keys after rotation, ``"v"`` and the values, both [samples, kv_heads, tokens, dim]."""

Change = Callable[[str, torch.Tensor], torch.Tensor]
"""Stands for what a kernel rounds: called with the name of each linear and its input [samples, tokens, in], and with
``"k"`` and ``"v"`` as a ``Tap`` is. What it gives is computed with; it leaves what it is given as it is."""

_QKV, _O, _MLP, _DOWN = (group[0] for group in family.SHARED_INPUT)


def embed(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[vocab, hidden], integers [samples, tokens] -> [samples, tokens, hidden], in the dtype of the table."""
    return table[ids.reshape(-1).long()].view(*ids.shape, table.shape[1])


@torch.no_grad()
def decoder_layer(
    hidden: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    config: LlamaConfig,
    tap: Tap,
    change: Change = lambda _name, x: x,
    start: int = 0,
) -> torch.Tensor:
    """[samples, tokens, hidden] -> the same, after one decoder layer; every sample starts at position ``start``.

    Behind the first position there is one token at a time, and ``change`` gives the keys and values before it too.

    ``weights``: by name within the layer (``"mlp.up_proj.weight"``, ``"input_layernorm.weight"``), all in the dtype of
    ``hidden``; those of ``family.layer_tensors``. ``tap`` sees everything before ``change``.
    """

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        """[.., in] -> [.., out], with the bias [out] where the model has one."""
        bias = weights[f"{name}.bias"] if name in config.biased else None
        return functional.linear(change(name, x), weights[f"{name}.weight"], bias)

    x = norm(hidden, weights["input_layernorm.weight"], config.rms_norm_eps)
    tap(_QKV, x.flatten(0, 1))
    attended = _attention(x, linear, config, tap, change, start)
    tap(_O, attended.flatten(0, 1))
    hidden = hidden + linear(attended, "self_attn.o_proj")
    x = norm(hidden, weights["post_attention_layernorm.weight"], config.rms_norm_eps)
    tap(_MLP, x.flatten(0, 1))
    gate = functional.silu(linear(x, "mlp.gate_proj"))
    x = gate.mul_(linear(x, "mlp.up_proj"))
    tap(_DOWN, x.flatten(0, 1))
    return hidden + linear(x, "mlp.down_proj")


def _attention(
    x: torch.Tensor,
    linear: Callable[[torch.Tensor, str], torch.Tensor],
    config: LlamaConfig,
    tap: Tap,
    change: Change,
    start: int,
) -> torch.Tensor:
    samples, tokens, _ = x.shape
    query, key, value = (
        linear(x, name).view(samples, tokens, -1, config.head_dim).transpose(1, 2) for name in family.ATTENTION_IN
    )
    cos, sin = (table[start:] for table in rotary(config, start + tokens, x.dtype, x.device))
    query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
    tap("k", key)
    tap("v", value)
    key, value = change("k", key), change("v", value)
    grouped = config.num_kv_heads != config.num_heads
    mixed = functional.scaled_dot_product_attention(
        query, key, value, is_causal=tokens > 1, scale=config.head_dim**-0.5, enable_gqa=grouped
    )
    return mixed.transpose(1, 2).reshape(samples, tokens, -1)


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """[.., hidden] -> the same: divided by its root mean square, times ``weight`` [hidden]."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[samples, heads, tokens, dim] turned by position; the halves of a head are the parts of a pair (HF's layout)."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


@lru_cache(maxsize=4)
def rotary(
    config: LlamaConfig, tokens: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> cosines and sines [tokens, head_dim] of the angles position * frequency."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    if config.rope_scaling:
        frequencies = _scaled(frequencies, config.rope_scaling)
    angles = torch.outer(torch.arange(tokens).float(), frequencies).repeat(1, 2)
    return angles.cos().to(dtype).to(device), angles.sin().to(dtype).to(device)


def _scaled(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """``linear``: all slower by ``factor``. ``llama3``: only long waves, with a ramp between the two wavelengths."""
    slow = frequencies / scaling.factor
    if scaling.kind == "linear":
        return slow
    wavelengths = 2 * math.pi / frequencies
    context, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    ramp = (context / wavelengths - low) / (high - low)
    between = (1 - ramp) * slow + ramp * frequencies
    long, short = wavelengths > context / low, wavelengths < context / high
    return torch.where(long, slow, torch.where(short, frequencies, between))
