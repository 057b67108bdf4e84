"""A deployment as other systems read it: SkyServe's service, Kubernetes' manifests, a compose file with dashboards.

Each format is a function, ``Wanted -> {path in the folder: text}``; nothing is written before all of it is made. What
runs there is what ``wanted`` says: packages of a registry, by their digests, in the image of their release. None of it
holds a secret. No cluster, cloud or container engine is asked: the texts are checked by the readers of those systems in
the tests, and nobody has run them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from toolchain import workspace
from toolchain.errors import ArtifactError
from toolchain.exports.wanted import Wanted

Files = dict[str, str]
"""Path in the folder -> text."""


def _skyserve(wanted: Wanted) -> Files:
    from toolchain.exports import skyserve

    return skyserve.files(wanted)


def _kubernetes(wanted: Wanted) -> Files:
    from toolchain.exports import kubernetes

    return kubernetes.files(wanted)


def _compose(wanted: Wanted) -> Files:
    from toolchain.exports import compose

    return compose.files(wanted)


FORMATS: Mapping[str, Callable[[Wanted], Files]] = {
    "skyserve": _skyserve,
    "kubernetes": _kubernetes,
    "compose": _compose,
}


def write(files: Files, folder: Path, *, force: bool = False) -> None:
    """Put the files into a folder, each whole or not at all; other files there stay, such as secrets.

    Raises ArtifactError, before anything is written, for a file that is there and says something else: somebody may
    have changed it. ``force`` writes over it.
    """
    with workspace.disk_errors(folder):
        changed = [name for name, text in files.items() if _differs(folder / name, text)]
        if changed and not force:
            raise ArtifactError(
                f"{folder}: {', '.join(changed)} would be another text than the one that is there",
                hint="--force writes over it; or name another folder",
            )
        for name, text in files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            workspace.write_durably(target, text.encode())


def _differs(file: Path, text: str) -> bool:
    return file.exists() and (not file.is_file() or file.read_bytes() != text.encode())
