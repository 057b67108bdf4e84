"""What an export is of: a deployment, and for each of its recipes the package that a registry has.

Everything about an engine is read from its package: image, GPUs, release, recipe. So what is exported is what was
built, and the machine that exports needs neither the model nor a GPU. It knows no format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolchain.admission import recipe_changes
from toolchain.device import Device, device
from toolchain.errors import ArtifactError, PlanError, RecipeError
from toolchain.recipe import Recipe
from toolchain.registry import Manifest, Reference, Store, resolve
from toolchain.registry.transfer import blob_path
from toolchain.release import releases

if TYPE_CHECKING:
    from toolchain.fleet.deployment import Deployment

_MAX_BYTES = 2**20
"""Of a recipe, a passport or a repository.json."""
_PYTHON = (3, 11)
"""What scalellm itself needs (pyproject.toml)."""
_LABEL = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True)
class Kind:
    """What runs on one kind of device."""

    recipe: Recipe
    package: str
    """``NAME@DIGEST``, in full."""
    bytes: int
    """Of the package."""
    device: Device
    gpus: int
    """Of one replica; 0 on a CPU."""
    services: int
    """Servers that share them."""
    batch: int
    """Requests that one replica works on at a time."""
    image: str
    label: str
    """Tells it from the other kinds, in letters, digits and hyphens: the device's name, or the recipe's."""
    least: int
    most: int
    """Replicas: its share of the deployment's."""

    @property
    def name(self) -> str:
        """The model's, in the registry and in a home."""
        return self.package.partition("@")[0]


@dataclass(frozen=True)
class Wanted:
    """One export."""

    deployment: Deployment
    text: str
    """Of the deployment's file."""
    kinds: tuple[Kind, ...]
    registry: str
    """The address, or a folder on this machine."""
    is_folder: bool
    install: tuple[str, ...]
    """What pip installs there; empty where the image has scalellm."""
    namespace: str = "default"
    claim: str = ""
    """The PersistentVolumeClaim that has the registry, where that is a folder."""
    target_qps: float | None = None
    spot: bool = True

    @property
    def name(self) -> str:
        return self.deployment.endpoint

    @property
    def least(self) -> int:
        """Replicas of all kinds."""
        return sum(kind.least for kind in self.kinds)

    @property
    def most(self) -> int:
        return sum(kind.most for kind in self.kinds)

    @property
    def left_out(self) -> Iterator[str]:
        """What the deployment's file says and no other system is told."""
        deployment = self.deployment
        if deployment.conformance:
            yield "conformance: nobody asks the suite before a replica takes requests; scalellm conformance URL asks it"
        if "grpc" in deployment.ports.model_fields_set:
            yield "ports.grpc: KServe's doors are those of scalellm deploy alone"
        if "target_tokens_in_flight" in deployment.replicas.model_fields_set:
            yield "replicas.target_tokens_in_flight: nobody else counts tokens in flight"


@dataclass(frozen=True)
class Packaged:
    """A recipe with its package, as the registry has it."""

    recipe: Recipe
    manifest: Manifest
    passport: Mapping[str, Any]
    repository: Mapping[str, Any]
    unverified: str
    """Why its answers are not to be trusted."""

    @classmethod
    def read(cls, store: Store, reference: Reference, recipe: Recipe) -> Packaged:
        """Raises ArtifactError where there is no such package, or it was built from another recipe."""
        manifest = resolve(store, reference)
        text = _file(store, manifest, "recipe.yaml").decode(errors="replace")
        if changed := recipe_changes(text, recipe):
            raise ArtifactError(
                f"{store.url}: {manifest.name}@{manifest.digest[:12]} was built from another recipe than "
                f"{recipe.path}: {'; '.join(changed)}",
                hint=f"scalellm model package -n {manifest.name}, then model push; or --package RECIPE=NAME@DIGEST",
            )
        about, contents = _json(store, manifest, "passport.json"), _json(store, manifest, "repository/repository.json")
        if not isinstance(about.get("engine"), dict):
            raise ArtifactError(f"{store.url}: {manifest.name} has no passport of its engine")
        return cls(recipe, manifest, about["engine"], contents, str(about.get("unverified") or ""))


