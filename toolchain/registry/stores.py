"""Where packages lie: a folder, or what fsspec opens (``remote``). Both are written so that a kill leaves no half file.

Paths are relative and made of checked names (``names``). Nothing here knows what a package is.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from toolchain import workspace
from toolchain.errors import ArtifactError, RecipeError

PIECE_BYTES = 4 * 2**20
_LINKED_BYTES = 2**20
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(?:://|::)")

Advance = Callable[[int], None]
"""Gets the bytes of each piece as they are moved."""


class Store(Protocol):
    """A place for files by path. Errors are ScalellmErrors that name the place."""

    @property
    def url(self) -> str:
        """As a person would write it, without a password."""

    def size(self, path: str) -> int | None:
        """Bytes of a file; None where there is none."""

    def open(self, path: str) -> BinaryIO:
        """A file to read and to seek in. Raises FileNotFoundError."""

    def write(self, path: str, data: bytes) -> None:
        """A small file, whole or not at all, in place of an older one."""

    def put(self, path: str, source: Path, sha256: str, advance: Advance) -> None:
        """Copy a file here that has this hash, whole or not at all. Raises ArtifactError where it has another."""

    def names(self, folder: str) -> list[str]:
        """The names of the files in a folder, sorted; none where there is no such folder."""

    def remove(self, path: str) -> None:
        """Remove a file, if it is there."""


def open_store(place: str | Path) -> Store:
    """A folder, ``file://...``, or any address that fsspec knows. Raises RecipeError, ToolError or EndpointError."""
    text = str(place)
    scheme = _URL.match(text)
    if not text.strip():
        raise RecipeError("an empty address is no registry", hint="--registry FOLDER|URL")
    if scheme is None:
        return Folder(Path(text).expanduser())
    if scheme.group(1) in ("file", "local") and "::" not in text:
        return Folder(Path(text[scheme.end() :]).expanduser())
    from toolchain.registry.remote import Remote

    return Remote.connect(text)


class Folder:
    """A store in a folder of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    @property
    def url(self) -> str:
        return str(self.root)

    def path(self, path: str) -> Path:
        """Where a file of the store lies."""
        return self.root / path

    def size(self, path: str) -> int | None:
        try:
            return self.path(path).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def open(self, path: str) -> BinaryIO:
        return self.path(path).open("rb")

    def write(self, path: str, data: bytes) -> None:
        with workspace.disk_errors(self.path(path)):
            self._folder_of(path)
            workspace.write_durably(self.path(path), data)

    def put(self, path: str, source: Path, sha256: str, advance: Advance) -> None:
        with source.open("rb") as stream:
            self.receive(path, stream, sha256, str(source), advance)

    def receive(self, path: str, stream: BinaryIO, sha256: str, what: str, advance: Advance) -> None:
        """Take a file from a stream that can seek. What was received before a kill is not asked for again.

        Raises ArtifactError, naming ``what``, where the bytes do not have this hash; then nothing is left of them.
        """
        target = self.path(path)
        part = target.with_name(f"{target.name}.part")
        with workspace.disk_errors(target):
            self._folder_of(path)
            with _appending(part) as out:
                begun = part.stat().st_size > 0
                right = _received(part, out, stream, advance) == sha256
                if begun and not right:  # the part of an earlier time may be what is wrong
                    out.truncate(0)
                    stream.seek(0)
                    right = _received(part, out, stream, lambda _count: None) == sha256
                if not right:
                    part.unlink()
                    raise corrupted(what, sha256)
                part.replace(target)

    def adopt(self, path: str, source: Path) -> None:
        """Take a file of this machine whose hash is known: ``place`` says how."""
        target = self.path(path)
        if self.size(path) == source.stat().st_size:
            return
        with workspace.disk_errors(target):
            self._folder_of(path)
            draft = target.with_name(f".{target.name}.{os.getpid()}")
            draft.unlink(missing_ok=True)
            try:
                place(source, draft)
                draft.replace(target)
            finally:
                draft.unlink(missing_ok=True)

    def names(self, folder: str) -> list[str]:
        found = self.path(folder)
        files = found.iterdir() if found.is_dir() else ()
        return sorted(file.name for file in files if file.is_file() and not file.name.startswith("."))

    def remove(self, path: str) -> None:
        self.path(path).unlink(missing_ok=True)
        for parent in Path(path).parents[:-1]:
            with suppress(OSError):  # it holds something else
                self.path(str(parent)).rmdir()

    def _folder_of(self, path: str) -> None:
        self.path(path).parent.mkdir(parents=True, exist_ok=True)


def place(source: Path, target: Path) -> None:
    """A hard link of a large file, where the disk allows it; a copy of a small one, which somebody may edit."""
    if source.stat().st_size >= _LINKED_BYTES:
        workspace.link(source, target)
    else:
        shutil.copyfile(source, target)


def _received(part: Path, out: BinaryIO, stream: BinaryIO, advance: Advance) -> str:
    """Append to a partial file what it lacks of the stream. -> the sha256 of the whole."""
    digest, done = hashlib.sha256(), 0
    with part.open("rb") as before:
        while piece := before.read(PIECE_BYTES):
            digest.update(piece)
            done += len(piece)
            advance(len(piece))
    if done:
        stream.seek(done)
    while piece := stream.read(PIECE_BYTES):
        out.write(piece)
        digest.update(piece)
        advance(len(piece))
    out.flush()
    os.fsync(out.fileno())
    return digest.hexdigest()


def corrupted(what: str, sha256: str) -> ArtifactError:
    """The refusal of a file with other bytes than its hash says."""
    return ArtifactError(
        f"{what} is corrupted: its sha256 is not {sha256[:12]}...",
        hint="Remove that file from the registry, then push the model again from a machine that has it.",
    )


@contextmanager
def _appending(part: Path) -> Iterator[BinaryIO]:
    """A partial file to append to, for this process alone. Raises ArtifactError while another one is at it."""
    while True:
        with part.open("ab") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ArtifactError(
                    f"{part}: another process fetches this file", hint="Wait for it, then run the same again."
                ) from error
            with suppress(FileNotFoundError):
                if part.stat().st_ino == os.fstat(stream.fileno()).st_ino:  # else it was finished just now
                    yield stream
                    return
