"""What was found, as rows for people and as plain JSON for programs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain import workspace
from toolchain.units import format_bytes
from toolchain.workspace import Stamp


@dataclass(frozen=True)
class Sheet:
    """One artifact."""

    kind: str
    """``"engine"``, ``"repository"`` or ``"trtllm-checkpoint"``."""
    path: Path
    rows: tuple[tuple[str, str], ...]
    """(what, said of it), for people."""
    warnings: tuple[str, ...]
    next: str
    """What to type."""
    facts: dict[str, Any]
    """The same and more, for programs."""

    def to_json(self) -> dict[str, Any]:
        known = {"kind": self.kind, "path": str(self.path), "warnings": list(self.warnings), "next": self.next}
        return {**known, **self.facts}


def sheet(
    kind: str,
    path: Path,
    rows: Iterable[tuple[str, str]],
    *,
    stamp: Stamp | None,
    warnings: Iterable[str],
    next: str,
    facts: dict[str, Any],
) -> Sheet:
    """A sheet with what every artifact has: its files, its stamp, and whether they agree. Empty rows are left out."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    nbytes = sum(file.stat().st_size for file in files)
    wrong = workspace.damage(path, stamp) if stamp else None
    said = f"made {stamp.created}, {'damaged' if wrong else 'intact'}" if stamp else "none of scalellm's"
    common = [("files", f"{len(files)}, {format_bytes(nbytes)}"), ("stamp", said)]
    known = {"files": len(files), "nbytes": nbytes, "key": stamp.key if stamp else None, "intact": stamp and not wrong}
    return Sheet(
        kind,
        path,
        tuple((name, text) for name, text in (*rows, *common) if text),
        (*([wrong] if wrong else []), *warnings),
        next,
        {**facts, **known},
    )
