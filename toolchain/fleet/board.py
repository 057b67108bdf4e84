"""The board: what is wanted of an endpoint and what its nodes say of themselves, as JSON objects under keys.

Everyone reads it by polling; nobody is called when it changes. ``FolderBoard`` keeps it in a folder of one machine.
What the keys mean is their writers' concern:

    spec              the endpoint as wanted                        written by the head
    nodes/<node>      what a node says of itself, with a ttl        written by that node
    assigned/<node>   the replicas that are wanted of a node        written by the head
    asks/<unique>     what an operator's command asks               removed by the head when it is taken
    answers/<unique>  what came of it                               written by the head, with a ttl
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from toolchain import workspace
from toolchain.errors import EndpointError

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)*")
_FORGET_S = 60.0
"""So long after its deadline a value's file is removed; a writer that was only late has written again by then."""


class Board(Protocol):
    """Where an endpoint's state is kept. Every call raises EndpointError where it cannot be reached: the caller keeps
    running what runs, and tries again."""

    def put(self, key: str, value: Mapping[str, Any], *, ttl_s: float | None = None) -> None:
        """Whole or not at all; with ``ttl_s``, it is gone unless it is put again within so many seconds."""
        ...

    def read(self, prefix: str) -> dict[str, dict[str, Any]]:
        """The value of every key that begins with ``prefix`` and has not run out, by key, in their order."""
        ...

    def remove(self, key: str) -> None:
        """Whether or not it is there."""
        ...

    def close(self) -> None:
        """What was put without a ttl stays."""
        ...


class FolderBoard:
    """A board in a folder, for processes of one machine; the folder's owner alone may read it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, key: str, value: Mapping[str, Any], *, ttl_s: float | None = None) -> None:
        path = self._path(key)
        deadline = None if ttl_s is None else time.time() + ttl_s
        data = json.dumps({"deadline": deadline, "value": dict(value)}).encode()
        with self._reached():
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            workspace.write_durably(path, data)

    def read(self, prefix: str) -> dict[str, dict[str, Any]]:
        found = {}
        with self._reached():
            for key in _keys(self._folder, prefix):
                if (value := _live(self._folder / f"{key}.json")) is not None:
                    found[key] = value
        return dict(sorted(found.items()))

    def remove(self, key: str) -> None:
        with self._reached():
            self._path(key).unlink(missing_ok=True)

    def close(self) -> None:
        pass

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"not a key of a board: {key!r}")
        return self._folder / f"{key}.json"

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise EndpointError(f"{self._folder}: cannot be read or written: {error.strerror}") from error


def _keys(folder: Path, prefix: str) -> Iterator[str]:
    """Of the board's files. ``Path.rglob`` takes four times as long, and an endpoint looks some ten times a second."""
    under = prefix.rpartition("/")[0]
    try:
        with os.scandir(folder / under) as entries:
            found = [(one.name, one.is_dir()) for one in entries]
    except FileNotFoundError:
        return
    for name, is_folder in found:
        key = f"{under}/{name}" if under else name
        if key.startswith(prefix) and is_folder:
            yield from _keys(folder, f"{key}/")
        elif key.startswith(prefix) and name.endswith(".json"):
            yield key.removesuffix(".json")


def _live(path: Path) -> dict[str, Any] | None:
    """A file's value; None where it is gone or has run out."""
    try:
        found = json.loads(path.read_bytes())
        value: dict[str, Any] = found["value"]
        deadline = found["deadline"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise EndpointError(f"{path}: not a file of a board", hint=f"remove it: rm {path}") from error
    late_s = 0.0 if deadline is None else time.time() - deadline
    if late_s > _FORGET_S:
        path.unlink(missing_ok=True)
    return value if late_s <= 0 else None
