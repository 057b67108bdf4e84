"""The frequencies of rotary position embedding: plain, linearly scaled, or scaled as in Llama 3.1. Pure arithmetic."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from toolchain.family import LlamaConfig, RopeScaling


def inverse_frequencies(config: LlamaConfig) -> npt.NDArray[np.float32]:
    """-> [head_dim / 2] float32: theta ** (-2 i / head_dim), divided by the scaling's factors.

    Computed in float32 throughout, as transformers does (modeling_rope_utils.py, transformers 5.23), so that
    angles at far positions agree to the last bit.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    plain = (np.float32(1.0) / np.power(np.float32(config.rope_theta), exponents)).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return (plain / np.float32(scaling.factor)).astype(np.float32)
    return _llama3(plain, scaling)


def _llama3(plain: npt.NDArray[np.float32], scaling: RopeScaling) -> npt.NDArray[np.float32]:
    """Long waves are slowed by ``factor``, short ones kept, and those between are blended.

    A wave is long above context / low_freq_factor and short below context / high_freq_factor, where context is the
    length that the model was first trained with (Llama 3.1, https://huggingface.co/meta-llama/Llama-3.1-8B, July 2024).
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    context = scaling.original_max_position_embeddings
    wavelength = np.float32(2 * math.pi) / plain
    slowed = np.where(wavelength > context / low, plain / np.float32(scaling.factor), plain)
    smooth = (np.float32(context) / wavelength - np.float32(low)) / np.float32(high - low)
    blended = (1 - smooth) * slowed / np.float32(scaling.factor) + smooth * slowed
    between = (wavelength >= context / high) & (wavelength <= context / low)
    return np.where(between, blended, slowed).astype(np.float32)
