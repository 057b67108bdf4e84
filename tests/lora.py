"""Random LoRA adapters as peft saves them, and the models that they make of another; without any code of ours."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(
    folder: Path,
    model: transformers.PreTrainedModel,
    *,
    rank: int = 4,
    alpha: float = 8,
    targets: Sequence[str] = ALL,
    seed: int = 0,
    size: float = 0.1,
    dtype: torch.dtype = torch.float32,
    **more: Any,
) -> Path:
    """adapter_config.json and adapter_model.safetensors for every decoder layer."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in targets:
            rows, columns = module.weight.shape
            first, second = (torch.randn(*shape, generator=generator) for shape in ((rank, columns), (rows, rank)))
            tensors[f"base_model.model.{name}.lora_A.weight"] = (first * size).to(dtype)
            tensors[f"base_model.model.{name}.lora_B.weight"] = (second * size).to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**told, "target_modules": list(targets), **more}))
    return folder


def merged(model: transformers.PreTrainedModel, folder: Path) -> transformers.PreTrainedModel:
    """W + alpha / r B A, as ``merge_and_unload`` of peft has it."""
    told = json.loads((folder / "adapter_config.json").read_text())
    width = told["r"] ** 0.5 if told.get("use_rslora") else told["r"]
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    made = copy.deepcopy(model)
    with torch.no_grad():
        for name, first in tensors.items():
            if name.endswith("lora_A.weight"):
                second = tensors[name.replace("lora_A", "lora_B")]
                module = made.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
                module.weight += told["lora_alpha"] / width * second @ first
    return made
