"""has, push, pull, check_out: packages between stores, by content. The files first, the manifest last.

So a kill at any moment leaves a registry without the new package, or with all of it; what has arrived stays.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from toolchain import workspace
from toolchain.errors import ArtifactError, ScalellmError
from toolchain.progress import Progress
from toolchain.registry.manifest import MAX_BYTES, Manifest
from toolchain.registry.names import LATEST, Reference, check_name, check_sha256
from toolchain.registry.stores import Folder, Store, corrupted, place

_TAG_BYTES = 200


@dataclass(frozen=True)
class Moved:
    """What went from one store to the other."""

    manifest: Manifest
    files: int
    """That were not there yet, each counted once."""
    bytes: int
    kept: int
    """Bytes that were there already."""


def blob_path(sha256: str) -> str:
    """Where a store keeps the file of that hash."""
    return f"blobs/sha256/{sha256[:2]}/{sha256}"


def manifest_path(name: str, digest: str) -> str:
    return f"models/{name}/manifests/{digest}.json"


def tag_path(name: str, tag: str) -> str:
    return f"models/{name}/tags/{tag}"


def has(store: Store, sha256: str, size: int) -> bool:
    """Whether the store has the file of that hash, whole. Its bytes are not read: ``pull`` does that."""
    return store.size(blob_path(sha256)) == size


def tags(store: Store, name: str) -> dict[str, str]:
    """Tag -> digest of a model's packages."""
    found = {tag: _small(store, tag_path(name, tag), _TAG_BYTES) for tag in store.names(f"models/{name}/tags")}
    return {tag: text.decode(errors="replace").strip() for tag, text in found.items() if text is not None}


def resolve(store: Store, reference: Reference) -> Manifest:
    """The manifest of the package that is meant. Raises ArtifactError with the tags that there are."""
    name = check_name(reference.name)
    digest = reference.digest
    if digest and len(digest) < 64:
        stems = (file.removesuffix(".json") for file in store.names(f"models/{name}/manifests"))
        matching = [stem for stem in stems if stem.startswith(digest)]
        if len(matching) > 1:
            raise ArtifactError(f"{store.url}: {len(matching)} packages of {name} begin with {digest}")
        digest = matching[0] if matching else digest.ljust(64, "0")
    elif not digest:
        where = tag_path(name, reference.tag)
        text = _small(store, where, _TAG_BYTES)
        if text is None:
            raise _absent(store, reference)
        digest = check_sha256(text.decode(errors="replace").strip(), f"{store.url}/{where}")
    where = manifest_path(name, digest)
    raw = _small(store, where, MAX_BYTES)
    if raw is None:
        raise _absent(store, reference)
    return Manifest.from_json(raw, f"{store.url}/{where}", name=name, digest=digest)


def _absent(store: Store, reference: Reference) -> ArtifactError:
    known = ", ".join(f"{reference.name}:{tag}" for tag in tags(store, reference.name))
    return ArtifactError(
        f"{store.url}: there is no {reference} in this registry" + (f"; there are: {known}" if known else ""),
        hint=f"scalellm model push -n {reference.name} --registry {store.url}   # where the model was built",
    )


