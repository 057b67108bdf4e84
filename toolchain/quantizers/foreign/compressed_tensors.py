"""compressed-tensors, as llm-compressor writes it: int4 and int8 weights, and FP8 weights with one scale per matrix.

pack-quantized: weight_packed int32 [out, in * bits / 32] (input channels, from the lowest bits, q + 8 or q + 128),
weight_scale [out, in/g], weight_shape [2], where asymmetric weight_zero_point int32 [out * bits / 32, in/g].
float-quantized and naive-quantized: weight e4m3 [out, in], weight_scale [1], where static input_scale [1]; the scales
of an FP8 cache are self_attn.k_scale and v_scale. int-quantized: weight int8 [out, in], weight_scale [out, 1].
Scales are 16-bit floats mostly; float32 holds them exactly.

Source: compressed_tensors/compressors/pack_quantized and naive_quantized, compressed-tensors 0.20.0 (2026-11).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from toolchain import family
from toolchain.checkpoint import TensorInfo
from toolchain.errors import PlanError
from toolchain.quantizers import layout
from toolchain.quantizers.foreign.folder import KEPT_GROUPS, START_ANEW, Array, Folder
from toolchain.quantizers.foreign.grouped import Codes, GroupedFolder
from toolchain.quantizers.layout import Scheme

NAME, PRODUCER = "compressed-tensors", "llm-compressor"
_FORMATS = ("pack-quantized", "float-quantized", "int-quantized", "naive-quantized")
_KV = (".k_scale", ".v_scale")
Settings = Mapping[str, Any]


def facts(settings: Settings) -> dict[str, Any]:
    """``quantization_config`` -> what can be said of the folder."""
    weights, inputs = _first_group(settings)
    bits, kind, group = weights.get("num_bits"), weights.get("type"), weights.get("group_size") or -1
    per = {"tensor": "one scale per matrix", "channel": "one scale per row"}.get(
        str(weights.get("strategy")), f"groups of {group}"
    )
    asymmetric = weights.get("symmetric") is False
    scheme = settings.get("kv_cache_scheme") or {}
    kv = f"{scheme.get('type', '')}{scheme.get('num_bits', '')}".replace("float8", "fp8")
    title = (
        f"compressed-tensors {settings.get('format', '')}: {'fp' if kind == 'float' else 'int'}{bits} weights, {per}"
    )
    if inputs:
        title += (
            f", {'dynamic' if inputs.get('dynamic') else 'static'} {inputs.get('type')}{inputs.get('num_bits')} inputs"
        )
    return {
        "format": NAME,
        "producer": PRODUCER,
        "title": title + ", with zero points" * asymmetric + f", {kv} cache" * bool(kv),
        "weights": {"4 int": "int4", "8 int": "int8", "8 float": "fp8"}.get(f"{bits} {kind}"),
        "group_size": group if bits == 4 and group > 0 else None,
        "zero_points": asymmetric,
        "act_order": str(weights.get("actorder")) in ("group", "dynamic", "True"),
        "kv": kv or "fp16",
    }


def _first_group(settings: Settings) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The weights and the input activations of the first group of layers."""
    group: Any = next(iter((settings.get("config_groups") or {}).values()), {})
    if not isinstance(group, dict):
        return {}, {}
    return group.get("weights") or {}, group.get("input_activations") or {}


def _refusals(settings: Settings) -> str:
    """What we do not read of a configuration, in a few words, or nothing."""
    kind = settings.get("format")
    formats = {group.get("format") or kind for group in (settings.get("config_groups") or {}).values()}
    weights, inputs = _first_group(settings)
    bits = weights.get("num_bits")
    if kind not in _FORMATS:
        return f"its format is {kind!r}; read are {', '.join(_FORMATS)}"
    if len(settings.get("config_groups") or {}) != 1 or formats != {kind}:
        return "its layers are quantized in several ways (config_groups)"
    if (settings.get("transform_config") or {}).get("config_groups"):
        return "its activations are rotated while running (transform_config)"
    if (settings.get("sparsity_config") or {}).get("format", "dense") != "dense":
        return "its weights are stored sparse (sparsity_config)"
    if weights.get("type") == "float":
        return _float_refusals(weights, inputs)
    if weights.get("type") != "int" or bits not in (4, 8):
        return f"its weights are {weights.get('type')} of {bits} bits; int of 4 or 8 and float of 8 are read"
    if inputs:
        return f"its inputs are {inputs.get('type')}{inputs.get('num_bits')} too, made in a way that our engines do not"
    return ""


