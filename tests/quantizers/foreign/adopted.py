"""What the tests of imports share: run one, and read the layout back by its description alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from toolchain import workspace
from toolchain.progress import Silent
from toolchain.quantizers import foreign
from toolchain.stages import adopt as stage


def adopt(source: Path, target: Path, **options: object) -> Path:
    """Import ``source`` into ``target``."""
    model = foreign.open_foreign(source)
    assert model is not None
    with workspace.draft(target, "imported", stage.inputs(model)) as draft:
        stage.adopt(model, draft, progress=Silent(), **options)
        draft.commit(versions={}, recipe="")
    return target


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def dequantized(folder: Path) -> dict[str, torch.Tensor]:
    """What the matrices of an imported folder stand for, float32: ModelOpt's unified layout read as documented.

    int4: a byte holds two output rows of one input column, the even row in its low bits; int8 and fp8: code * scale.
    """
    tensors, found = tensors_of(folder), {}
    for name, tensor in tensors.items():
        scale = tensors.get(f"{name}_scale")
        if not name.endswith(".weight"):
            continue
        if scale is None:
            found[name] = tensor.float()
        elif tensor.dtype == torch.uint8:
            packed = tensor.numpy()
            codes = np.empty((2 * packed.shape[0], packed.shape[1]), np.int8)
            codes[0::2], codes[1::2] = packed & 15, packed >> 4
            codes[codes > 7] -= 16
            group = codes.shape[1] // scale.shape[1]
            found[name] = torch.from_numpy(codes).float() * scale.repeat_interleave(group, 1)
        else:
            found[name] = tensor.float() * (scale[:, None] if scale.ndim else scale)
    return found


def quantization_of(folder: Path) -> dict[str, object]:
    """``hf_quant_config.json``'s ``quantization``."""
    return json.loads((folder / "hf_quant_config.json").read_text())["quantization"]


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """The same names, and every number bit for bit."""
    assert set(found) == set(wanted)
    different = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert not different
