"""A model's package: its repository, card, passport and verdict, by content; and what has become of each model.

What failed or was never verified, though its plan or its recipe asks for that, is not packed; with ``allow_unverified``
it is, and the package's passport says so. A package that comes from elsewhere brings no code: its Python files are
those that this scalellm has itself, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toolchain import accuracy, workspace
from toolchain.admission import ENGINE, Admission, Asked, check_verified, passport_of, recipe_changes
from toolchain.checkpoint import read_json
from toolchain.errors import ArtifactError, RejectedError, ScalellmError
from toolchain.recipe import parse_recipe
from toolchain.registry import card as cards
from toolchain.registry import deployment, transfer
from toolchain.registry.card import Card
from toolchain.registry.manifest import FileEntry, Manifest
from toolchain.registry.names import check_path
from toolchain.registry.stores import Folder

PASSPORT = "passport.json"
"""Of the package: the engine's passport, the verdict on it, and why it was packed without a good one."""


@dataclass(frozen=True)
class Standing:
    """What has become of a model."""

    name: str
    model: str
    recipe: str
    """The file."""
    device: str
    state: str
    """``created``, ``built``, ``packaged``, ``verified`` or ``deployed``: the furthest."""
    built: bool
    packaged: bool
    verified: bool | None
    """None where nobody has looked."""
    pulled: bool
    size: int | None
    """Bytes of the package, else of the repository."""
    digest: str
    """Of the package; empty without one."""
    date: str
    """Of the package, else of the repository, else of the card."""
    deployed: deployment.Deployment | None
    problem: str = ""
    """Why the rest is not known: a card or a recipe that cannot be read."""


