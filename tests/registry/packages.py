"""A small package in a folder, for the tests of registries: files of known kinds, two of them with the same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from toolchain.registry import FileEntry, Folder, Manifest
from toolchain.registry.transfer import blob_path

FILES = {
    "card.json": b'{"name": "llama"}',
    "repository/preprocessing/1/tokenizer/tokenizer.json": b'{"a": 1}',
    "repository/postprocessing/1/tokenizer/tokenizer.json": b'{"a": 1}',
    "repository/ensemble/1/.gitkeep": b"",
    "repository/tensorrt_llm/1/engine/model.safetensors": bytes(range(256)) * 8_000,
}
WEIGHTS = "repository/tensorrt_llm/1/engine/model.safetensors"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def package(home: Path, name: str = "llama", files: Mapping[str, bytes] = FILES) -> tuple[Manifest, Folder]:
    """The package and the store that has its files."""
    store = Folder(home)
    for data in files.values():
        store.write(blob_path(sha256(data)), data)
    entries = {path: FileEntry(len(data), sha256(data)) for path, data in files.items()}
    return Manifest(name, entries, "2026-11-22T00:00:00Z"), store


def blob_of(files: Mapping[str, bytes], path: str) -> str:
    return blob_path(sha256(files[path]))
