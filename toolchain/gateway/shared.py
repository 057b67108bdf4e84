"""Files that ship to Triton and that the gateway runs too, loaded from where they lie, so that both do the same."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from toolchain import workspace


def load_shared(file: str) -> ModuleType:
    """A module of ``model_repo_templates``, by its path there; it must import nothing of Triton's."""
    path = workspace.shipped("model_repo_templates") / file
    spec = importlib.util.spec_from_file_location(f"scalellm_shared_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
