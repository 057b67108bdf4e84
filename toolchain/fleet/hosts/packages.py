"""A repository on its way from the head to the nodes: packed by content, fetched by its digest, in a registry's layout.

The head's word names the digest, so that the registry itself, a folder or any address that fsspec opens, need not be
trusted. It knows neither the board nor how an engine is built.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from toolchain import workspace
from toolchain.errors import ArtifactError
from toolchain.progress import Progress
from toolchain.registry import FileEntry, Folder, Manifest, Reference, check_out, open_store, pull, push, transfer
from toolchain.registry.names import check_path

PACKAGES, REGISTRY = "packages", "registry"
"""Keys of a version on the board: which package is for which device, and where the packages lie."""


def offer(repository: Path, name: str, device: str, shelf: Folder, registry: str, progress: Progress) -> dict[str, str]:
    """Put a repository of this machine into a registry. -> one of a version's packages. Raises ScalellmError.

    ``shelf``: a folder of this machine in which files are linked rather than copied.
    """
    stamp = workspace.require(repository, "repository")
    files = {f"repository/{path}": FileEntry(one.size, one.sha256) for path, one in stamp.files.items()}
    paper = repository / workspace.STAMP
    files[f"repository/{workspace.STAMP}"] = FileEntry(paper.stat().st_size, workspace.sha256_of(paper))
    for path, entry in files.items():
        check_path(path, str(repository))
        shelf.adopt(transfer.blob_path(entry.sha256), repository / path.removeprefix("repository/"))
    manifest = Manifest(name, files, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    push(manifest, shelf, open_store(registry), progress)
    return {"device": device, "package": f"{name}@{manifest.digest}"}


def choose(version: Mapping[str, Any], device: str) -> str:
    """The package of a version for a device. Raises ArtifactError where there is none."""
    packages: Sequence[Mapping[str, str]] = version.get(PACKAGES, ())
    for one in packages:
        if one["device"] == device:
            return one["package"]
    there = ", ".join(sorted({one["device"] for one in packages})) or "none"
    raise ArtifactError(
        f"the endpoint has no engine for {device or 'this machine'}; there are: {there}",
        hint="build one for this machine: scalellm deploy join TOKEN --recipe RECIPE",
    )


def fetch(package: str, registry: str, folder: Path, progress: Progress, *, check: Callable[[Manifest], None]) -> Path:
    """The repository of a package, every byte of it hashed; what has been fetched before is not fetched again.

    ``check`` may refuse it before anything is fetched. Raises ScalellmError.
    """
    reference = Reference.parse(package)
    place = folder / "fetched" / reference.digest
    if not place.is_dir():
        shelf = Folder(folder / "registry")
        manifest = pull(reference, open_store(registry), shelf, progress, check=check).manifest
        place.parent.mkdir(parents=True, exist_ok=True)
        check_out(manifest, shelf, place)
    return place / "repository"
