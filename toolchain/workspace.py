"""Where artifacts live: stamps, keys, atomic folders, and the files that ship with the package.

An artifact is a folder with a ``stamp.json``; a folder without one does not exist. It is written into a sibling
``NAME.partial-KEY`` under a lock, its files are fsynced and hashed, the stamp comes last, and a rename puts it in
its place. So ``kill -9`` at any moment leaves either the old artifact or the new one, and a partial folder to continue
from. It knows nothing of recipes, models or stages.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from toolchain.errors import ArtifactError

STAMP = "stamp.json"
JOURNAL = "journal.jsonl"
_CHUNK = 4 * 2**20


def shipped(name: str) -> Path:
    """The folder ``recipes`` or ``model_repo_templates``: beside the package in a source tree, inside it in a wheel."""
    package = Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


@functools.cache
def facts(name: str) -> Any:
    """The parsed ``facts/NAME.yaml``."""
    path = Path(__file__).resolve().parent / "facts" / f"{name}.yaml"
    return yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def key_of(inputs: Mapping[str, Any]) -> str:
    """sha256 (hex) of plain-JSON ``inputs``; equal inputs give equal keys whatever the order of their names."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of(path: Path, advance: Callable[[int], None] = lambda _count: None) -> str:
    """sha256 (hex) of a file, read in pieces; ``advance`` gets the bytes of each piece."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(_CHUNK):
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()


@dataclass(frozen=True)
class FileRecord:
    """What the stamp remembers of one file."""

    size: int
    sha256: str
    mtime_ns: int


@dataclass(frozen=True)
class Stamp:
    """What makes a folder an artifact: which inputs it was made from, and every file in it."""

    stage: str
    key: str
    inputs: dict[str, Any]
    """The plain-JSON inputs whose hash is ``key``; compared by ``explain``."""
    files: dict[str, FileRecord]
    versions: dict[str, str]
    recipe: str
    """The recipe's text as it was."""
    created: str
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def read_stamp(folder: Path) -> Stamp | None:
    """The folder's stamp, or None where there is no artifact. ArtifactError when the stamp itself is unreadable."""
    path = folder / STAMP
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        files = {name: FileRecord(**record) for name, record in raw.pop("files").items()}
        return Stamp(files=files, **raw)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(
            f"{path}: this stamp is damaged: {error}", hint=f"rm -r {folder}   # then build again"
        ) from error


def current(target: Path) -> Stamp | None:
    """The stamp of the artifact at ``target``, after finishing a replacement that was cut off between its renames.

    Under the lock: while another process is at it, this one leaves everything as it is.
    """
    old = _old(target)
    if old.is_dir() or (not target.exists() and _sealed(target)):
        with suppress(ArtifactError), _locked(target):
            for folder in [*_sealed(target), old]:
                if folder.is_dir() and not target.exists():
                    folder.rename(target)
            shutil.rmtree(old, ignore_errors=True)
    return read_stamp(target)


def _old(target: Path) -> Path:
    """Where an artifact waits while it is being replaced."""
    return target.with_name(f"{target.name}.old")


def _sealed(target: Path) -> list[Path]:
    """Partial folders that have their stamp already: only the rename is missing."""
    return [path for path in target.parent.glob(f"{target.name}.partial-*") if (path / STAMP).exists()]


def damage(folder: Path, stamp: Stamp) -> str | None:
    """What is wrong with the artifact's files, naming the file, or None.

    A file of the right size and time stamp is trusted; one with another time stamp (after a copy, say) is hashed again.
    """
    for name, record in stamp.files.items():
        path = folder / name
        try:
            stat = path.stat()
        except OSError:
            return f"{path} is missing"
        if stat.st_size != record.size:
            return f"{path} has {stat.st_size} bytes, not {record.size}: it is truncated or was changed"
        if stat.st_mtime_ns != record.mtime_ns and sha256_of(path) != record.sha256:
            return f"{path} is corrupted: its sha256 is not the one that was stamped"
    return None


def require(folder: Path, stage: str) -> Stamp:
    """The stamp of an intact artifact. ArtifactError when it is missing, of another stage, or damaged."""
    stamp = read_stamp(folder)
    if stamp is None:
        raise ArtifactError(f"{folder}: there is no finished {stage} here", hint="scalellm build --recipe RECIPE")
    if stamp.stage != stage:
        raise ArtifactError(f"{folder}: this is a {stamp.stage}, not a {stage}")
    if wrong := damage(folder, stamp):
        raise ArtifactError(wrong, hint=f"rm -r {folder}   # then: scalellm build --recipe RECIPE")
    return stamp


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """In words, what changed between two sets of inputs: ``"kv.dtype was int8, is fp8"``."""
    for name in sorted(set(old) | set(new)):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from differences(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name} was {_short(before)}, is {_short(after)}"


def _short(value: Any) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 60 else text[:12] + "..."


_REFUSES_LINKS = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES}


