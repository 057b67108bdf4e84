"""The model's tokenizer, where the gateway needs one: to count a prompt's tokens and to show single tokens as text.

It is the very file that Triton's preprocessing runs (``model_repo_templates/common/shared/tokenizer.py``), loaded from
there, so that both count alike, BOS included.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Protocol, cast

from toolchain import workspace
from toolchain.errors import ArtifactError

_FILE = "common/shared/tokenizer.py"


class Tokenizer(Protocol):
    """What is used of it."""

    def encode(self, text: str, *, special: bool) -> list[int]:
        """With ``special``, BOS in front exactly once, if this tokenizer uses one."""

    def decode(self, ids: list[int], *, skip_special: bool = True) -> str: ...


def load_tokenizer(folder: Path) -> Tokenizer:
    """Raises ArtifactError for a folder without a readable tokenizer."""
    file = workspace.shipped("model_repo_templates") / _FILE
    spec = importlib.util.spec_from_file_location("scalellm_shared_tokenizer", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return cast(Tokenizer, module.Tokenizer(folder))
    except Exception as error:  # a broken tokenizer.json raises a bare Exception of the Rust library
        raise ArtifactError(f"{folder}: the tokenizer cannot be loaded: {error}") from error
