"""The model's tokenizer, where the gateway needs one: to count a prompt's tokens and to show single tokens as text.

It is the very file that Triton's preprocessing runs, so that both count alike, BOS included.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, cast

from toolchain.errors import ArtifactError
from toolchain.gateway.shared import load_shared


class Tokenizer(Protocol):
    """What is used of it."""

    def encode(self, text: str, *, special: bool) -> list[int]:
        """With ``special``, BOS in front exactly once, if this tokenizer uses one."""

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str: ...


def load_tokenizer(folder: Path) -> Tokenizer:
    """Raises ArtifactError for a folder without a readable tokenizer."""
    try:
        return cast(Tokenizer, load_shared("common/shared/tokenizer.py").Tokenizer(folder))
    except Exception as error:  # a broken tokenizer.json raises a bare Exception of the Rust library
        raise ArtifactError(f"{folder}: the tokenizer cannot be loaded: {error}") from error
