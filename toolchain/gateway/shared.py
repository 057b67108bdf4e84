"""Files that ship to Triton and that the gateway runs too, loaded from where they lie, so that both do the same."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
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


@functools.cache
def load_together(folders: tuple[str, ...], names: tuple[str, ...]) -> dict[str, ModuleType]:
    """Modules that import each other by their bare names, as they do inside Triton, where their folders are one. Those
    names mean nothing to the rest of this process afterwards.
    """
    places = [str(workspace.shipped("model_repo_templates") / folder) for folder in folders]
    before = set(sys.modules)
    sys.path[:0] = places
    try:
        return {name: importlib.import_module(name) for name in names}
    finally:
        del sys.path[: len(places)]
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(tuple(places)):
                del sys.modules[name]
