"""The verdict on an engine's answers: a small file beside the engine, ``accuracy-DIGEST.json``.

An engine's folder is stamped and never changes, and a repository links to its files; so what is found out later lies
beside them, under the hash of the engine's own files: it is true of exactly those, wherever they are copied to, and a
rebuilt engine has none. It holds its own hash, so that an edited verdict is told from a written one. How an engine is
verified it does not know: whoever does calls ``write_verdict``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from toolchain import __version__, workspace
from toolchain.checkpoint import read_json
from toolchain.errors import ArtifactError
from toolchain.workspace import FileRecord

_DIGITS = 12
"""Of the digest in the file's name."""


@dataclass(frozen=True)
class Verdict:
    """What was found."""

    passed: bool
    engine: str
    """``digest_of`` the engine's files."""
    summary: str
    """One line for people: what was compared and what came of it."""
    measured: dict[str, Any] = field(default_factory=dict)
    """Plain JSON: numbers and thresholds."""
    made: str = ""
    """UTC, ``"2026-11-22T18:00:00Z"``."""
    scalellm: str = __version__


def digest_of(files: Mapping[str, FileRecord], within: str = "") -> str:
    """The hash of an engine: of the names and hashes of its files; ``within``: the folder that they are in.

    The same for the engine's own stamp and for a repository's, where they lie in ``tensorrt_llm/1/engine/``.
    """
    own = {name.removeprefix(within): one.sha256 for name, one in files.items() if name.startswith(within)}
    return workspace.key_of(own)


def file_of(folder: Path, digest: str) -> Path:
    """Where the verdict on an engine lies; ``folder`` is the engine's, or the repository's."""
    return folder.absolute().parent / f"accuracy-{digest[:_DIGITS]}.json"


def read_verdict(folder: Path, digest: str) -> Verdict | None:
    """The verdict beside ``folder`` on the engine with that hash; None where nobody has verified it.

    Raises ArtifactError for a file that was changed, or is of another engine.
    """
    file = file_of(folder, digest)
    if not file.exists():
        return None
    raw = read_json(file)
    seal = raw.pop("seal", None)
    try:
        verdict = Verdict(**raw)
    except TypeError as error:
        raise ArtifactError(f"{file}: not a verdict of this scalellm: {error}", hint=f"rm {file}") from error
    if seal != workspace.key_of(raw) or verdict.engine != digest:
        raise ArtifactError(f"{file}: this verdict was changed, or is of another engine", hint=f"rm {file}")
    return verdict


def write_verdict(
    folder: Path, digest: str, *, passed: bool, summary: str, measured: Mapping[str, Any] | None = None
) -> Verdict:
    """Write the verdict beside ``folder``, in place of an older one."""
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    verdict = Verdict(passed, digest, summary, dict(measured or {}), made)
    raw = asdict(verdict)
    text = json.dumps({**raw, "seal": workspace.key_of(raw)}, indent=2, sort_keys=True) + "\n"
    workspace.write_durably(file_of(folder, digest), text.encode())
    return verdict
