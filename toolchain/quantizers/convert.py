"""One unit of a quantized checkpoint after the other: copied, or calibrated, quantized and written.

Ties the arithmetic (``layer``, ``smoothing``), the observation (``calibration``) and the files (``shards``) together.
What it returns for each unit goes into the journal, and from there into the report. It knows no recipe and no stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from toolchain import family
from toolchain.quantizers import layout
from toolchain.quantizers.calibration import Calibration
from toolchain.quantizers.layer import Findings, quantize_layer, restore
from toolchain.quantizers.layout import Scheme
from toolchain.quantizers.rows import Workers
from toolchain.quantizers.shards import ShardWriter, Unit
from toolchain.quantizers.smoothing import smooth
from toolchain.quantizers.source import Source, as_bytes


class Converter:
    """Writes units into ``writer``; ``advance`` gets the bytes of the model as they are done."""

    def __init__(
        self,
        source: Source,
        scheme: Scheme,
        writer: ShardWriter,
        workers: Workers,
        advance: Callable[[int], None],
        calibration: Calibration | None = None,
    ) -> None:
        self._source = source
        self._scheme = scheme
        self._writer = writer
        self._workers = workers
        self._advance = advance
        self._calibration = calibration

    def write(self, unit: Unit) -> dict[str, Any]:
        """Write all of a unit and close it. -> what the journal gets beside the place in the file.

        ``errors`` (matrix -> relative error) and, where calibrated, the sha256 of the hidden states behind the unit and
        ``calibration`` (``summary``). ArtifactError for NaN or infinity anywhere.
        """
        layer = layout.layer_of(unit.name)
        if layer is None:
            entry: dict[str, Any] = {"errors": {}}
            if self._calibration:
                entry |= self._calibration.embed() if unit.name == layout.EMBEDDINGS else self._calibration.passed()
            self._copy(unit, {})
        elif self._calibration:
            entry = self._calibrated_layer(unit, layer, self._calibration)
        else:
            entry = {"errors": self._layer(unit, layer, None, lambda _linear, _tensors: None)}
        self._writer.end_unit(**entry)
        return entry

    def _calibrated_layer(self, unit: Unit, layer: int, calibration: Calibration) -> dict[str, Any]:
        scheme = self._scheme
        clean = scheme.propagate == "clean"
        seen, entry = calibration.observe(layer, rows=scheme.smoothed, hessian=scheme.gptq, store=clean)
        smoothing = smooth(self._source, layer, scheme, seen, self._workers) if scheme.smoothed else {}
        findings = Findings(seen, smoothing)
        quantized: dict[str, torch.Tensor] = {}

        def keep(linear: str, tensors: dict[str, torch.Tensor]) -> None:
            if not clean:
                quantized[f"{linear}.weight"] = calibration.narrow(restore(tensors))

        errors = self._layer(unit, layer, findings, keep)
        if not clean:
            kept = family.kept_tensors(self._source.checkpoint.config)
            plain = {name: self._source.weight(f"model.layers.{layer}.{name}") for name in kept}
            entry = calibration.advance(layer, quantized | plain | folded_norms(findings))
        return {"errors": errors, "calibration": summary(layer, findings), **entry}

    def _layer(
        self,
        unit: Unit,
        layer: int,
        findings: Findings | None,
        keep: Callable[[str, dict[str, torch.Tensor]], None],
    ) -> dict[str, float]:
        folded = folded_norms(findings) if findings else {}
        self._copy(unit, {f"model.layers.{layer}.{name}": tensor for name, tensor in folded.items()})
        errors = {}
        for matrix in quantize_layer(self._source, layer, self._scheme, self._workers, findings):
            for suffix, tensor in matrix.tensors.items():
                self._writer.put(f"{matrix.name}.{suffix}", as_bytes(tensor))
            keep(matrix.name.removeprefix(f"model.layers.{layer}."), matrix.tensors)
            errors[matrix.name] = matrix.error.relative
            self._advance(matrix.source_bytes)
        amaxes = (findings.statistics.k_amax, findings.statistics.v_amax) if findings else None
        scales = layout.kv_scales(self._scheme, amaxes)
        for plan, scale in zip(layout.kv_tensors(layer, self._scheme.kv), scales, strict=False):
            self._writer.put(plan.name, as_bytes(torch.tensor(scale, dtype=torch.float32)))
        return errors

    def _copy(self, unit: Unit, instead: dict[str, torch.Tensor]) -> None:
        """What keeps the model's bytes, but for those that calibration gave other values."""
        for name in layout.copied_names(unit, self._source.checkpoint.config):
            if name in instead:
                self._writer.put(name, as_bytes(instead[name]))
                self._advance(instead[name].nbytes)
                continue
            for piece in self._source.pieces(name):
                self._writer.put(name, piece)
                self._advance(piece.nbytes)


def folded_norms(findings: Findings) -> dict[str, torch.Tensor]:
    """By name within the layer, the norms that took smoothing scales in."""
    return dict(one.norm for one in findings.smoothing.values() if one.norm)


def summary(layer: int, findings: Findings) -> dict[str, Any]:
    """What the report says of a layer: ``k_amax``, ``v_amax`` and, by group, the input's range and what smoothing it
    brought."""
    groups: dict[str, dict[str, Any]] = {}
    for name, seen in findings.statistics.inputs.items():
        groups[name] = {"amax": seen.amax, "outlier_channels": seen.outliers}
        if name in findings.smoothing:
            one = findings.smoothing[name]
            errors = {"output_error_before": one.error_before, "output_error_after": one.error_after}
            groups[name] |= {"alpha": one.alpha, **errors}
    seen_kv = {"k_amax": findings.statistics.k_amax, "v_amax": findings.statistics.v_amax}
    return {"layer": layer, **seen_kv, "groups": groups}
