"""The document ``quantization_report.json``: how far the weights moved, and what calibration saw.

It measures nothing itself: every number comes from the journal. ``report_html`` makes a page of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from toolchain.quantization import WEIGHTS
from toolchain.quantizers.layout import Scheme

if TYPE_CHECKING:
    from toolchain.quantizers.samples import Samples

REPORT = "quantization_report.json"
_WORST = 10


def document(scheme: Scheme, entries: Sequence[Mapping[str, Any]], samples: Samples | None) -> dict[str, Any]:
    """The journal's entries of all units, in order -> the report, as plain JSON.

    ``relative_error``: ||W' - W|| / ||W|| of each matrix, W' being what the stored codes and scales stand for, with the
    scaling of input channels taken back: the figures of all formats compare. ``calibration.layers``: see
    ``convert.summary``.
    """
    errors = {name: error for entry in entries for name, error in entry.get("errors", {}).items()}
    worst = sorted(errors, key=lambda name: errors[name], reverse=True)[:_WORST]
    found = {"weights": scheme.weights, **_how(scheme), "worst": worst, "relative_error": errors}
    if samples:
        count, tokens = samples.token_ids.shape
        data = {"data": samples.source, "digest": samples.digest, "samples": count, "tokens": tokens}
        layers = [entry["calibration"] for entry in entries if "calibration" in entry]
        found["calibration"] = {**data, "propagate": scheme.propagate, "layers": layers}
    return found


def _how(scheme: Scheme) -> dict[str, Any]:
    """The words of the scheme that had a say; the choices that need calibration only where there was one."""
    if scheme.weights == "int8_sq":
        return {"smoothquant_alpha": scheme.smoothquant_alpha}
    if WEIGHTS[scheme.weights].group_sizes:
        plain = {"group_size": scheme.group_size, "scales": scheme.scales}
        method = "awq" if scheme.awq else scheme.method
        return plain | ({"method": method, "clip": scheme.clip} if scheme.calibrated else {})
    return {"fp8_scales": "separate"} if (scheme.weights, scheme.fp8_scales) == ("fp8", "separate") else {}
