"""One decoder layer of a checkpoint as an engine computes it: restored weights, and what its kernels round on the way.

Restored from codes and scales as the layout defines them, in float32. It knows no text and no measure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from toolchain import family
from toolchain.checkpoint import Checkpoint
from toolchain.errors import ArtifactError
from toolchain.quality.rounding import Rounding, cache_rounding, cache_scale, round_e4m3, round_int8
from toolchain.quantizers import layout
from toolchain.quantizers.layer import restore
from toolchain.quantizers.source import Source


@dataclass(frozen=True)
class Layer:
    """What ``forward.decoder_layer`` takes."""

    weights: dict[str, torch.Tensor]
    """By name within the layer, float32."""
    inputs: dict[str, Rounding]
    """What becomes of the input of a linear, by its name; those that are computed with as they are have none."""


def open_layer(source: Source, layer: int, *, rounds_inputs: bool) -> Layer:
    """A layer of a quantized or unquantized checkpoint.

    ``rounds_inputs``: whether the engine rounds the linears' inputs where the checkpoint has scales for that, as
    TensorRT-LLM does; a CPU engine computes with the restored weights alone.
    """
    checkpoint = source.checkpoint
    weights: dict[str, torch.Tensor] = {}
    inputs: dict[str, Rounding] = {}
    for name in family.layer_tensors(checkpoint.config):
        full = f"model.layers.{layer}.{name}"
        prefix = full.removesuffix("weight")
        linear = name.removesuffix(".weight")
        beside = {suffix: f"{prefix}{suffix}" for suffix in ("weight_scale", "weight_scale_2", "input_scale")}
        found = {suffix: source.weight(one) for suffix, one in beside.items() if one in checkpoint.tensors}
        weight = restore({"weight": source.weight(full), **{k: v for k, v in found.items() if k == "weight_scale"}})
        if "weight_scale_2" in found and rounds_inputs:  # W4A8 multiplies in fp8: codes become e4m3 on their way
            weight = round_e4m3(weight, float(found["weight_scale_2"]))
        if not bool(torch.isfinite(weight).all()):
            raise source.not_finite(full)
        weights[name] = weight
        factor = f"{prefix}pre_quant_scale"
        by = source.weight(factor).float() if factor in checkpoint.tensors else None
        rounded = _input_rounding(source.on_host(full).dtype, found.get("input_scale")) if rounds_inputs else None
        if by is not None or rounded is not None:
            inputs[linear] = _treatment(by, rounded)
        source.release(full)
    return Layer(weights, inputs)


def _input_rounding(stored: torch.dtype, scale: torch.Tensor | None) -> Rounding | None:
    if scale is None:
        return None
    rule: Callable[[torch.Tensor, float], torch.Tensor] = round_int8 if stored == torch.int8 else round_e4m3
    number = float(scale)
    return lambda x: rule(x, number)


def _treatment(by: torch.Tensor | None, rounded: Rounding | None) -> Rounding:
    """x * by, then rounded."""

    def treat(x: torch.Tensor) -> torch.Tensor:
        scaled = x if by is None else x * by
        return rounded(scaled) if rounded else scaled

    return treat


def cache_scales(checkpoint: Checkpoint, kv: str) -> list[float] | None:
    """The factor of each layer's cache in that format, or None where the checkpoint does not know the ranges.

    fp8: the scales that it stores, where it does. Otherwise from the ranges that calibration saw.
    """
    count = checkpoint.config.num_layers
    stored = [[f"model.layers.{layer}.{name}" for name in layout.KV_SCALES] for layer in range(count)]
    if kv == "fp8" and all(name in checkpoint.tensors for pair in stored for name in pair):
        source = Source(checkpoint)
        return [max(1.0, *(float(source.on_host(name)) for name in pair)) for pair in stored]
    ranges = checkpoint.kv_ranges
    return None if ranges is None else [cache_scale(kv, max(pair)) for pair in ranges]


@dataclass
class CacheError:
    """What rounding the cache of one layer did to the keys and the values, over all text."""

    scale: float
    largest: dict[str, float] = field(default_factory=lambda: {"k": 0.0, "v": 0.0})
    squares: dict[str, float] = field(default_factory=lambda: {"k": 0.0, "v": 0.0})
    wrong: dict[str, float] = field(default_factory=lambda: {"k": 0.0, "v": 0.0})
    clipped: dict[str, int] = field(default_factory=lambda: {"k": 0, "v": 0})
    count: dict[str, int] = field(default_factory=lambda: {"k": 0, "v": 0})

    def see(self, name: str, x: torch.Tensor, rounded: torch.Tensor, top: float) -> None:
        self.largest[name] = max(self.largest[name], float(x.abs().max()))
        self.squares[name] += float(x.square().sum(dtype=torch.float64))
        self.wrong[name] += float((rounded - x).square_().sum(dtype=torch.float64))
        self.clipped[name] += int((x.abs() > top).sum())
        self.count[name] += x.numel()

    def to_json(self, layer: int, calibrated: tuple[float, float] | None) -> dict[str, float | int | None]:
        """Ranges as calibrated and as seen here; relative errors |rounded - x| / |x|; the share that was clipped."""
        k, v = self.largest["k"], self.largest["v"]
        return {
            "layer": layer,
            "scale": self.scale,
            "k_amax_calibrated": calibrated[0] if calibrated else None,
            "v_amax_calibrated": calibrated[1] if calibrated else None,
            "k_amax": k,
            "v_amax": v,
            "k_to_v": k / v if v else None,
            **{f"{name}_error": self._relative(name) for name in ("k", "v")},
            **{f"{name}_clipped": self.clipped[name] / max(1, self.count[name]) for name in ("k", "v")},
        }

    def _relative(self, name: str) -> float:
        return (self.wrong[name] / self.squares[name]) ** 0.5 if self.squares[name] else 0.0


class Kernels:
    """The ``Change`` of ``forward``: rounds the inputs of a layer's linears, and its keys and values."""

    def __init__(self, inputs: Mapping[str, Rounding], kv: str | None = None, scale: float = 1.0) -> None:
        self._inputs = inputs
        self._cache = cache_rounding(kv, scale) if kv else None
        self._top = scale * (127.5 if kv == "int8" else 464.0)  # behind it, the nearest code would be beyond the last
        self.error = CacheError(scale) if kv else None

    def __call__(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if name not in ("k", "v"):
            return self._inputs[name](x) if name in self._inputs else x
        if self._cache is None or self.error is None:
            return x
        rounded = self._cache(x)
        self.error.see(name, x, rounded, self._top)
        return rounded


def check_same_model(original: Checkpoint, quantized: Checkpoint) -> None:
    """Raises ArtifactError where the two cannot be the same model before and after quantization."""
    ours, theirs = original.config, quantized.config
    for key in (
        "hidden_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
    ):
        if getattr(ours, key) != getattr(theirs, key):
            raise ArtifactError(
                f"{quantized.path}: {key} is {getattr(theirs, key)}, and {getattr(ours, key)} in {original.path}: "
                "it was made from another model",
                hint="Name the model that it was made from: --model DIR",
            )
