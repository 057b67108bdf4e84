"""A registry with packages of engines for GPUs, as ``scalellm model push`` leaves it, without the engines."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from toolchain.engine import Limits, Passport
from toolchain.recipe import find_recipe
from toolchain.registry import FileEntry, Folder, Manifest, transfer
from toolchain.release import IMAGES, releases

LIMITS = Limits(max_batch_size=16, max_seq_len=4096, max_input_len=4095, max_num_tokens=4096)
DEPLOYMENT = """\
endpoint: my-llama
recipes: [rtx4090]
replicas: {min: 2, max: 6}
drain_seconds: 45
max_queue: 100
max_price_per_hour: 4.5
"""


def push(
    registry: Path,
    recipe: str,
    *,
    device: str,
    sm: int | None,
    release: str | None = "1.2.1",
    gpus: int = 1,
    **more: Any,
) -> str:
    """Put the package of a recipe into a registry. -> its digest. ``more``: of repository.json."""
    file = find_recipe(recipe)
    text, recipe = file.read_text(encoding="utf-8"), file.stem
    image = f"{IMAGES}/{releases()[release].container}" if release else None
    passport = Passport(
        backend="tensorrt_engine" if release else "openvino",
        recipe=recipe,
        architecture="LlamaForCausalLM",
        vocab_size=32000,
        num_layers=40,
        bos_token_id=1,
        eos_token_ids=(2,),
        weights="fp8",
        group_size=None,
        kv="fp8",
        limits=LIMITS,
        device=device,
        sm=sm,
        runtime={},
        versions={},
        checkpoint="c" * 64,
        release=release,
    )
    contents = {"services": 1, "gpus": gpus if release else 0, "sm": sm, "release": release, "image": image, **more}
    files = {
        "card.json": "{}",
        "recipe.yaml": text,
        "passport.json": json.dumps({"engine": asdict(passport), "unverified": "", "verdict": None}, sort_keys=True),
        "repository/repository.json": json.dumps(contents, sort_keys=True),
        "repository/stamp.json": "{}",
    }
    store, entries = Folder(registry), {}
    for path, body in files.items():
        data = body.encode()
        entries[path] = FileEntry(len(data), hashlib.sha256(data).hexdigest())
        store.write(transfer.blob_path(entries[path].sha256), data)
    manifest = Manifest(recipe, entries, "2026-11-22T00:00:00Z")
    store.write(transfer.manifest_path(recipe, manifest.digest), manifest.to_json().encode())
    store.write(transfer.tag_path(recipe, "latest"), manifest.digest.encode())
    return manifest.digest
