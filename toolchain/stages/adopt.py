"""adopt: a model as another tool wrote it -> the same numbers in the unified Hugging Face layout, a tensor at a time.

What is quantized stays as it was rounded there; what is not becomes a plain checkpoint. Memory is bounded by one
matrix, and a restart continues at the layer in hand. It knows no format (``quantizers.foreign`` does) and no recipe.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from toolchain import workspace
from toolchain.checkpoint import SIDE_FILES
from toolchain.errors import ArtifactError, PlanError
from toolchain.progress import Progress
from toolchain.quantization import WEIGHTS
from toolchain.quantizers import documents, foreign, layout, shards
from toolchain.quantizers.foreign import Foreign
from toolchain.quantizers.layout import Scheme
from toolchain.quantizers.shards import ShardWriter, Unit
from toolchain.units import GIB

MAX_SHARD_BYTES = 4 * GIB


def inputs(model: Foreign, tokenizer: Path | None = None) -> dict[str, Any]:
    """What the imported checkpoint depends on, as plain JSON."""
    found = {"model": model.fingerprint, "importer_version": foreign.VERSION}
    if tokenizer is None:
        return found
    files = {name: hashlib.sha256(content).hexdigest() for name, content in _tokenizer(tokenizer).items()}
    return {**found, "tokenizer": files}


def spoken(scheme: Scheme | None) -> str:
    """What a recipe says of such weights: ``"quantization: {weights: int4, group_size: 32}"``."""
    if scheme is None:
        return "quantization: {weights: none}, or any other"
    return WEIGHTS[scheme.weights].in_recipe(scheme.group_size)


def _group(scheme: Scheme) -> int | None:
    return scheme.group_size if WEIGHTS[scheme.weights].group_sizes else None


def check(path: Path, model: Foreign, *, weights: str, group_size: int | None, static_inputs: bool) -> None:
    """Raises PlanError where a recipe asks for other weights than a quantized foreign model has.

    ``static_inputs``: whether the backend's FP8 needs the ranges of each matrix's inputs.
    """
    scheme = model.scheme
    if scheme is None:
        return
    if (weights, group_size) != (scheme.weights, _group(scheme)):
        asked = weights + (f" in groups of {group_size}" if group_size else "")
        has = scheme.weights + (f" in groups of {scheme.group_size}" if _group(scheme) else "")
        raise PlanError(
            f"{path}: its weights are {has} already and cannot become {asked}",
            hint=f"Write in the recipe: {spoken(scheme)}\nor start from the unquantized model: --model DIR",
        )
    if scheme.weights == "fp8" and static_inputs and not scheme.calibrated:
        raise PlanError(
            f"{path}: its FP8 weights come without the ranges of their inputs (they are dynamic), and TensorRT-LLM's "
            "FP8 needs them",
            hint="Start from the unquantized model: --model DIR   or run it on device: cpu",
        )


def adopt(
    model: Foreign,
    draft: workspace.Draft,
    *,
    progress: Progress,
    tokenizer: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Fill ``draft`` with the checkpoint; the caller commits it. ``tokenizer`` is a folder to take that from instead.

    Writes the shards and their index, ``config.json``, ``hf_quant_config.json`` where it is quantized, and the
    tokenizer's files. All numbers are checked before the first is written. Raises PlanError for what our layout cannot
    hold exactly, ArtifactError for a damaged model and for too little room.
    """
    sides = model.side_files() if tokenizer is None else _tokenizer(tokenizer)
    units = model.units()
    plan = shards.plan_shards(units, max_shard_bytes)
    with progress.task("import: check", model.nbytes, "bytes") as task:
        model.check(task.advance)
    with ShardWriter(draft.path, plan, draft.journal(), draft.record) as writer:
        if writer.finished:
            progress.note(f"import: resumed at {writer.units_left[0].name if writer.units_left else 'its end'}")
        needed = sum(unit.nbytes for unit in writer.units_left)
        documents.check_room(draft, needed + sum(len(content) for content in sides.values()))
        _write(model, units, writer, progress)
    for file, digest in writer.hashes.items():
        draft.known_hash(file, digest)
    documents.write_index(draft, {shard.file: shard.tensor_bytes for shard in plan})
    if model.scheme is None:
        documents.write_json(draft, "config.json", model.document)
    else:
        quantized = layout.hf_quant_config(model.scheme)
        documents.write_config(draft, model.document, quantized, static_inputs=model.scheme.calibrated)
    for name, content in sides.items():
        workspace.write_durably(draft.path / name, content)


def _tokenizer(folder: Path) -> dict[str, bytes]:
    found = {name: (folder / name).read_bytes() for name in SIDE_FILES if (folder / name).is_file()}
    if not {"tokenizer.json", "tokenizer.model"} & set(found):
        raise ArtifactError(f"{folder}: has no tokenizer.json and no tokenizer.model", hint="--tokenizer DIR")
    return found


def _write(model: Foreign, units: list[Unit], writer: ShardWriter, progress: Progress) -> None:
    left = writer.units_left
    with progress.task("import", sum(unit.nbytes for unit in units), "bytes") as task:
        task.advance(sum(unit.nbytes for unit in units[: len(units) - len(left)]))
        for unit in left:
            task.describe(unit.name)
            for tensor in unit.tensors:
                for piece in model.read(tensor):
                    writer.put(tensor.name, piece)
                    task.advance(piece.nbytes)
            writer.end_unit()