def _small(store: Store, path: str, limit: int) -> bytes | None:
    """The bytes of a small file; None where there is none. Raises ArtifactError for one that is not small."""
    try:
        with store.open(path) as stream:
            data = stream.read(limit + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if len(data) > limit:
        raise ArtifactError(f"{store.url}/{path}: has more than {limit} bytes: refused")
    return data


def push(manifest: Manifest, source: Folder, target: Store, progress: Progress, names: Iterable[str] = ()) -> Moved:
    """Copy a package whose files lie in ``source`` into ``target``; tag it with ``names``, and as the latest.

    Files that are there already are not sent. Raises ArtifactError for a file of ``source`` that is not what its hash
    says; then the registry lacks the package as before.
    """
    missing = {sha: one for sha, one in manifest.blobs.items() if not has(target, sha, one[1])}
    with progress.task(f"push {manifest.name}", sum(size for _, size in missing.values()), "bytes") as task:
        for sha256, (path, size) in missing.items():
            task.describe(path.rpartition("/")[2])
            if not has(source, sha256, size):
                raise ArtifactError(
                    f"{source.url}: {path} of {manifest.name} is missing",
                    hint=f"scalellm model package -n {manifest.name}",
                )
            target.put(blob_path(sha256), source.path(blob_path(sha256)), sha256, task.advance)
    target.write(manifest_path(manifest.name, manifest.digest), manifest.to_json().encode())
    for tag in dict.fromkeys((*names, LATEST)):
        target.write(tag_path(manifest.name, check_name(tag, "tag")), manifest.digest.encode())
    return _moved(manifest, missing)


def pull(
    reference: Reference,
    source: Store,
    target: Folder,
    progress: Progress,
    *,
    check: Callable[[Manifest], None] = lambda _manifest: None,
) -> Moved:
    """Fetch a package into ``target``, every byte of it hashed; ``check`` may refuse it before anything is fetched.

    An interrupted pull goes on where it was, inside a file too. Raises ArtifactError, naming the file, for one whose
    bytes are not what its hash says; then ``target`` has no such package.
    """
    manifest = resolve(source, reference)
    check(manifest)
    missing: dict[str, tuple[str, int]] = {}
    with progress.task(f"pull {manifest.name}", sum(size for _, size in manifest.blobs.values()), "bytes") as task:
        for sha256, (path, size) in manifest.blobs.items():
            task.describe(path.rpartition("/")[2])
            where = blob_path(sha256)
            if has(target, sha256, size):
                if workspace.sha256_of(target.path(where), task.advance) == sha256:
                    continue
                if source.url == target.url:
                    raise corrupted(f"{path} of {reference} ({target.path(where)})", sha256)
                target.remove(where)
            missing[sha256] = (path, size)
            _fetch(source, target, where, f"{path} of {reference} ({source.url}/{where})", sha256, task.advance)
    target.write(manifest_path(manifest.name, manifest.digest), manifest.to_json().encode())
    return _moved(manifest, missing)


def _fetch(source: Store, target: Folder, where: str, what: str, sha256: str, advance: Callable[[int], None]) -> None:
    try:
        stream = source.open(where)
    except FileNotFoundError as error:
        raise ArtifactError(f"{what} is missing from the registry", hint="Push the model again.") from error
    with stream:
        target.receive(where, stream, sha256, what, advance)


def _moved(manifest: Manifest, missing: dict[str, tuple[str, int]]) -> Moved:
    count = sum(size for _, size in missing.values())
    return Moved(manifest, len(missing), count, sum(size for _, size in manifest.blobs.values()) - count)


def check_out(manifest: Manifest, store: Folder, folder: Path) -> None:
    """Lay the files of a package out in ``folder``, which must not be there: hard links where the disk allows it.

    A stamp in the package remembers when its files were written, and trusts files of that time: they get it again.
    """
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with workspace.disk_errors(folder):
            for path, entry in manifest.files.items():
                target = draft / path
                target.parent.mkdir(parents=True, exist_ok=True)
                place(store.path(blob_path(entry.sha256)), target)
            _restore_times(draft / "repository")
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _restore_times(repository: Path) -> None:
    stamp = workspace.read_stamp(repository)
    for name, record in stamp.files.items() if stamp else ():
        file = repository / name
        if file.is_file() and file.resolve().is_relative_to(repository.resolve()):
            os.utime(file, ns=(record.mtime_ns, record.mtime_ns))


def forget(store: Folder, name: str) -> int:
    """Remove all packages of a model from a store, and the files that no other package has. -> bytes set free."""
    kept: set[str] = set()
    own: dict[str, tuple[str, int]] = {}
    models = store.path("models")
    for model in sorted(one.name for one in models.iterdir()) if models.is_dir() else ():
        for file in store.names(f"models/{model}/manifests"):
            try:
                found = resolve(store, Reference(model, "", file.removesuffix(".json"))).blobs
            except ScalellmError as error:
                raise ArtifactError(
                    f"{error.message}\nso it is not known which files are still needed", hint=error.hint
                ) from error
            if model == name:
                own |= found
            else:
                kept |= found.keys()
    for folder in ("tags", "manifests"):
        for file in store.names(f"models/{name}/{folder}"):
            store.remove(f"models/{name}/{folder}/{file}")
    freed = 0
    for sha256, (_, size) in own.items():
        if sha256 not in kept:
            store.remove(blob_path(sha256))
            freed += size
    return freed