def _float_refusals(weights: Settings, inputs: Settings) -> str:
    strategy = weights.get("strategy")
    if weights.get("num_bits") != 8:
        return f"its weights are floats of {weights.get('num_bits')} bits; 8 are read"
    if strategy != "tensor":
        return (
            f"its FP8 weights have one scale per {strategy}; the layout and TensorRT-LLM's FP8 have one per matrix, so "
            "they would have to be rounded again"
        )
    if inputs and (inputs.get("type") != "float" or inputs.get("num_bits") != 8):
        return f"its FP8 weights come with {inputs.get('type')}{inputs.get('num_bits')} inputs"
    if inputs and not inputs.get("dynamic") and inputs.get("strategy") != "tensor":
        return f"its static inputs have one scale per {inputs.get('strategy')}; the layout has one per matrix"
    return ""


def read(path: Path, raw: Mapping[str, Any], tensors: Mapping[str, TensorInfo], settings: Settings) -> Folder:
    """One such folder, its headers checked."""
    if reason := _refusals(settings):
        raise PlanError(f"{path}: compressed-tensors, but {reason}", hint=START_ANEW)
    if _first_group(settings)[0]["type"] == "float":
        return Float8(path, raw, tensors, settings)
    return Packed(path, raw, tensors, settings)


def _kv(path: Path, settings: Settings) -> str:
    """The cache of the folder: fp8 with a scale per layer, or none. PlanError for others."""
    scheme = settings.get("kv_cache_scheme")
    if not scheme:
        return "fp16"
    if (scheme.get("type"), scheme.get("num_bits"), scheme.get("strategy", "tensor")) != ("float", 8, "tensor"):
        raise PlanError(
            f"{path}: its cache is {scheme.get('type')}{scheme.get('num_bits')} per {scheme.get('strategy')}; read is "
            "float8 per tensor",
            hint=START_ANEW,
        )
    return "fp16" if scheme.get("dynamic") else "fp8"


def _refuse_ignored(folder: Folder, settings: Settings) -> None:
    """Matrices of decoder layers that were left unquantized."""
    plain = [
        module
        for module in sorted(folder.linears)
        if (info := folder.tensors.get(f"{module}.weight")) and info.dtype in ("F16", "BF16", "F32")
    ]
    if plain:
        ignored = ", ".join(map(str, (settings.get("ignore") or ())[:4]))
        raise PlanError(
            f"{folder.path}: some matrices are not quantized ({', '.join(plain[:3])}; ignore: {ignored}), and the "
            "layout has one scheme for all of them",
            hint=START_ANEW,
        )


class _WithCache(Folder):
    """The scales of an FP8 cache, which both kinds may have."""

    extra = _KV

    def cache_scale(self, name: str) -> npt.NDArray[np.float32]:
        """``model.layers.0.self_attn.k_proj.k_scale`` from ``model.layers.0.self_attn.k_scale``."""
        return self.wide(name.replace(".k_proj.", ".").replace(".v_proj.", ".")).reshape(1)

    def linear(self, module: str, suffix: str) -> Array:
        if suffix in ("k_scale", "v_scale"):
            return self.cache_scale(f"{module}.{suffix}")
        return super().linear(module, suffix)

    def check_cache(self) -> None:
        if self.scheme is not None and self.scheme.kv == "fp8":
            for layer in range(self.config.num_layers):
                for plan in layout.kv_tensors(layer, "fp8"):
                    self.cache_scale(plan.name)


