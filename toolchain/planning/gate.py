"""Whether an engine's answers must be compared with the checkpoint's before it serves, and why. Pure.

``required``: the engine is known to build, start and pass a short test while its answers are wrong; nobody is to be
served by it before it was verified. ``advised``: it often loses quality. What a verdict is and where it lies is in
``accuracy``.
"""

from __future__ import annotations

from typing import Literal, Protocol

from toolchain.device import Device
from toolchain.planning.decisions import Notes
from toolchain.quantization import KvScheme, WeightScheme
from toolchain.release import Release

Gate = Literal["required", "advised"]


class Judged(Protocol):
    """The part of a plan that decides."""

    @property
    def release(self) -> Release | None: ...

    @property
    def backend(self) -> str: ...

    @property
    def device(self) -> Device: ...

    @property
    def weights(self) -> WeightScheme: ...


def choose_gate(
    weights: WeightScheme, kv: KvScheme, target: Device, backend: str, release: Release | None, notes: Notes
) -> Gate | None:
    """The gate of an engine, noted with its reason; None where nothing is known against it."""
    rebuild = release.rebuild_for(backend, target.sm, weights.name) if release else None
    if rebuild:
        reason = f"{weights.name} kernels of SM {target.sm} are wrong in released wheels, and a short test passes"
        notes.decide("gate", "required", reason, rebuild.why)
        return "required"
    if backend == "tensorrt_engine" and kv.name == "int8":
        reason = "an INT8 cache is a common cause of bad text; compare the engine's answers with the checkpoint's"
        notes.decide("gate", "advised", reason, "TensorRT-LLM issues 967, 453, 1303")
        return "advised"
    return None


def only_running_tells(plan: Judged) -> bool:
    """Whether the engine's own kernels are what is doubted: its checkpoint says nothing of them."""
    release = plan.release
    return bool(release and release.rebuild_for(plan.backend, plan.device.sm, plan.weights.name))
