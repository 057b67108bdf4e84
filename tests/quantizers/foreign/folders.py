"""Small Llamas as other tools would have written them, packed by the letter of each format and none of our code.

AutoAWQ and AutoGPTQ cannot be installed beside the torch that is used here, so their packing is written down again from
what their sources say.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from tests.backends.quantized_folder import random_llama

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Written:
    """A folder, and by name what its matrices stand for: float32 [out, in]."""

    path: Path
    stands_for: dict[str, torch.Tensor]
    model: transformers.LlamaForCausalLM
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def reference(self) -> transformers.LlamaForCausalLM:
        """transformers' model with these weights, float32."""
        found = transformers.LlamaForCausalLM(self.model.config).eval()
        found.load_state_dict(self.stands_for, strict=False)
        found.tie_weights()
        return found


Pack = Callable[[str, np.ndarray], tuple[dict[str, torch.Tensor], np.ndarray]]
"""A module's name and its weight, float32 [out, in] -> tensors by suffix, and the float32 matrix that they mean."""


def write(
    folder: Path,
    pack: Pack,
    settings: dict[str, Any] | None,
    *,
    dtype: str = "float16",
    config_file: str = "",
    **model: Any,
) -> Written:
    """A random Llama with every matrix of its layers packed by ``pack``; ``settings`` is its quantization_config.

    ``config_file`` puts the settings into a file of that name instead.
    """
    folder.mkdir(parents=True)
    llama = random_llama(**model)
    tensors: dict[str, torch.Tensor] = {}
    stands_for: dict[str, torch.Tensor] = {}
    for name, tensor in llama.state_dict().items():
        module = name.removesuffix(".weight")
        if name == "lm_head.weight" and llama.config.tie_word_embeddings:
            continue
        if module.endswith(LINEARS):
            packed, meaning = pack(module, tensor.numpy())
            tensors |= {f"{module}.{suffix}": value.contiguous() for suffix, value in packed.items()}
            stands_for[name] = torch.from_numpy(np.ascontiguousarray(meaning, dtype=np.float32))
        else:
            tensors[name] = tensor.to(getattr(torch, dtype))
            stands_for[name] = tensors[name].float()
    raw = llama.config.to_dict() | {"dtype": dtype, "architectures": ["LlamaForCausalLM"]}
    if settings is not None and not config_file:
        raw["quantization_config"] = settings
    elif settings is not None:
        (folder / config_file).write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return Written(folder, stands_for, llama, tensors)


def in_groups(
    weight: np.ndarray, group: int, zero: int | None = 8, bits: int = 4
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float32 [out, in] -> codes [in, out] 0..15, zeros [in/g, out], float16 scales [in/g, out]; None: zero points
    from the range of each group, as AutoAWQ has them."""
    columns = weight.T.astype(np.float32)
    top = 2**bits - 1
    grouped = columns.reshape(-1, group, columns.shape[1])
    if zero is None:
        low, high = np.minimum(grouped.min(1), 0), np.maximum(grouped.max(1), 0)
        scales = ((high - low) / top).astype(np.float16)
        zeros = np.clip(np.rint(-low / scales.astype(np.float32)), 0, top)
    else:
        scales = (np.abs(grouped).max(1) / (top // 2)).astype(np.float16)
        zeros = np.full(scales.shape, zero)
    codes = np.clip(np.rint(grouped / scales[:, None].astype(np.float32)) + zeros[:, None], 0, top)
    return codes.reshape(columns.shape).astype(np.int64), zeros.astype(np.int64), scales


def meaning(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """(q - z) * scale in float32: codes [in, out] -> [out, in]."""
    group = len(codes) // len(scales)
    signed = (codes - np.repeat(zeros, group, 0)).astype(np.float32)
    return (signed * np.repeat(scales.astype(np.float32), group, 0)).T


def words(codes: np.ndarray, order: tuple[int, ...], bits: int = 4) -> torch.Tensor:
    """[n, m] -> int32 [n, m * bits / 32]: place i of a word, from its lowest bits, holds ``order[i]`` of its run."""
    run = len(order)
    found = np.zeros((codes.shape[0], codes.shape[1] // run), np.uint32)
    for place, which in enumerate(order):
        found |= (codes[:, which::run] & (2**bits - 1)).astype(np.uint32) << np.uint32(bits * place)
    return torch.from_numpy(found.view(np.int32))


def awq(group: int = 128, zero: int | None = 8) -> Pack:
    """AutoAWQ's gemm: https://github.com/casper-hansen/AutoAWQ awq/modules/linear/gemm.py, from_linear (2025-05)."""

    def pack(_module: str, weight: np.ndarray) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        codes, zeros, scales = in_groups(weight, group, zero)
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        tensors = {"qweight": words(codes, order), "qzeros": words(zeros, order), "scales": torch.from_numpy(scales)}
        return tensors, meaning(codes, zeros, scales)

    return pack


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


def gptq(
    group: int = 128, zero: int | None = 8, bits: int = 4, lacking: int = 1, order: np.ndarray | None = None
) -> Pack:
    """AutoGPTQ's QuantLinear: https://github.com/AutoGPTQ/AutoGPTQ nn_modules/qlinear/qlinear_cuda_old.py (2024-06).

    ``lacking`` is what is taken off the zero points, ``order`` a g_idx.
    """

    def pack(_module: str, weight: np.ndarray) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        size = weight.shape[1] if group == -1 else group
        codes, zeros, scales = in_groups(weight, size, zero, bits)
        run = tuple(range(32 // bits))
        g_idx = np.arange(weight.shape[1]) // size if order is None else order[: weight.shape[1]]
        tensors = {
            "qweight": words(codes.T, run, bits).T,
            "qzeros": words(zeros - lacking, run, bits),
            "scales": torch.from_numpy(scales),
            "g_idx": torch.from_numpy(g_idx.astype(np.int32)),
        }
        return tensors, meaning(codes, zeros, scales)

    return pack


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
