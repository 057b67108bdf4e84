"""A model card: a name, where the model comes from, and its recipe; a folder of the model home.

    HOME/models/NAME/card.json      since when, and where its artifacts lie
    HOME/models/NAME/recipe.yaml    the whole recipe, which names the model and its source; a person may edit it
    HOME/models/NAME/package.json   the manifest of the package that was made of it last, or pulled
    HOME/models/NAME/repository     of a pulled model: what is served; its accuracy verdict lies beside it

The packages themselves are in ``HOME/registry``, which is a registry like any other. It knows no stages and no servers.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from toolchain import workspace
from toolchain.checkpoint import is_hub_name, read_json
from toolchain.errors import ArtifactError, RecipeError
from toolchain.recipe import Recipe, parse_recipe
from toolchain.registry.manifest import Manifest
from toolchain.registry.names import check_name
from toolchain.registry.stores import Folder

CARD, RECIPE, PACKAGE = "card.json", "recipe.yaml", "package.json"
FORMAT = "scalellm-card/1"
_PLAIN = re.compile(r"(?!(?i:true|false|null|yes|no|on|off|y|n)$)[A-Za-z/][A-Za-z0-9/._-]*")
"""Text that YAML takes for itself without quotes."""
_HUB = re.compile(r"(hf:)?[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@dataclass(frozen=True)
class Card:
    """One model of a home."""

    home: Path
    name: str
    created: str
    """UTC, ``"2026-11-22T18:00:00Z"``."""
    work: Path | None = None
    """Where its artifacts are made; None of a pulled model, which has a repository and nothing else."""

    @property
    def folder(self) -> Path:
        return self.home / "models" / self.name

    @property
    def recipe(self) -> Recipe:
        """As its file is now. Raises RecipeError with every problem of it."""
        return parse_recipe(self.recipe_file.read_text(encoding="utf-8"), self.recipe_file)

    @property
    def recipe_file(self) -> Path:
        return self.folder / RECIPE

    @property
    def spoken(self) -> str:
        """What follows ``--recipe`` in a command about its artifacts."""
        work = ["--work", str(self.work)] if self.work else []
        return shlex.join([str(self.recipe_file), *work])

    @property
    def repository(self) -> Path:
        """What is served, whether it is there yet or not."""
        return (self.work / self.name if self.work else self.folder) / "repository"

    @property
    def package(self) -> Manifest | None:
        """The package that was made of it last, or pulled."""
        file = self.folder / PACKAGE
        if not file.is_file():
            return None
        digest = str(read_json(file).get("digest", ""))
        return Manifest.from_json(file.read_bytes(), str(file), name=self.name, digest=digest)

    def keep(self, manifest: Manifest) -> None:
        """Remember a package as this model's."""
        workspace.write_durably(self.folder / PACKAGE, manifest.to_json().encode())

    def to_json(self, *, packed: bool = False) -> str:
        """The card's file; ``packed``: without what is true on this machine only."""
        document = {"format": FORMAT, "name": self.name, "created": self.created}
        return (
            json.dumps({**document, **({} if packed or not self.work else {"work": str(self.work)})}, indent=2) + "\n"
        )


def registry_of(home: Path) -> Folder:
    """The registry of a home: where packages are made, and where they go when no other one is named."""
    return Folder(home / "registry")


def create(home: Path, name: str, recipe: str, work: Path) -> Card:
    """Write the card of a new model; all of it or nothing. ``recipe``: from ``recipe_text``.

    Raises ArtifactError where the home has a model of that name.
    """
    card = Card(home, check_name(name), _now(), work.absolute())
    with _new(card) as draft:
        (draft / RECIPE).write_text(recipe, encoding="utf-8")
        (draft / CARD).write_text(card.to_json(), encoding="utf-8")
    return card