def kinds_of(deployment: Deployment, packaged: Mapping[str, Packaged], images: Mapping[str, str]) -> tuple[Kind, ...]:
    """A kind for each recipe, with its share of the replicas: they take the recipes in turn.

    ``packaged``: by the recipe as the deployment names it; ``images``: device -> image, ``""`` for all devices.
    Raises PlanError where no image is known, or an image cannot run scalellm.
    """
    named = list(dict.fromkeys(deployment.recipes))
    kinds = [device(str(packaged[recipe].passport["device"])) for recipe in named]
    most = deployment.replicas.max or max(1, deployment.replicas.min)
    found = []
    for recipe, of in zip(named, kinds, strict=True):
        one = packaged[recipe]
        alone = sum(other.name == of.name for other in kinds) == 1
        services = int(one.repository.get("services", 1))
        found.append(
            Kind(
                recipe=one.recipe,
                package=f"{one.manifest.name}@{one.manifest.digest}",
                bytes=one.manifest.total_bytes,
                device=of,
                gpus=int(one.repository.get("gpus", 0)),
                services=services,
                batch=int(one.passport["limits"]["max_batch_size"]) * services,
                image=_image(one, of, images),
                label=_LABEL.sub("-", (of.name if alone else one.recipe.name).lower()).strip("-"),
                least=_share(deployment.recipes, recipe, deployment.replicas.min),
                most=_share(deployment.recipes, recipe, most),
            )
        )
    return tuple(found)


def _share(recipes: tuple[str, ...], recipe: str, replicas: int) -> int:
    return sum(recipes[number % len(recipes)] == recipe for number in range(replicas))


def _image(one: Packaged, of: Device, images: Mapping[str, str]) -> str:
    """The one that was named for the device, else NVIDIA's of the release that built the engine."""
    if image := images.get(of.name) or images.get(""):
        return image
    image, release = str(one.repository.get("image") or ""), releases().get(str(one.repository.get("release") or ""))
    if not image:
        raise PlanError(
            f"{one.recipe.name}: no image is known that serves the {of.title}",
            hint="--image IMAGE: one with Python 3.11 or newer, such as Docker's python:3.12-slim",
        )
    if release and tuple(int(part) for part in release.python.split(".")) < _PYTHON:
        raise PlanError(
            f"{one.recipe.name}: {image} has Python {release.python}, and scalellm needs 3.11 or newer",
            hint="--image IMAGE with another Python in it, or a recipe with a newer release: `tensorrt_llm: ...`",
        )
    return image


def _file(store: Store, manifest: Manifest, path: str) -> bytes:
    if path not in manifest.files:
        raise ArtifactError(f"{store.url}: {manifest.name} has no {path}: it is no package of a model")
    entry = manifest.files[path]
    with store.open(blob_path(entry.sha256)) as stream:
        data = stream.read(_MAX_BYTES)
    if len(data) != entry.size:
        raise ArtifactError(f"{store.url}: {path} of {manifest.name} is not {entry.size} bytes long")
    return data


def _json(store: Store, manifest: Manifest, path: str) -> dict[str, Any]:
    try:
        found = json.loads(_file(store, manifest, path))
    except ValueError as error:
        raise ArtifactError(f"{store.url}: {path} of {manifest.name} is damaged: {error}") from error
    return found if isinstance(found, dict) else {}


def named_for(texts: tuple[str, ...], known: Mapping[str, str], flag: str) -> dict[str, str]:
    """``("IMAGE",)`` or ``("a=X", "b=Y")`` -> {"": "IMAGE"} or {"a": "X", ...}; ``known``: spelling -> name.

    Raises RecipeError for a name that is none of the known.
    """
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            found[""] = text
        elif name in known and value:
            found[known[name]] = value
        else:
            raise RecipeError(f"{flag} {text}: {name!r} is not in this deployment", hint=f"One of: {', '.join(known)}")
    return found
