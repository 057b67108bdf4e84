"""Ways to reach a machine that builds engines, one file each; its name is what ``--on`` takes."""

from __future__ import annotations

import importlib
from typing import cast

from toolchain.errors import ToolError
from toolchain.host import Host

NAMES = ("local", "container", "ssh", "sky")


def load(spoken: str) -> Host:
    """``"local"`` ... -> the host. Raises ToolError for what is none."""
    name, _, target = spoken.partition(":")
    if name not in NAMES:
        raise ToolError(f"--on {spoken}: no such host", hint=f"One of: {', '.join(NAMES)}")
    return cast(Host, importlib.import_module(f"toolchain.hosts.{name}").connect(target))
