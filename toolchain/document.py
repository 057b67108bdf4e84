"""Data as YAML for other programs to read: keys in the order they were given, scripts as blocks, no line broken.

It knows no format but YAML, and nothing of what is in it.
"""

from __future__ import annotations

from typing import Any

import yaml

_NEVER_BROKEN = 10_000
"""Columns: a line of a shell script that YAML folds is another line."""


class _Dumper(yaml.SafeDumper):
    """Writes a text of several lines as a block, and the same list twice instead of once and a reference to it."""

    def ignore_aliases(self, _data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def yaml_text(*documents: Any) -> str:
    """Plain data -> YAML text; several become documents of one stream."""
    text: str = yaml.dump_all(
        documents, Dumper=_Dumper, sort_keys=False, width=_NEVER_BROKEN, explicit_start=len(documents) > 1
    )
    return text
