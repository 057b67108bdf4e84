"""A TensorRT-LLM checkpoint: ranks, formats, and the scales of its cache."""

from __future__ import annotations

from pathlib import Path

from toolchain.backends.tensorrt_llm import TensorRtLlmCheckpoint
from toolchain.stages.inspect.sheet import Sheet, sheet
from toolchain.units import format_bytes
from toolchain.workspace import Stamp

_FLOOR = 1.0
"""ModelOpt clamps FP8 cache scales to it, and releases up to 0.13 use it whatever is stored."""


def checkpoint(path: Path, stamp: Stamp | None) -> Sheet:
    """Raises ArtifactError naming the file that is missing or damaged."""
    found = TensorRtLlmCheckpoint.open(path)
    config, split = found.config, found.split
    quantization = config.get("quantization") or {}
    algo, kv_algo = quantization.get("quant_algo"), quantization.get("kv_cache_quant_algo")
    group = f", groups of {quantization['group_size']}" if quantization.get("group_size") and algo else ""
    scales = found.kv_scales()
    ranks = [sum(one.nbytes for one in rank.values()) for rank in found.ranks]
    heads = f"{config['num_attention_heads']} heads, {config.get('num_key_value_heads')} of K and V"
    spread = f"{min(scales):.6g} to {max(scales):.6g}, one for each of {len(scales)} layers" if scales else ""
    rows = [
        ("what", f"TensorRT-LLM checkpoint for trtllm-build, tp {split.tp} x pp {split.pp}"),
        ("model", f"{config.get('architecture')}, {config['num_hidden_layers']} layers, {heads}"),
        ("dtype", f"{config.get('dtype')}, logits {config.get('logits_dtype') or 'float32'}"),
        ("weights", f"{algo or 'not quantized'}{group}"),
        ("cache", kv_algo or "not quantized"),
        ("cache scales", spread),
        ("ranks", ", ".join(f"rank{number} {format_bytes(size)}" for number, size in enumerate(ranks))),
        ("written by", _producer(config.get("producer"))),
    ]
    facts = {
        "architecture": config.get("architecture"),
        "layers": config["num_hidden_layers"],
        "dtype": config.get("dtype"),
        "tp": split.tp,
        "pp": split.pp,
        "quantization": quantization,
        "kv_scales": scales,
        "rank_bytes": ranks,
    }
    next_ = "scalellm build --recipe RECIPE   # with the recipe that it was converted for"
    return sheet(
        "trtllm-checkpoint", path, rows, stamp=stamp, warnings=_warnings(kv_algo, scales), next=next_, facts=facts
    )


def _producer(raw: object) -> str:
    return " ".join(str(raw[key]) for key in ("name", "version") if key in raw) if isinstance(raw, dict) else ""


def _warnings(kv_algo: str | None, scales: list[float] | None) -> list[str]:
    bad = [layer for layer, scale in enumerate(scales or []) if not 0 < scale < float("inf")]
    told = [
        f"cache scale of layer {layer} is {(scales or [])[layer]}: every key and value becomes garbage" for layer in bad
    ]
    if kv_algo == "FP8" and any(scale != _FLOOR for scale in scales or []):
        told.append("FP8 cache scales other than 1.0 count from TensorRT-LLM 0.14 on; earlier releases use 1.0")
    return told
