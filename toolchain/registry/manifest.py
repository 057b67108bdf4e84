"""The manifest of a package: every file with its size and sha256, and the digest that stands for all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from toolchain import workspace
from toolchain.errors import ArtifactError
from toolchain.registry.names import check_name, check_path, check_sha256

FORMAT = "scalellm-package/1"
MAX_BYTES = 16 * 2**20
"""Of a manifest: a package has some hundred files."""
MAX_FILE_BYTES = 2**44


@dataclass(frozen=True)
class FileEntry:
    """One file of a package."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The files of one package, by their path in it."""

    name: str
    files: Mapping[str, FileEntry]
    created: str
    """UTC, ``"2026-11-22T18:00:00Z"``; no part of the digest, so that the same files always have the same one."""

    @property
    def digest(self) -> str:
        """sha256 (hex) over the paths, sizes and hashes of all files."""
        return workspace.key_of({path: [entry.size, entry.sha256] for path, entry in self.files.items()})

    @property
    def total_bytes(self) -> int:
        """Of all files."""
        return sum(entry.size for entry in self.files.values())

    @property
    def blobs(self) -> dict[str, tuple[str, int]]:
        """sha256 -> (the first path with these bytes, size): what has to be moved, each once."""
        found: dict[str, tuple[str, int]] = {}
        for path, entry in sorted(self.files.items()):
            found.setdefault(entry.sha256, (path, entry.size))
        return found

    def to_json(self) -> str:
        files = {path: asdict(entry) for path, entry in sorted(self.files.items())}
        document = {"format": FORMAT, "name": self.name, "digest": self.digest, "created": self.created, "files": files}
        return json.dumps(document, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: bytes, where: str, *, name: str, digest: str) -> Manifest:
        """The manifest of the package ``digest`` of the model ``name``, every word of it checked.

        Raises ArtifactError for one that is damaged, names a file that no package holds, or is of another package.
        """
        try:
            raw = json.loads(text)
            if raw["format"] != FORMAT:
                raise ArtifactError(f"{where}: its format is {str(raw['format'])[:40]!r}, and {FORMAT!r} is known here")
            manifest = cls(check_name(raw["name"]), _files(raw["files"], where), str(raw["created"])[:40])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ArtifactError(f"{where}: this manifest is damaged: {type(error).__name__} {error}") from error
        if manifest.name != name or manifest.digest != digest:
            raise ArtifactError(
                f"{where}: this manifest is of another package: {manifest.name}@{manifest.digest[:12]}, and "
                f"{name}@{digest[:12]} is meant"
            )
        return manifest


def _files(raw: Mapping[str, Any], where: str) -> dict[str, FileEntry]:
    files = {}
    for path, entry in raw.items():
        size = entry["size"]
        if type(size) is not int or not 0 <= size <= MAX_FILE_BYTES:
            raise ArtifactError(f"{where}: {str(path)[:120]!r} has no size")
        files[check_path(path, where)] = FileEntry(size, check_sha256(entry["sha256"], where))
    folders = {path.rpartition("/")[0] for path in files}
    folders |= {"/".join(folder.split("/")[:n]) for folder in folders for n in range(1, folder.count("/") + 1)}
    if both := sorted(folders & files.keys()):
        raise ArtifactError(f"{where}: {both[0]} is a file and a folder: refused")
    sizes: dict[str, int] = {}
    for path, one in files.items():
        if sizes.setdefault(one.sha256, one.size) != one.size:
            raise ArtifactError(f"{where}: {path} has the sha256 of a file of another size")
    return files
