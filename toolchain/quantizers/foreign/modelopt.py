"""NVIDIA ModelOpt's unified layout where a folder deviates from what ``Checkpoint`` reads as it is.

Published folders may state their quantization in ``config.json`` only, without ``hf_quant_config.json``, or without the
group size, and may have scalars of shape [1] instead of []. The tensors are the same, so they are copied.

Source: modelopt/torch/export/convert_hf_config.py and unified_export_hf.py, nvidia-modelopt 0.47.0 (2026-11).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from toolchain import family
from toolchain.checkpoint import TensorInfo, read_json
from toolchain.errors import PlanError
from toolchain.quantization import weights_of
from toolchain.quantizers.foreign.folder import FLOATS, KEPT_GROUPS, START_ANEW, Folder
from toolchain.quantizers.layout import HF_QUANT_CONFIG, Scheme
from toolchain.safetensors_file import Bytes, TensorPlan

NAME = "modelopt"
_SUFFIXES = ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "k_scale", "v_scale")


def stated(path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """What the folder says of its quantization: the keys of ``hf_quant_config.json``, wherever they stand."""
    if (path / HF_QUANT_CONFIG).exists():
        document = read_json(path / HF_QUANT_CONFIG)
        return {**(document.get("quantization") or {}), "producer": document.get("producer") or {}}
    settings = raw.get("quantization_config") or {}
    cache = settings.get("kv_cache_scheme") or {}
    groups = (settings.get("config_groups") or {}).values()
    sizes = [one["weights"].get("group_size") for one in groups if isinstance(one, dict) and one.get("weights")]
    return {
        "quant_algo": settings.get("quant_algo"),
        "kv_cache_quant_algo": f"{cache['type']}{cache['num_bits']}".replace("float8", "FP8") if cache else None,
        "group_size": next(iter(sizes), None),
        "exclude_modules": settings.get("ignore") or [],
        "producer": settings.get("producer") or {},
    }


def facts(path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """What can be said of the folder."""
    found = stated(path, raw)
    scheme, algo = weights_of(found.get("quant_algo")), found.get("quant_algo")
    group = found.get("group_size") if scheme and scheme.group_sizes else None
    kv = "fp8" if found.get("kv_cache_quant_algo") == "FP8" else "fp16"
    title = f"{algo} in NVIDIA ModelOpt's unified layout" + f", groups of {group}" * bool(group)
    producer = found["producer"]
    return {
        "format": NAME,
        "producer": f"{producer.get('name', '')} {producer.get('version', '')}".strip(),
        "title": title + ", fp8 cache" * (kv == "fp8"),
        "weights": scheme.name if scheme else None,
        "group_size": group,
        "zero_points": bool(found.get("has_zero_point")),
        "kv": kv,
    }


def refuse_unread(path: Path, raw: Mapping[str, Any]) -> None:
    """PlanError for an algorithm, a cache or an excluded matrix that the layout cannot express for us."""
    found = stated(path, raw)
    algo, cache = found.get("quant_algo"), found.get("kv_cache_quant_algo")
    if weights_of(algo) is None or found.get("has_zero_point"):
        raise PlanError(
            f"{path}: quantized as {algo}{' with zero points' * bool(found.get('has_zero_point'))}, which "
            "scalellm does not read",
            hint=START_ANEW,
        )
    if cache not in (None, "FP8"):
        raise PlanError(f"{path}: its cache is {cache}; read are FP8 and none", hint=START_ANEW)
    patterns = [str(pattern) for pattern in found.get("exclude_modules") or ()]
    names = {family.linear_name(0, linear) for linear in family.LINEARS}
    for pattern in patterns:
        inside = pattern.startswith("model.layers.") and not pattern.endswith(("norm", "norm*"))
        if inside or any(fnmatchcase(name, pattern) for name in names):
            raise PlanError(
                f"{path}: leaves {pattern!r} unquantized (exclude_modules), and scalellm reads folders in which all "
                "matrices of the decoder layers have one scheme",
                hint=START_ANEW,
            )


class ModelOpt(Folder):
    """One such folder, its headers checked."""

    suffixes = _SUFFIXES

    def __init__(self, path: Path, raw: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
        refuse_unread(path, raw)
        super().__init__(path, raw, tensors)
        found = stated(path, raw)
        scheme = weights_of(found.get("quant_algo"))
        assert scheme is not None
        if scheme.quant_algo is not None:
            smoothed = any(name.endswith(".pre_quant_scale") for name in self.tensors)
            self.scheme = Scheme(
                scheme.name,
                (found.get("group_size") or self._group()) if scheme.group_sizes else KEPT_GROUPS[0],
                "modelopt",
                "fp8" if found.get("kv_cache_quant_algo") == "FP8" else "fp16",
                method="awq" if smoothed else "rtn",
                fp8_scales="separate",
                calibrated=any(name.endswith(".input_scale") for name in self.tensors),
            )
        self.check_names()
        for unit in self.units():
            for plan in unit.tensors:
                self.array(plan.name, FLOATS if plan.dtype in FLOATS else (plan.dtype,), self._stored(plan))

    def _group(self) -> int:
        """The group size by the shapes of the first matrix."""
        name = family.linear_name(0, family.LINEARS[0])
        scales = self.array(f"{name}.weight_scale")
        columns = family.linear_shape(self.config, family.LINEARS[0])[1]
        return columns // scales.shape[-1] if scales.ndim == 2 and scales.shape[-1] else 0

    def _stored(self, plan: TensorPlan) -> tuple[int, ...]:
        info = self.tensors.get(plan.name)
        return info.shape if info is not None and not plan.shape and math.prod(info.shape) == 1 else plan.shape

    def read(self, plan: TensorPlan) -> Iterator[Bytes]:
        """A tensor as it is; a scalar that is stored in 16 bits is widened."""
        stored = self.tensors[plan.name].dtype
        if plan.dtype == "F32" and stored != "F32":
            yield self.wide(plan.name).reshape(-1).view("u1")
        elif plan.dtype in FLOATS:
            yield from self.pieces(TensorPlan(plan.name, plan.dtype, self._stored(plan)))
        else:
            yield self.store.bytes_of(plan.name)
            self.store.release(plan.name)
