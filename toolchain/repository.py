"""A Triton model repository: a stamped folder of models, and the templates it is rendered from.

Templates are plain files with ``${name}`` in them. Every placeholder must be filled and every value used, so that a
typing error is found here and not by Triton. It does not know which values an engine needs, nor how Triton is started.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from toolchain import workspace
from toolchain.checkpoint import read_json
from toolchain.errors import ArtifactError

CONTENTS = "repository.json"
"""What the repository is, for people and for the next stages; Triton looks at folders only."""

_PLACEHOLDER = re.compile(r"\$\{([^}]*)\}")

Value = str | int | float | bool


def placeholders(text: str) -> set[str]:
    """The names in ``${name}`` in a template."""
    return set(_PLACEHOLDER.findall(text))


def render(text: str, parameters: Mapping[str, Value], where: str) -> str:
    """A template with its placeholders filled; inside quotes, quotes and backslashes of the values are escaped.

    Raises ArtifactError, naming ``where`` and the placeholder, when a value for it is missing.
    """
    if missing := sorted(placeholders(text) - set(parameters)):
        raise ArtifactError(f"{where}: no value for the placeholder {', '.join(f'${{{name}}}' for name in missing)}")
    return _PLACEHOLDER.sub(lambda match: _literal(parameters[match.group(1)]), text)


def render_all(templates: Mapping[str, str], parameters: Mapping[str, Value]) -> dict[str, str]:
    """Several templates, by name, from one set of parameters.

    Raises ArtifactError for a placeholder without a value, and for a parameter that no template has.
    """
    known = set().union(*(placeholders(text) for text in templates.values()))
    for name in parameters:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            raise ArtifactError(
                f"no template has the parameter {name!r}" + (f" (did you mean {close[0]!r}?)" if close else ""),
                hint="known: " + ", ".join(sorted(known)),
            )
    return {name: render(text, parameters, name) for name, text in templates.items()}


def _literal(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    if "\n" in text:
        raise ArtifactError(f"a parameter's value must be one line: {text!r}")
    return text.replace("\\", "\\\\").replace('"', '\\"')


@dataclass(frozen=True)
class Repository:
    """A finished model repository."""

    path: Path
    stamp: workspace.Stamp
    backend: str
    models: tuple[str, ...]
    """The names of Triton's models, as their folders are called."""
    parameters: dict[str, Any]
    """What the configurations were rendered with."""

    @classmethod
    def open(cls, path: Path) -> Repository:
        """Raises ArtifactError when the folder is not an intact model repository."""
        stamp = workspace.require(path, "repository")
        raw = read_json(path / CONTENTS)
        try:
            models = tuple(raw["models"])
            repository = cls(path, stamp, raw["backend"], models, dict(raw["parameters"]))
        except (KeyError, TypeError, ValueError) as error:
            raise _unreadable(path / CONTENTS, error) from error
        repository._check(models)
        return repository

    def _check(self, models: Iterable[str]) -> None:
        """Triton wants a version folder in every model, also an empty one, and copying tools drop empty folders."""
        for model in models:
            if not (self.path / model / "1").is_dir():
                raise ArtifactError(f"{self.path / model / '1'} is missing", hint="scalellm package --recipe RECIPE")


def _unreadable(file: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"{file}: not a repository of this scalellm: {type(error).__name__} {error}",
        hint="scalellm package --recipe RECIPE",
    )
