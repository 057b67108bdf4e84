"""A version of an endpoint: the repositories that its replicas run, as the board names them, kept as they are.

On one machine. The machine that clients ask needs a repository of each version too, for its tokenizer and its limits.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from toolchain import accuracy, workspace
from toolchain.admission import ENGINE
from toolchain.engine import Passport
from toolchain.errors import ArtifactError
from toolchain.fleet.control.seats import SHARES, Share
from toolchain.fleet.deployment import Deployment
from toolchain.fleet.front.texts import Parameters, Texts
from toolchain.fleet.front.traffic import Lane
from toolchain.fleet.hosts import packages
from toolchain.fleet.worker import membership
from toolchain.gateway.settings import Model
from toolchain.progress import Progress
from toolchain.registry import Folder
from toolchain.repository import Repository

ModelOf = Callable[[Path], Model]
"""What a gateway must know of the model in a repository."""


def version_of(
    deployment: Deployment, repositories: Sequence[Path], folder: Path, progress: Progress, *, allow_unverified: bool
) -> dict[str, Any]:
    """What these repositories are on the board; they are kept in ``folder`` as they are now. Raises ArtifactError."""
    passports = [membership.checked_passport(one, "") for one in repositories]
    identity = membership.identity(passports[0])
    for repository in repositories[1:]:
        membership.checked_passport(repository, identity)
    _note_limits(passports[0], progress)
    keep = [kept(one, folder) for one in repositories]
    found: dict[str, Any] = {
        "recipes": list(deployment.recipes),
        "repositories": [str(one) for one in keep],
        "identity": identity,
        "lane": f"{deployment.endpoint}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}",
        "drain_seconds": deployment.drain_seconds,
        "start_seconds": deployment.replicas.start_seconds,
        "conformance": deployment.conformance,
        "allow_unverified": allow_unverified,
        SHARES: [
            {"device": passport.device, **asdict(share_of(repository))}
            for repository, passport in zip(keep, passports, strict=True)
        ],
    }
    if deployment.registry is not None:
        shelf, name = Folder(folder / "shelf"), deployment.endpoint
        found[packages.PACKAGES] = [
            packages.offer(repository, name, passport.device, shelf, deployment.registry, progress)
            for repository, passport in zip(keep, passports, strict=True)
        ]
        found[packages.REGISTRY] = deployment.registry
    return found


def share_of(repository: Path) -> Share:
    """What the recipe's plan gave one replica of it. Raises ArtifactError."""
    found = Repository.open(repository)
    return Share(found.gpus, found.services)


def provided(version: Mapping[str, Any], replica: str) -> Path:
    """The repository of a replica on this machine: they take them in turn."""
    repositories = version["repositories"]
    return Path(repositories[(int(replica[1:]) - 1) % len(repositories)])


def _note_limits(passport: Passport, progress: Progress) -> None:
    limits = passport.limits
    if limits.max_input_len < limits.max_seq_len - 1:
        most = limits.max_input_len
        progress.note(f"note: an answer is continued elsewhere up to {most} tokens with its prompt (max_input_len)")


def kept(repository: Path, folder: Path) -> Path:
    """A copy of hard links that stays what it is when the recipe is built again, its verdict beside it. Raises
    ArtifactError.
    """
    stamp = workspace.require(repository, "repository")
    content = workspace.key_of({path: one.sha256 for path, one in stamp.files.items()})
    place = folder / content[:16] / "repository"
    verdict = accuracy.file_of(repository, accuracy.digest_of(stamp.files, ENGINE))
    try:
        if not place.is_dir():
            draft = place.with_name("draft")
            shutil.rmtree(draft, ignore_errors=True)
            shutil.copytree(repository, draft, copy_function=_link)
            draft.rename(place)
        if verdict.is_file():
            shutil.copy2(verdict, place.parent / verdict.name)
    except OSError as error:
        raise ArtifactError(f"{place}: cannot be written: {error.strerror}") from error
    return place


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk
        shutil.copy2(source, target)


def lane_of(version: Mapping[str, Any], model_of: ModelOf | None) -> Lane:
    """How clients' requests are put to a version. Raises ScalellmError."""
    repository = Path(version["repositories"][0])
    parameters = Repository.open(repository).parameters
    return Lane(
        str(version["lane"]),
        Texts(repository / membership.TOKENIZER, Parameters.of(parameters)),
        int(parameters["bls_max_concurrent_requests"]),
        model_of(repository) if model_of is not None else None,
    )


def first_spec(endpoint: str, version: Mapping[str, Any], scaling: Mapping[str, Any]) -> dict[str, Any]:
    """An endpoint with its first version. ``scaling``: see ``Deployment.scaling``."""
    return {
        "endpoint": endpoint,
        "versions": [{**version, "version": 1}],
        "current": 1,
        "next": None,
        "last": 1,
        "desired": 0,
        **scaling,
    }


def resumed(
    found: Mapping[str, Any] | None, endpoint: str, version: Mapping[str, Any], scaling: Mapping[str, Any]
) -> dict[str, Any]:
    """The same for a board that may hold an endpoint already: it goes on, and a version that is another one is rolled
    out.
    """
    if found is None:
        return first_spec(endpoint, version, scaling)
    wanted = json.loads(json.dumps(version))
    number = int(found["last"]) + 1
    for one in found["versions"]:
        if {**wanted, "version": one["version"]} == one:
            number = int(one["version"])
    current = int(found["current"])
    kept = [one for one in found["versions"] if one["version"] == current != number]
    return {
        **found,
        **scaling,
        "versions": [*kept, {**wanted, "version": number}],
        "next": None if number == current else number,
        "last": max(int(found["last"]), number),
        "before": None,
    }
