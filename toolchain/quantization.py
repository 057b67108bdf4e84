"""The table of quantizations: what each is called on disk, how many bits it takes, what it needs of a device and text.

Read from ``facts/quantizations.yaml``. It does not know any device or backend: ``plan`` joins the two sides.
"""

from __future__ import annotations

from dataclasses import dataclass

from toolchain import workspace


@dataclass(frozen=True)
class WeightScheme:
    """How the seven linear layers of a decoder layer are stored. Embeddings, norms and head keep the model's dtype."""

    name: str
    quant_algo: str | None
    """The name in ``hf_quant_config.json``; None where nothing is quantized."""
    bits: int
    needs: frozenset[str]
    """Tensor-core dtypes that the device must have."""
    group_sizes: tuple[int, ...]
    """Legal group sizes along the input axis, best first; empty where scales are not per group."""
    summary: str
    source: str
    calibration: str = ""
    """What a backend with static scales (TensorRT-LLM) needs measured; empty where nothing."""
    calibrated_always: bool = False
    """Whether the weights depend on that, so that every backend needs it."""
    scale: str = ""
    """What shares one scale of the weights: ``"matrix"``, ``"row"`` or ``"group"``; empty where there is none."""
    activations: str = ""
    """The 8-bit format that a TensorRT-LLM engine rounds the linears' inputs to; empty where they keep 16 bits."""

    def scale_bytes(self, out_features: int, in_features: int, group_size: int) -> int:
        """Bytes of the weights' fp32 scales for one matrix [out, in]: one per group, row or matrix.

        Group-wise weights with 8-bit activations have one more for the whole matrix (``weight_scale_2``).
        """
        if self.scale == "group":
            groups = out_features * (in_features // group_size)
            return (groups + bool(self.activations)) * 4
        return {"": 0, "matrix": 1, "row": out_features}[self.scale] * 4

    def in_recipe(self, group_size: int) -> str:
        """What a recipe says of such weights: ``"quantization: {weights: int4, group_size: 64}"``."""
        group = f", group_size: {group_size}" if self.group_sizes else ""
        return f"quantization: {{weights: {self.name}{group}}}"


@dataclass(frozen=True)
class KvScheme:
    """How keys and values are kept between steps."""

    name: str
    quant_algo: str | None
    bytes_per_element: int
    needs: frozenset[str]
    summary: str
    source: str
    calibration: str = ""
    """As of ``WeightScheme``."""


@dataclass(frozen=True)
class Method:
    """How int4 weights are rounded."""

    name: str
    summary: str
    source: str
    calibration: str = ""
    """What it needs measured, whatever the backend; empty where nothing."""


def _weights() -> dict[str, WeightScheme]:
    rows = workspace.facts("quantizations")["weights"]
    return {
        name: WeightScheme(
            name=name,
            quant_algo=row["quant_algo"],
            bits=row["bits"],
            needs=frozenset(row["needs"]),
            group_sizes=tuple(row["group_sizes"]),
            summary=row["summary"],
            source=row["source"],
            calibration=row.get("calibration", ""),
            calibrated_always=row.get("calibrated") == "always",
            scale=row.get("scale", ""),
            activations=row.get("activations", ""),
        )
        for name, row in rows.items()
    }


def _kv() -> dict[str, KvScheme]:
    rows = workspace.facts("quantizations")["kv"]
    return {
        name: KvScheme(
            name=name,
            quant_algo=row["quant_algo"],
            bytes_per_element=row["bytes_per_element"],
            needs=frozenset(row["needs"]),
            summary=row["summary"],
            source=row["source"],
            calibration=row.get("calibration", ""),
        )
        for name, row in rows.items()
    }


def _methods() -> dict[str, Method]:
    rows = workspace.facts("quantizations")["methods"]
    return {
        name: Method(name=name, **{key: row[key] for key in ("summary", "source", "calibration") if key in row})
        for name, row in rows.items()
    }


WEIGHTS: dict[str, WeightScheme] = _weights()
KV: dict[str, KvScheme] = _kv()
METHODS: dict[str, Method] = _methods()


def weights_of(quant_algo: str | None) -> WeightScheme | None:
    """The scheme that a checkpoint's ``quant_algo`` names, or None when it is not one of ours."""
    return next((scheme for scheme in WEIGHTS.values() if scheme.quant_algo == quant_algo), None)
