"""Names that become paths: of models, tags, digests, and of files in a package. What is not one of them is refused.

Nothing here looks at a disk. A name that passes cannot leave the folder that it is joined to.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from toolchain.errors import ArtifactError, RecipeError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DIGEST_START = re.compile(r"[0-9a-f]{8,64}")
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}|\.gitkeep")
_MAX_PARTS = 8

LATEST = "latest"
"""The tag of what was pushed last."""

_TOP = re.compile(r"card\.json|recipe\.yaml|passport\.json|accuracy-[0-9a-f]{12}\.json")
"""What lies in a package beside ``repository/``."""
_KNOWN_SUFFIXES = (".safetensors", ".json", ".jinja", ".pbtxt", ".yaml", ".xml", ".txt", ".engine", ".py", ".gitkeep")
_KNOWN_NAMES = ("openvino_model.bin", "tokenizer.model", "model.lora_weights.npy", "model.lora_config.npy")
_MAY_HOLD = "A Triton repository as scalellm writes it: safetensors, JSON, engines, configurations and its own code"


def check_name(name: str, what: str = "model") -> str:
    """``name`` itself. Raises RecipeError for one that could not be a folder's."""
    if not _NAME.fullmatch(name):
        raise RecipeError(
            f"{name!r} is no name for a {what}",
            hint="Letters, digits, dots, underscores and hyphens, at most 64, a letter or digit first: llama-2-13b",
        )
    return name


def check_sha256(text: object, where: str) -> str:
    """``text`` itself, if it is the sha256 of a file in hex. Raises ArtifactError."""
    if not isinstance(text, str) or not _SHA256.fullmatch(text):
        raise ArtifactError(f"{where}: {str(text)[:80]!r} is no sha256")
    return text


def check_path(path: object, where: str) -> str:
    """``path`` itself, if it names a file that a package may hold. Raises ArtifactError.

    Refused are paths that leave the package, and files of kinds that it has no use for: pickles and archives above all.
    """
    text = path if isinstance(path, str) else ""
    parts = text.split("/")
    if not text or len(parts) > _MAX_PARTS or not all(_PART.fullmatch(part) for part in parts):
        raise ArtifactError(f"{where}: {str(path)[:120]!r} is no path of a file in a package: refused")
    known = parts[-1] in _KNOWN_NAMES or parts[-1].endswith(_KNOWN_SUFFIXES)
    if not (_TOP.fullmatch(text) or (parts[0] == "repository" and len(parts) > 1 and known)):
        raise ArtifactError(f"{where}: {text} is not a kind of file that a package holds: refused", hint=_MAY_HOLD)
    return text


@dataclass(frozen=True)
class Reference:
    """Which package of a model is meant: a digest, or else a tag."""

    name: str
    tag: str = LATEST
    digest: str = ""
    """In hex; its first 8 digits or more are enough."""

    @classmethod
    def parse(cls, text: str) -> Reference:
        """``NAME``, ``NAME:TAG`` or ``NAME@DIGEST``. Raises RecipeError."""
        name, at, digest = text.partition("@")
        if at:
            digest = digest.removeprefix("sha256:")
            if not _DIGEST_START.fullmatch(digest):
                raise RecipeError(f"{digest!r} is no digest", hint="NAME@DIGEST: 8 to 64 digits, 0-9 and a-f")
            return cls(check_name(name), "", digest)
        name, colon, tag = text.partition(":")
        return cls(check_name(name), check_name(tag, "tag") if colon else LATEST)

    def __str__(self) -> str:
        return f"{self.name}@{self.digest}" if self.digest else f"{self.name}:{self.tag}"
