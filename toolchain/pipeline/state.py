"""What an artifact of a job is now: there or not, fresh or stale, and why; and what a run did to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain import workspace
from toolchain.errors import ArtifactError

NAMES = ("checkpoint", "trtllm-checkpoint", "engine", "repository")
"""The artifacts, in order; the second is of the backend tensorrt_engine alone."""

STAGE_OF = {"checkpoint": "quantize", "trtllm-checkpoint": "convert", "engine": "build", "repository": "package"}


@dataclass(frozen=True)
class State:
    """One artifact as it is now: whether it can be used, and if not, why."""

    name: str
    folder: Path
    fresh: bool
    reasons: tuple[str, ...]
    """``("there is none yet",)``, ``("kv was int8, is fp8",)``, ``("... is truncated",)`` or, when fresh, empty."""

    @property
    def kind(self) -> str:
        """One of ``NAMES``: the name without the ``draft/`` of a draft model's artifact."""
        return self.name.rpartition("/")[2]

    @property
    def stage(self) -> str:
        """The verb; of a draft model's artifact ``"draft build"``."""
        return " ".join(filter(None, (self.name.rpartition("/")[0], STAGE_OF[self.kind])))


@dataclass(frozen=True)
class Result:
    """One artifact after a run: what was done to it and how long that took."""

    state: State
    action: str
    """``"kept"`` or ``"made"``."""
    seconds: float
    key: str


def state_of(name: str, folder: Path, inputs: Mapping[str, Any]) -> State:
    """The artifact ``name`` in ``folder``, which is fresh if it was made from the same ``inputs`` and is intact."""
    try:
        stamp = workspace.current(folder)
    except ArtifactError as error:
        return State(name, folder, False, (error.message,))
    if stamp is None:
        return State(name, folder, False, ("there is none yet",))
    if stamp.key != workspace.key_of(inputs):
        return State(name, folder, False, tuple(_readable(workspace.differences(stamp.inputs, inputs))))
    wrong = workspace.damage(folder, stamp)
    return State(name, folder, wrong is None, (wrong,) if wrong else ())


def stamped_rows(folder: Path, calibration: Mapping[str, Any]) -> str | None:
    """The digest of the rows that the checkpoint in ``folder`` was calibrated on, if that was asked for so."""
    try:
        stamp = workspace.current(folder)
    except ArtifactError:
        return None
    known = dict((stamp.inputs.get("calibration") or {}) if stamp else {})
    digest = known.pop("digest", None)
    return str(digest) if digest and known == calibration else None


_HASHES = {
    "model": "the model's files changed",
    "checkpoint": "its checkpoint changed",
    "engine": "its engine changed",
    "draft": "its draft changed",
    "templates": "the templates changed",
    "calibration.digest": "the text that it is calibrated on changed",
}


def _readable(differences: Iterable[str]) -> list[str]:
    """Hashes mean nothing to a person: say which input changed instead of from what to what."""
    return [_HASHES.get(line.split(" was ")[0], line) for line in differences]