def pack(card: Card, registry: Folder, *, allow_unverified: bool = False) -> tuple[Manifest, Admission]:
    """Pack the finished repository of a model into a registry on this machine: files are linked, not copied.

    Raises RejectedError for an engine that is not to be passed on, ArtifactError for a repository that is damaged.
    """
    repository = card.repository
    stamp = workspace.require(repository, "repository")
    if changed := recipe_changes(stamp.recipe, card.recipe):
        raise ArtifactError(
            f"{card.recipe_file}: says otherwise than what was built: {'; '.join(changed)}",
            hint=f"scalellm build --recipe {card.spoken}",
        )
    admission = check_verified(repository, Asked(card.spoken, card.recipe, allow_unverified=allow_unverified))
    files = {f"repository/{name}": FileEntry(one.size, one.sha256) for name, one in stamp.files.items()}
    for path, entry in files.items():
        check_path(path, str(repository))
        registry.adopt(transfer.blob_path(entry.sha256), repository / path.removeprefix("repository/"))
    for path, data in _papers(card, repository, stamp, admission).items():
        entry = FileEntry(len(data), hashlib.sha256(data).hexdigest())
        if not transfer.has(registry, entry.sha256, entry.size):
            registry.write(transfer.blob_path(entry.sha256), data)
        files[path] = entry
    manifest = Manifest(card.name, files, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    registry.write(transfer.manifest_path(card.name, manifest.digest), manifest.to_json().encode())
    card.keep(manifest)
    return manifest, admission


def _papers(card: Card, repository: Path, stamp: workspace.Stamp, admission: Admission) -> dict[str, bytes]:
    """What a package holds beside the repository's own files."""
    passport, digest = passport_of(repository), accuracy.digest_of(stamp.files, ENGINE)
    verdict = accuracy.read_verdict(repository, digest)
    about = {
        "engine": asdict(passport) if passport else None,
        "verdict": asdict(verdict) if verdict else None,
        "unverified": admission.unverified,
    }
    papers = {
        cards.CARD: card.to_json(packed=True).encode(),
        cards.RECIPE: card.recipe.text.encode(),
        PASSPORT: (json.dumps(about, indent=2, sort_keys=True) + "\n").encode(),
        f"repository/{workspace.STAMP}": (repository / workspace.STAMP).read_bytes(),
    }
    if verdict:
        file = accuracy.file_of(repository, digest)
        papers[file.name] = file.read_bytes()
    return papers


def check_foreign(manifest: Manifest, where: str) -> None:
    """Whether a package from elsewhere may come in. Raises ArtifactError, RejectedError."""
    needed = {cards.CARD, cards.RECIPE, PASSPORT, f"repository/{workspace.STAMP}"}
    if lacking := sorted(needed - manifest.files.keys()):
        raise ArtifactError(f"{where}: {manifest.name} has no {lacking[0]}: it is no package of a model")
    check_code(manifest, where)


def check_code(manifest: Manifest, where: str) -> None:
    """Raises RejectedError for a package with code that this scalellm does not have itself."""
    own = _own_code()
    strange = [path for path, one in manifest.files.items() if path.endswith(".py") and one.sha256 not in own]
    if strange:
        raise RejectedError(
            f"{where}: {manifest.name} brings code that is not this scalellm's: {strange[0]}"
            + (f" and {len(strange) - 1} more" if len(strange) > 1 else ""),
            hint="Pull it with the scalellm that it was packaged with, or package it again with this one.",
        )


def install(home: Path, manifest: Manifest, registry: Folder) -> Card:
    """Lay a package that was pulled into ``registry`` out as a model of the home, in place of an older one of it.

    Raises ArtifactError where its parts do not belong together; then the home is as it was.
    """
    folder = Card(home, manifest.name, "").folder
    draft, old = (folder.with_name(f".{manifest.name}.{os.getpid()}.{word}") for word in ("pulled", "old"))
    shutil.rmtree(draft, ignore_errors=True)
    try:
        transfer.check_out(manifest, registry, draft)
        _check_parts(manifest, draft)
        (draft / cards.PACKAGE).write_text(manifest.to_json(), encoding="utf-8")
        with workspace.disk_errors(folder):
            if folder.exists():
                folder.rename(old)
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return cards.read(home, manifest.name)


def _check_parts(manifest: Manifest, folder: Path) -> None:
    """Card, recipe, stamp and files of one model: the stamp above all, by which verdicts are found."""
    stamp = workspace.read_stamp(folder / "repository")
    assert stamp is not None  # check_foreign
    stamped = {f"repository/{name}": one.sha256 for name, one in stamp.files.items()}
    own = (f"repository/{workspace.STAMP}",)
    here = {
        path: one.sha256 for path, one in manifest.files.items() if path.startswith("repository/") and path not in own
    }
    about = read_json(folder / cards.CARD)
    named = parse_recipe((folder / cards.RECIPE).read_text(encoding="utf-8"), Path(f"{manifest.name}.yaml")).name
    if stamp.stage != "repository" or stamped != here:
        raise ArtifactError(f"{manifest.name}@{manifest.digest[:12]}: its files are not those that its stamp names")
    if about.get("name") != manifest.name or named != manifest.name or "work" in about:
        raise ArtifactError(f"{manifest.name}@{manifest.digest[:12]}: its card or its recipe is of another model")


def _own_code() -> set[str]:
    """The hashes of the Python files that a repository of this scalellm may hold."""
    return {workspace.sha256_of(file) for file in workspace.shipped("model_repo_templates").rglob("*.py")}


def is_packed(card: Card) -> bool:
    """Whether the model's package holds what its repository holds now."""
    manifest, stamp = card.package, card.repository / workspace.STAMP
    if manifest is None or not stamp.is_file():
        return False
    entry = manifest.files.get(f"repository/{workspace.STAMP}")
    return entry is not None and entry.sha256 == workspace.sha256_of(stamp)


def standing(home: Path, name: str) -> Standing:
    """What has become of a model, without planning or hashing anything; a problem is told, not raised."""
    card = Card(home, name, "")
    try:
        card = cards.read(home, name)
        return _standing(card)
    except (ScalellmError, OSError) as error:
        text = error.message if isinstance(error, ScalellmError) else str(error)
        at_work = deployment.deployed(card)
        return Standing(
            name, "", str(card.recipe_file), "", "damaged", False, False, None, False, None, "", "", at_work, text
        )


def _standing(card: Card) -> Standing:
    recipe, stamp = card.recipe, workspace.read_stamp(card.repository)
    if stamp is not None and recipe_changes(stamp.recipe, recipe):
        stamp = None  # of a recipe that was edited since
    packed, at_work = stamp is not None and is_packed(card), deployment.deployed(card)
    manifest = card.package if packed else None
    verified = _verdict(card.repository, stamp)
    reached = (("deployed", at_work), ("verified", verified), ("packaged", packed), ("built", stamp))
    state = next((word for word, true in reached if true), "created")
    size = manifest.total_bytes if manifest else sum(one.size for one in stamp.files.values()) if stamp else None
    date = manifest.created if manifest else stamp.created if stamp else card.created
    return Standing(
        name=card.name,
        model=recipe.model,
        recipe=str(card.recipe_file),
        device=recipe.device,
        state=state,
        built=stamp is not None,
        packaged=packed,
        verified=verified,
        pulled=card.work is None,
        size=size,
        digest=manifest.digest if manifest else "",
        date=date,
        deployed=at_work,
    )


def _verdict(repository: Path, stamp: workspace.Stamp | None) -> bool | None:
    found = accuracy.read_verdict(repository, accuracy.digest_of(stamp.files, ENGINE)) if stamp else None
    return found.passed if found else None


def passport_in(card: Card) -> dict[str, Any]:
    """The passport of a model: of its package where it was pulled, else of the engine that was built; empty before."""
    file = card.folder / PASSPORT
    if file.is_file():
        return read_json(file)
    found = passport_of(card.repository)
    return {"engine": asdict(found)} if found else {}