class Float8(_WithCache):
    """FP8 weights with one scale per matrix."""

    suffixes = ("weight", "weight_scale", "input_scale")

    def __init__(
        self, path: Path, raw: Mapping[str, Any], tensors: Mapping[str, TensorInfo], settings: Settings
    ) -> None:
        super().__init__(path, raw, tensors)
        inputs = _first_group(settings)[1]
        self.static = bool(inputs) and not inputs.get("dynamic")
        self.scheme = Scheme(
            "fp8", KEPT_GROUPS[0], "modelopt", _kv(path, settings), fp8_scales="separate", calibrated=self.static
        )
        _refuse_ignored(self, settings)
        self.check_names()
        for layer, linear in family.layer_linears(self.config):
            module = family.linear_name(layer, linear)
            self.array(f"{module}.weight", ("F8_E4M3",), family.linear_shape(self.config, linear))
            for suffix in ("weight_scale", *(("input_scale",) if self.static else ())):
                self.linear(module, suffix)
        self.check_cache()

    def linear(self, module: str, suffix: str) -> Array:
        name = f"{module}.{suffix}"
        if suffix == "weight":
            codes = self.array(name)
            if ((codes & 0x7F) == 0x7F).any():
                raise self.not_finite(name)
            return codes
        if suffix in ("weight_scale", "input_scale"):
            return (
                self.wide(name, (1,) if self.tensors[name].shape else ()) if name in self.tensors else self.array(name)
            )
        return super().linear(module, suffix)


class Packed(GroupedFolder, _WithCache):
    """int4 in groups or int8 per row, packed in words or, for int8, as they are."""

    suffixes = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")

    def __init__(
        self, path: Path, raw: Mapping[str, Any], tensors: Mapping[str, TensorInfo], settings: Settings
    ) -> None:
        weights = _first_group(settings)[0]
        group = int(weights.get("group_size") or -1) if weights.get("strategy") != "channel" else -1
        if weights.get("strategy") not in ("group", "channel"):
            raise PlanError(f"{path}: its int weights have one scale per {weights.get('strategy')}", hint=START_ANEW)
        super().__init__(path, raw, tensors, bits=int(weights["num_bits"]), group=group)
        assert self.scheme is not None
        self.scheme = Scheme(self.scheme.weights, self.scheme.group_size, self.scheme.scales, _kv(path, settings))
        self._words = settings["format"] == "pack-quantized"
        self._in_word = 32 // self.bits
        _refuse_ignored(self, settings)
        self.check_names()
        for module in sorted(self.linears):
            self._check_matrix(module, symmetric=weights.get("symmetric", True))
        self.check_cache()

    def _check_matrix(self, module: str, *, symmetric: bool) -> None:
        rows, columns = self.shape(module)
        count, size = self.groups(module)
        if self._words:
            self.array(f"{module}.weight_packed", ("I32",), (rows, columns // self._in_word))
        else:
            self.array(f"{module}.weight", ("I8",), (rows, columns))
        self.array(f"{module}.weight_scale", ("F16", "BF16", "F32"), (rows, count))
        if not symmetric:
            shape, dtype = ((rows // self._in_word, count), "I32") if self._words else ((rows, count), "I8")
            self.array(f"{module}.weight_zero_point", (dtype,), shape)
        self.check_order(f"{module}.weight_g_idx", ("I32", "I64"), columns, size)

    def codes(self, module: str, columns: slice) -> Codes:
        if not self._words:
            return self.array(f"{module}.weight")[:, columns].view(np.uint8).T ^ np.uint8(128)
        words = self.array(f"{module}.weight_packed")[:, columns.start // self._in_word : columns.stop // self._in_word]
        return self.unpack(words).reshape(len(words), -1).T

    def zeros(self, module: str) -> Codes:
        rows, count = self.shape(module)[0], self.groups(module)[0]
        name = f"{module}.weight_zero_point"
        if name not in self.tensors:
            return np.full((count, rows), self.middle, np.uint8)
        if not self._words:
            return self.array(name).view(np.uint8).T ^ np.uint8(128)
        return self.unpack(self.array(name).T).reshape(count, rows)

    def scales(self, module: str) -> npt.NDArray[np.float32]:
        return self.wide(f"{module}.weight_scale").T

    def linear(self, module: str, suffix: str) -> Array:
        if suffix in ("k_scale", "v_scale"):
            return _WithCache.linear(self, module, suffix)
        return GroupedFolder.linear(self, module, suffix)
