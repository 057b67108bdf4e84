"""What the tests of calibration share: rows of token ids, and transformers' own view of a model, with hooks."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toolchain import family
from toolchain.quantizers.samples import Samples

ROPES: dict[str, dict[str, Any]] = {
    "plain-mha": {"num_key_value_heads": 4},
    "gqa": {},
    "llama3-rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "linear-rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}},
    "wide-heads": {"head_dim": 96},
    "biased": {"attention_bias": True},
    "mistral": {"architecture": "MistralForCausalLM", "sliding_window": None},
    "qwen2": {"architecture": "Qwen2ForCausalLM", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen2-tied": {"architecture": "Qwen2ForCausalLM", "tie_word_embeddings": True, "vocab_size": 323},
}
"""Models that differ in attention: heads, rotary scaling, a head size that is not hidden / heads, biases, class."""


def samples_of(ids: torch.Tensor) -> Samples:
    array = ids.to(torch.int32).numpy()
    return Samples(token_ids=array, digest=hashlib.sha256(array.tobytes()).hexdigest(), source="test rows")


def random_samples(count: int = 6, tokens: int = 64, vocabulary: int = 320, seed: int = 1) -> Samples:
    numbers = np.random.default_rng(seed).integers(0, vocabulary, (count, tokens))
    return samples_of(torch.from_numpy(numbers))


def load(folder: Path, dtype: torch.dtype) -> Any:
    """transformers' model of a folder."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def hooked(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run it. -> by name: the input of each linear layer, the hidden states before and behind each decoder layer, and
    keys (rotated) and values as they stand in the cache: ``model.layers.0.k``, ``.v``."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _module, args, kwargs: found.__setitem__(name, (args or tuple(kwargs.values()))[0].clone())

    handles = [
        module.register_forward_pre_hook(keep(name), with_kwargs=True)
        for name, module in model.named_modules()
        if name.endswith(family.LINEARS) or name.rpartition(".")[0] == "model.layers" or name == "model.norm"
    ]
    result = model(ids.long(), use_cache=True)
    for handle in handles:
        handle.remove()
    for layer, (key, value) in enumerate((one.keys, one.values) for one in result.past_key_values.layers):
        found |= {f"model.layers.{layer}.k": key, f"model.layers.{layer}.v": value}
    return found | {"logits": result.logits}
