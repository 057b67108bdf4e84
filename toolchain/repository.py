"""A Triton model repository: a stamped folder of models, and the templates it is rendered from.

Templates are plain files with ``${name}`` in them. Every placeholder must be filled and every value used, so that a
typing error is found here and not by Triton. It does not know which values an engine needs, nor how Triton is started.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
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


_MAP = re.compile(r'^ *(input|output)_map \{ key: "([^"]+)" value: "([^"]+)" \}$')
_TENSOR = re.compile(r'^  \{ name: "([^"]+)" .*\},?$')
_MODEL = re.compile(r'^ *model_name: "([^"]+)"$')


def fit_ensemble(text: str, model: str, input_named: Callable[[str], str | None], outputs: Collection[str]) -> str:
    """The ensemble's config.pbtxt, wired to what ``model`` has in an older release.

    ``input_named`` gives the name of an input there, or None where there is none, ``outputs`` are its outputs. A map
    to a tensor that is not there goes, and with it the tensor that clients would have used: Triton then refuses it by
    name. Works on our own template, in which each tensor and each map has a line of its own.
    """
    gone, lines, at = {"input": set[str](), "output": set[str]()}, [], ""
    for line in text.splitlines():
        if step := _MODEL.match(line):
            at = step.group(1)
        if at == model and (mapped := _MAP.match(line)):
            kind, key, value = mapped.groups()
            here = input_named(key) if kind == "input" else (key if key in outputs else None)
            if here is None:
                gone[kind].add(value)
                continue
            line = line.replace(f'key: "{key}"', f'key: "{here}"')
        lines.append(line)
    kind, kept = "", list[str]()
    for line in lines:
        kind = next((name for name in gone if line == f"{name} ["), kind)
        tensor = _TENSOR.match(line)
        if tensor and tensor.group(1) in gone[kind]:
            continue
        if line == "]" and kept[-1].endswith(","):  # the last of the list is gone
            kept[-1] = kept[-1][:-1]
        kept.append(line)
    return "\n".join(kept) + "\n"


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
    services: int = 1
    """Servers that are to run on it, each with a cache of its own."""
    release: str | None = None
    """TensorRT-LLM; None for an engine that needs none."""
    image: str | None = None
    """The container image that serves it, with its registry host; None where any Triton does."""
    gpus: int = 0
    """GPUs of one service, which are ranks of one engine."""
    sm: int | None = None
    """Their compute capability times ten; None where no GPU is needed."""

    @classmethod
    def open(cls, path: Path) -> Repository:
        """Raises ArtifactError when the folder is not an intact model repository."""
        stamp = workspace.require(path, "repository")
        raw = read_json(path / CONTENTS)
        try:
            models = tuple(raw["models"])
            served = {name: raw[name] for name in ("services", "release", "image", "gpus", "sm") if name in raw}
            repository = cls(path, stamp, raw["backend"], models, dict(raw["parameters"]), **served)
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
