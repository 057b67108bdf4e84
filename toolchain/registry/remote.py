"""A store behind fsspec: s3://, gs://, sftp://, https:// (to read), memory://. The one file that knows fsspec.

An address's package (s3fs, gcsfs ...) is the user's to install; the refusal names it. Credentials are that package's
matter. A file counts as there when it has its full size, and packages are listed by a manifest that is written last.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Self, cast

from toolchain.errors import EndpointError, RecipeError, ScalellmError, ToolError
from toolchain.registry.stores import PIECE_BYTES, Advance, corrupted


class Remote:
    """A store behind an address."""

    def __init__(self, filesystem: Any, root: str, url: str) -> None:
        self._files, self._root, self.url = filesystem, root.rstrip("/"), url

    @classmethod
    def connect(cls, url: str) -> Self:
        """Raises RecipeError for an address that nobody knows, ToolError where its package is not installed."""
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise ToolError(
                f"{shown(url)}: a registry that is no folder needs fsspec, which is not installed",
                hint="pip install 'scalellm-toolchain[registry]'   # or name a folder",
            ) from error
        try:
            filesystem, root = url_to_fs(url)
        except ImportError as error:
            package = package_for(url)
            raise ToolError(
                f"{shown(url)}: needs {package or 'a package'}, which is not installed ({error})",
                hint=f"pip install {package}" if package else "",
            ) from error
        except ValueError as error:
            raise RecipeError(
                f"{shown(url)}: no such kind of registry: {error}", hint="--registry FOLDER|URL"
            ) from error
        except Exception as error:  # each package has errors of its own
            raise EndpointError(f"{shown(url)}: cannot be opened: {type(error).__name__} {error}") from error
        return cls(filesystem, root, shown(url))

    def size(self, path: str) -> int | None:
        with self._errors(path):
            try:
                info = self._files.info(self._at(path))
            except FileNotFoundError:
                return None
            return int(info["size"]) if info.get("type") == "file" and info.get("size") is not None else None

    def open(self, path: str) -> BinaryIO:
        with self._errors(path):
            return cast(BinaryIO, _Reading(self, path, self._files.open(self._at(path), "rb")))

    def write(self, path: str, data: bytes) -> None:
        with self._errors(path), self._created(path) as out:
            out.write(data)

    def put(self, path: str, source: Path, sha256: str, advance: Advance) -> None:
        digest = hashlib.sha256()
        with source.open("rb") as stream, self._errors(path), self._created(path) as out:
            while piece := stream.read(PIECE_BYTES):
                out.write(piece)
                digest.update(piece)
                advance(len(piece))
        if digest.hexdigest() != sha256:
            self.remove(path)
            raise corrupted(str(source), sha256)

    def names(self, folder: str) -> list[str]:
        with self._errors(folder):
            try:
                self._files.invalidate_cache()
                found = self._files.ls(self._at(folder), detail=True)
            except FileNotFoundError:
                return []
            return sorted(str(one["name"]).rstrip("/").rpartition("/")[2] for one in found if one["type"] == "file")

    def remove(self, path: str) -> None:
        with self._errors(path):
            try:
                self._files.rm_file(self._at(path))
            except FileNotFoundError:
                return

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _created(self, path: str) -> Any:
        """A file to write. Folders are made where an address has such; a bucket is never made."""
        try:
            return self._files.open(self._at(path), "wb")
        except FileNotFoundError:
            self._files.makedirs(self._at(path).rpartition("/")[0], exist_ok=True)
            return self._files.open(self._at(path), "wb")

    @contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """Errors of fsspec's packages as ours; that there is no such file stays what it is."""
        try:
            yield
        except (ScalellmError, FileNotFoundError):
            raise
        except PermissionError as error:
            raise EndpointError(
                f"{self.url}/{path}: access is denied ({error})", hint="Look at the registry's credentials."
            ) from error
        except Exception as error:
            raise EndpointError(
                f"{self.url}/{path}: {type(error).__name__} {error}",
                hint="Run the same again: what has arrived is kept.",
            ) from error


class _Reading(io.RawIOBase):
    """A remote file whose errors, too, are ours."""

    def __init__(self, store: Remote, path: str, stream: Any) -> None:
        self._store, self._path, self._stream = store, path, stream

    def read(self, size: int = -1) -> bytes:
        with self._store._errors(self._path):
            return bytes(self._stream.read(size))

    def seek(self, offset: int, whence: int = 0) -> int:
        with self._store._errors(self._path):
            return int(self._stream.seek(offset, whence))

    def close(self) -> None:
        self._stream.close()
        super().close()


def shown(url: str) -> str:
    """An address without the user and password that it may hold."""
    return re.sub(r"//[^/@]*@", "//", url)


def package_for(url: str) -> str:
    """What to install for an address beside fsspec, such as ``"s3fs"``; empty for nothing, or what is not known."""
    from fsspec.registry import known_implementations

    known = known_implementations.get(url.partition(":")[0], {})
    package = str(known.get("class", "")).partition(".")[0]
    return "" if package == "fsspec" else package
