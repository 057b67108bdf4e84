"""Packages of models, by content: what is in one (manifest), where they lie (stores), how they move (transfer).

A registry is a folder or any address that fsspec opens. Every file is kept once, under its sha256, whatever package
it is in; a manifest lists the files of one package, and is written last:

    blobs/sha256/ab/abcd...            the files, each under the hash of its bytes
    models/NAME/manifests/DIGEST.json  path, size and sha256 of every file of one package
    models/NAME/tags/TAG               the digest that a tag, such as ``latest``, stands for

``has``, ``push`` and ``pull`` are plain functions over two stores: the command line and a node of a fleet call the
same ones. A card (``card``) is a model as its owner knows it: a name, where the model comes from, a recipe. What an
engine is, how it is built and served, this room does not know.
"""

from __future__ import annotations

from toolchain.registry.card import Card
from toolchain.registry.manifest import FileEntry, Manifest
from toolchain.registry.names import Reference
from toolchain.registry.stores import Folder, Store, open_store
from toolchain.registry.transfer import Moved, check_out, has, pull, push, resolve

__all__ = [
    "Card",
    "FileEntry",
    "Folder",
    "Manifest",
    "Moved",
    "Reference",
    "Store",
    "check_out",
    "has",
    "open_store",
    "pull",
    "push",
    "resolve",
]
