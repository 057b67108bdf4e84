"""A second opinion on quality: whole models in transformers, loaded by ``scripts/reference_llama.py``, and numpy."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.quantizers.calibrated import random_samples
from tests.stages.test_quantize_calibrated import calibrate
from toolchain.quantizers.samples import Samples

CALIBRATION = random_samples(24, 48)
TEXT = random_samples(5, 40, seed=7)

SCHEMES: dict[str, dict[str, Any]] = {
    "none": {"weights": "none"},
    "fp8": {"weights": "fp8"},
    "int8": {"weights": "int8"},
    "int8_sq": {"weights": "int8_sq"},
    "int4-rtn": {"weights": "int4"},
    "int4-awq": {"weights": "int4", "method": "awq"},
    "int4_fp8": {"weights": "int4_fp8", "group_size": 128},
}


def reference() -> Any:
    scripts = str(Path(__file__).parents[2] / "scripts")
    sys.path.insert(0, scripts)
    try:
        return importlib.import_module("reference_llama")
    finally:
        sys.path.remove(scripts)


def quantized(model: Path, target: Path, scheme: str) -> Path:
    """The model in a scheme, with the ranges of K and V."""
    choices = {"group_size": 64, "scales": "mse", "kv": "fp8", **SCHEMES[scheme]}
    return calibrate(model, target, samples=CALIBRATION, **choices)


def logits(folder: Path, samples: Samples, kv: str = "fp16") -> list[torch.Tensor]:
    """Log-probabilities of each row, [tokens - 1, vocabulary], by transformers."""
    theirs = reference()
    rounding = theirs.kv_rounding(kv, theirs.kv_amaxes(folder)) if kv != "fp16" else []
    model = theirs.load(folder)
    return [theirs.log_probabilities(model, row.tolist(), rounding) for row in samples.token_ids]


def measured(original: list[torch.Tensor], other: list[torch.Tensor], samples: Samples) -> dict[str, float]:
    """The measures, written out: sums over whole matrices in float64."""
    first, second = (torch.cat(one).double().numpy() for one in (original, other))
    words = samples.token_ids[:, 1:].reshape(-1)
    rows = np.arange(len(words))
    nats = {name: -float(np.mean(one[rows, words])) for name, one in (("first", first), ("second", second))}
    return {
        "perplexity": math.exp(nats["second"]),
        "perplexity_ratio": math.exp(nats["second"] - nats["first"]),
        "kl": float(np.mean(np.sum(np.exp(first) * (first - second), axis=1))),
        "top1_agreement": float(np.mean(first.argmax(1) == second.argmax(1))),
    }
