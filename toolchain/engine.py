"""An engine: a stamped folder that one backend made, with a passport that says for what and from what.

The passport (``engine.json``) is checked when the engine is packaged and served, so that an engine of another backend,
device or release is refused with the command that mends it. It does not know how engines are made or run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toolchain import workspace
from toolchain.checkpoint import read_json
from toolchain.errors import ArtifactError

PASSPORT = "engine.json"


@dataclass(frozen=True)
class Limits:
    """What the engine was made for. Tokens and sequences, as TensorRT-LLM names them."""

    max_batch_size: int
    max_seq_len: int
    """Prompt and output together."""
    max_input_len: int
    max_num_tokens: int
    """Tokens in one step over all sequences."""


@dataclass(frozen=True)
class Passport:
    """What an engine is, in words that the next stages and a person can check."""

    backend: str
    recipe: str
    """The recipe's name."""
    architecture: str
    vocab_size: int
    num_layers: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    weights: str
    """``"none"``, ``"fp8"``, ``"int4"`` ...: a key of ``quantization.WEIGHTS``."""
    group_size: int | None
    kv: str
    limits: Limits
    device: str
    sm: int | None
    """Compute capability times ten (89 for an RTX 4090); None on a CPU."""
    runtime: dict[str, Any]
    """What the backend's runtime is given at start; the backend alone knows the names."""
    versions: dict[str, str]
    checkpoint: str
    """The key of the quantized checkpoint."""
    release: str | None = None
    """TensorRT-LLM; None for an engine that needs none."""
    tensorrt: str | None = None
    container: str | None = None
    """The image that builds and serves it, without its registry host."""
    tp: int = 1
    pp: int = 1
    argv: tuple[str, ...] = ()
    """The builder's command, with CHECKPOINT and ENGINE in place of the folders."""
    gate: str | None = None
    """``"required"``: nobody is to be served before ``accuracy`` holds a good verdict; ``"advised"``; None."""
    model: str | None = None
    """The fingerprint of the model that the checkpoint was made from."""
    recipe_sha256: str | None = None
    """Of the recipe's text."""

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Passport:
        values = dict(raw)
        values["limits"] = Limits(**values["limits"])
        values["eos_token_ids"] = tuple(values["eos_token_ids"])
        values["argv"] = tuple(values.get("argv", ()))
        return cls(**values)


@dataclass(frozen=True)
class Engine:
    """A finished engine: the folder, its stamp and its passport."""

    path: Path
    stamp: workspace.Stamp
    passport: Passport

    @classmethod
    def open(cls, path: Path) -> Engine:
        """Raises ArtifactError when the folder is not an intact engine."""
        stamp = workspace.require(path, "engine")
        raw = read_json(path / PASSPORT)
        try:
            return cls(path, stamp, Passport.from_json(raw))
        except (KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path / PASSPORT}: not a passport of this scalellm: {error}",
                hint="scalellm build --recipe RECIPE",
            ) from error


def write_passport(folder: Path, passport: Passport) -> None:
    """Write ``engine.json`` into an engine's draft folder."""
    text = json.dumps(asdict(passport), indent=2, sort_keys=True) + "\n"
    workspace.write_durably(folder / PASSPORT, text.encode())