@contextmanager
def _new(card: Card) -> Iterator[Path]:
    """A draft folder that becomes the card's at the end of the block."""
    draft = card.folder.with_name(f".{card.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    with workspace.disk_errors(card.folder):
        draft.mkdir(parents=True)
        try:
            yield draft
            if card.folder.exists():
                raise ArtifactError(
                    f"{card.folder}: there is a model {card.name} already",
                    hint=f"scalellm model show {card.name}   # or: scalellm model delete {card.name}",
                )
            draft.rename(card.folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def read(home: Path, name: str) -> Card:
    """Raises ArtifactError where there is no such model, or its card is damaged."""
    file = home / "models" / check_name(name) / CARD
    if not file.is_file():
        known = ", ".join(names(home)) or "none"
        raise ArtifactError(
            f"there is no model {name} in {home} (models: {known})",
            hint=f"scalellm model create -n {name} -m hf:ORG/MODEL   # or: scalellm model pull -n {name}",
        )
    raw = read_json(file)
    try:
        if raw["format"] != FORMAT or raw["name"] != name:
            raise ValueError(f"a card {raw['format']} of {raw['name']}")
        return Card(home, name, str(raw["created"]), Path(raw["work"]) if raw.get("work") else None)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{file}: not a card of this scalellm: {error}", hint=f"rm -r {file.parent}") from error


def names(home: Path) -> list[str]:
    """The models of a home."""
    folder = home / "models"
    return sorted(one.parent.name for one in folder.glob("*/card.json")) if folder.is_dir() else []


def remove(card: Card) -> None:
    """Remove a card, and the repository of a pulled model. What was built stays."""
    gone = card.folder.with_name(f".{card.name}.{os.getpid()}")
    card.folder.rename(gone)
    shutil.rmtree(gone)


def source_of(text: str) -> str:
    """``-m``: ``hf:ORG/MODEL`` (or ``ORG/MODEL``), or a folder -> as a recipe names it from any folder.

    Raises RecipeError for what is neither.
    """
    folder = Path(text).expanduser()
    if folder.exists() and not text.startswith("hf:"):
        return str(folder.absolute())
    if _HUB.fullmatch(text) and is_hub_name(text):
        return f"hf:{text.removeprefix('hf:')}"
    raise RecipeError(
        f"{text!r}: no such folder, and no name of the Hugging Face hub", hint="-m hf:ORG/MODEL   or: -m FOLDER"
    )


def recipe_text(text: str, path: Path, name: str, source: str) -> str:
    """A recipe's text with another name and model; its comments stay. Raises RecipeError with every problem.

    Paths in it must hold from any folder, because a card is used from any folder.
    """
    before = parse_recipe(text, path)
    _no_relative_paths(before, path)
    lines = [_line("name", check_name(name)), _line("model", source)]
    found = re.sub(r"^name[ \t]*:[^\n]*\n", "", text, count=1, flags=re.MULTILINE)
    found = re.sub(r"^model[ \t]*:[^\n]*$", lambda _match: "\n".join(lines), found, count=1, flags=re.MULTILINE)
    where = Path(f"{name}.yaml")
    try:
        after: Recipe | None = parse_recipe(found, where)
    except RecipeError:
        after = None
    wanted = {**before.model_dump(), "name": name, "model": source}
    if after is None or after.model_dump() != wanted:  # YAML that is not a key a line: its comments go
        found = yaml.safe_dump({**yaml.safe_load(text), "name": name, "model": source}, sort_keys=False)
        parse_recipe(found, where)
    return found


def _line(key: str, value: str) -> str:
    return f"{key}: {value if _PLAIN.fullmatch(value) else json.dumps(value)}"


def _no_relative_paths(recipe: Recipe, path: Path) -> None:
    data = recipe.calibration.data
    relative = [("calibration.data", data)] if data != "builtin" and not data.startswith("hf:") else []
    draft = recipe.speculative.draft if recipe.speculative else ""
    relative += [("speculative.draft", draft)] if draft and not draft.startswith("hf:") and Path(draft).exists() else []
    relative += [(f"lora.{index}.path", one.path) for index, one in enumerate(recipe.lora)]
    for key, value in relative:
        if not Path(value).expanduser().is_absolute():
            raise RecipeError(
                f"{path}: {key}: {value} is relative, and a model is used from any folder",
                hint=f"{key}: {Path(value).absolute()}",
            )


def default_recipe(device: str, quantization: Mapping[str, Any]) -> str:
    """The recipe of a model that was created without one: formats are left to the device, unless they are given."""
    chosen = ", ".join(f"{key}: {value}" for key, value in (quantization or {"weights": "auto"}).items())
    return (
        "# Written by: scalellm model create. Formats are left to the device that was found there.\n"
        "# Compare them all: scalellm plan --goal ttft --recipe THIS-FILE\n"
        "model: later\n"
        f"device: {device}\n"
        f"quantization: {{{chosen}}}\n"
        "kv_cache: {dtype: auto}\n"
    )


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
