"""A copy of a Llama that computes the same and has outlier channels, as large Llamas have and small ones have not.

    python scripts/plant_outliers.py MODEL OUT --channels 4 --factor 16

In each decoder layer, the weights of a few channels of both norms are multiplied by a power of two, and the columns of
the matrices behind that norm divided by it. float16 and bfloat16 keep every bit of that, unless it meets a subnormal
number. What the matrices read has large channels then, which plain rounding treats badly, and AWQ and SmoothQuant are
made for. See `bench_quality.py`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

BEHIND = {  # norm -> the matrices that read it
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def factors(tensors: Mapping[str, torch.Tensor], channels: int, factor: float, seed: int) -> dict[str, torch.Tensor]:
    """-> by tensor name what to multiply it by, [hidden]: `channels` entries of each norm, the inverse behind it."""
    random = torch.Generator().manual_seed(seed)
    found = {}
    for name in sorted(tensors):
        layer, _, norm = name.removesuffix(".weight").rpartition(".")
        if norm in BEHIND:
            by = torch.ones(len(tensors[name]), dtype=torch.float32)
            by[torch.randperm(len(by), generator=random)[:channels]] = factor
            found[name] = by
            found |= {f"{layer}.{linear}.weight": 1 / by for linear in BEHIND[norm]}
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--channels", type=int, default=4, help="outliers of each norm (default 4)")
    parser.add_argument("--factor", type=float, default=16.0, help="a power of two (default 16)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    shutil.copytree(args.model, args.out)
    files = sorted(args.out.glob("*.safetensors"))
    shards = {file: load_file(file) for file in files}
    every = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    by = factors(every, args.channels, args.factor, args.seed)
    for file, shard in shards.items():
        changed = {
            name: (tensor.float() * by[name]).to(tensor.dtype) if name in by else tensor
            for name, tensor in shard.items()
        }
        save_file(changed, file, metadata={"format": "pt"})
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