class Draft:
    """An artifact in the making: a locked partial folder, with a journal of what is already done in it."""

    def __init__(self, target: Path, partial: Path, stage: str, inputs: Mapping[str, Any]) -> None:
        self.target = target
        self.path = partial
        self.stage = stage
        self.inputs = dict(inputs)
        self.key = key_of(inputs)
        self._hashes: dict[str, str] = {}

    def journal(self) -> list[dict[str, Any]]:
        """The entries of earlier work on this very artifact, oldest first; a line torn by a kill is skipped."""
        entries = []
        with suppress(FileNotFoundError):
            for line in (self.path / JOURNAL).read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError):
                    entries.append(json.loads(line))
        return entries

    def record(self, entry: Mapping[str, Any]) -> None:
        """Append one entry to the journal, durably. Call it after the data it speaks of is fsynced."""
        with (self.path / JOURNAL).open("ab+") as stream:
            if stream.tell() and os.pread(stream.fileno(), 1, stream.tell() - 1) != b"\n":
                stream.write(b"\n")  # a kill tore the last line: this entry must not be lost with it
            stream.write(json.dumps(entry).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def known_hash(self, name: str, sha256: str) -> None:
        """Spare the commit from reading a large file again: its hash was taken as it was written."""
        self._hashes[name] = sha256

    def commit(self, *, versions: Mapping[str, str], recipe: str, extra: Mapping[str, Any] | None = None) -> Stamp:
        """Hash and fsync every file, write the stamp last, and rename the folder into its place.

        The journal goes last of all: a kill in here must not lose the work that it vouches for.
        """
        files = {name: self._seal(name) for name in _files_under(self.path) if name not in (JOURNAL, STAMP)}
        stamp = Stamp(
            stage=self.stage,
            key=self.key,
            inputs=self.inputs,
            files=files,
            versions=dict(versions),
            recipe=recipe,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            extra=dict(extra or {}),
        )
        write_durably(self.path / STAMP, stamp.to_json().encode())
        _fsync_folder(self.path)
        _replace_folder(self.path, self.target)
        (self.target / JOURNAL).unlink(missing_ok=True)
        return stamp

    def _seal(self, name: str) -> FileRecord:
        path = self.path / name
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        stat = path.stat()
        return FileRecord(stat.st_size, self._hashes.get(name) or sha256_of(path), stat.st_mtime_ns)


def partial_of(target: Path, key: str) -> Path:
    """The folder in which the artifact of this key is made, before it takes its place at ``target``."""
    return target.with_name(f"{target.name}.partial-{key[:12]}")


@contextmanager
def draft(target: Path, stage: str, inputs: Mapping[str, Any]) -> Iterator[Draft]:
    """Open the draft of ``target``: the partial folder of the same inputs where one was left, else a fresh one.

    The folder is kept when the block fails, for the next run to continue from, except when nothing was journaled.
    Partial folders of other inputs are removed. Raises ArtifactError when another process works on the same target,
    or when the disk is full.
    """
    partial = partial_of(target, key_of(inputs))
    with disk_errors(target), _locked(target):
        for other in target.parent.glob(f"{target.name}.partial-*"):
            if other != partial:
                shutil.rmtree(other, ignore_errors=True)
        work = Draft(target, partial, stage, inputs)
        if not work.journal():  # nothing to continue from: begin with an empty folder
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(exist_ok=True)
        for unfinished in (partial / STAMP, *partial.rglob(".*.tmp")):  # of a commit that was killed
            unfinished.unlink(missing_ok=True)
        try:
            yield work
        except BaseException:
            if not work.journal():
                shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn a full disk, a quota or a place that cannot be written into an ArtifactError that says how much is free."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not full and error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            raise
        there = next(folder for folder in where.absolute().parents if folder.exists())
        free_mib = shutil.disk_usage(there).free // 2**20
        room = "Make room and run the same command again: finished work is kept. Or choose" if full else "Choose"
        raise ArtifactError(
            f"{error.filename or where}: {error.strerror} ({free_mib} MiB free)",
            hint=f"{room} another place: --work DIR",
        ) from error


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the target's lock file; the kernel drops it when the process dies, however it dies."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.with_name(f".{target.name}.lock")
    with path.open("a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            stream.seek(0)
            holder = stream.read().strip() or "unknown"
            raise ArtifactError(
                f"{target}: another scalellm (pid {holder}) is at work here",
                hint="Wait for it, or use another --work DIR.",
            ) from error
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield


def link(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system refuses one."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _REFUSES_LINKS:
            raise
        shutil.copyfile(source, target)


def write_durably(path: Path, data: bytes) -> None:
    """Write a small file so that it is whole or absent, also after a power cut."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _files_under(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_folder(new: Path, target: Path) -> None:
    """Rename ``new`` to ``target``; an old ``target`` is moved aside first and removed last."""
    old = _old(target)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    _fsync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)
