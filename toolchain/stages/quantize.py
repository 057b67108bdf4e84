"""quantize: a Hugging Face checkpoint -> the same model in the unified quantized layout, one decoder layer at a time.

Memory is bounded by a few matrices, whatever the model's size, and a restart continues at the layer in hand. It knows
no recipe and no device: what to do is said in four words, and ``workspace`` makes the folder an artifact.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from toolchain import family, workspace
from toolchain.checkpoint import Checkpoint, read_json
from toolchain.errors import ArtifactError, PlanError
from toolchain.progress import Progress, Task
from toolchain.quantization import WEIGHTS
from toolchain.quantizers import SCALES, layout, shards
from toolchain.quantizers.layout import Scheme
from toolchain.quantizers.shards import Shard, ShardWriter, Unit
from toolchain.units import GIB, format_bytes

if TYPE_CHECKING:
    from toolchain.quantizers.rows import Workers
    from toolchain.quantizers.source import Source

VERSION = "1"
"""Raised when the same model and scheme would give other bits."""

REPORT = "quantization_report.json"
MAX_SHARD_BYTES = 4 * GIB
_ROOM_FOR_DOCUMENTS = 2**20
_ONE = np.frombuffer(np.float32(1.0).tobytes(), np.uint8)


def quantize(
    checkpoint: Checkpoint,
    draft: workspace.Draft,
    *,
    weights: str,
    group_size: int,
    scales: str,
    kv: str,
    progress: Progress,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Fill ``draft`` with the quantized checkpoint; the caller commits it.

    ``weights`` is a key of ``quantization.WEIGHTS``, ``kv`` one of ``quantization.KV``; ``group_size`` and ``scales``
    ("modelopt": amax/7, "mse": searched) matter for int4 only. Writes the shards and their index, ``config.json``,
    ``hf_quant_config.json``, ``quantization_report.json`` (relative error of each matrix) and the tokenizer's files.
    With ``weights="none"``, or for a checkpoint that is quantized so already, the shards are hard links.

    Raises PlanError when the scheme does not fit the model; ArtifactError for NaN or infinity in the weights, naming
    tensor and file, and for too little room. An OSError of the disk is left to ``workspace.draft``.
    """
    scheme = Scheme(weights, group_size, scales, kv)
    check(checkpoint, scheme)
    if weights == "none" or checkpoint.quantization:
        _keep(checkpoint, draft, scheme, progress)
    else:
        _convert(checkpoint, draft, scheme, max_shard_bytes, progress)
    for side in checkpoint.side_files:
        workspace.write_durably(draft.path / side.name, side.read_bytes())


def check(checkpoint: Checkpoint, scheme: Scheme) -> None:
    """Raises PlanError when these weights cannot be quantized so."""
    wanted, found = WEIGHTS[scheme.weights], checkpoint.quantization
    group_size = scheme.group_size if wanted.group_sizes else None
    if found and found.quant_algo and (found.quant_algo, found.group_size) != (wanted.quant_algo, group_size):
        raise PlanError(
            f"{checkpoint.path}: its weights are {found.quant_algo} already and cannot become {scheme.weights}"
            + (f" in groups of {group_size}" if group_size else ""),
            hint="Start from the unquantized model: --model DIR",
        )
    if group_size is None:
        return
    if scheme.scales not in SCALES:
        raise PlanError(f"scales: {scheme.scales!r} is not one of {', '.join(SCALES)}")
    if group_size not in wanted.group_sizes:
        raise PlanError(f"group_size: {group_size} is not one of {', '.join(map(str, wanted.group_sizes))}")
    for layer, linear in family.layer_linears(checkpoint.config):
        rows, columns = family.linear_shape(checkpoint.config, linear)
        if columns % group_size or rows % 2:
            raise PlanError(
                f"{family.linear_name(layer, linear)}.weight is [{rows}, {columns}]: int4 in groups of {group_size} "
                f"needs an input width that is a multiple of {group_size} and an even output width",
                hint="Use group_size: 64, or weights: fp8 or none.",
            )


def _convert(
    checkpoint: Checkpoint, draft: workspace.Draft, scheme: Scheme, max_shard_bytes: int, progress: Progress
) -> None:
    units = layout.units(checkpoint.config, lambda name: checkpoint.tensors[name].dtype, scheme)
    plan = shards.plan_shards(units, max_shard_bytes)
    with _open_writer(draft, plan, progress) as writer:
        if writer.finished:
            progress.note(f"quantize: resumed at {_title(checkpoint, writer.units_left)}")
        side_bytes = sum(side.stat().st_size for side in checkpoint.side_files)
        _check_room(draft, sum(unit.nbytes for unit in writer.units_left) + side_bytes)
        errors = {name: error for entry in writer.finished for name, error in entry["errors"].items()}
        errors |= _write_units(checkpoint, units, scheme, writer, progress)
    for file, digest in writer.hashes.items():
        draft.known_hash(file, digest)
    if len(plan) > 1:
        _write_index(draft, {shard.file: shard.tensor_bytes for shard in plan})
    _write_documents(checkpoint, draft, layout.hf_quant_config(scheme))
    _write_report(draft, scheme, errors)


def _open_writer(draft: workspace.Draft, plan: Sequence[Shard], progress: Progress) -> ShardWriter:
    """The writer, after the bytes that an interrupted run left have been checked."""
    journal = draft.journal()
    to_check = sum({entry["file"]: entry["end"] for entry in journal}.values())
    if not to_check:
        return ShardWriter(draft.path, plan, record=draft.record)
    with progress.task("quantize: check the finished layers", to_check, "bytes") as task:
        return ShardWriter(draft.path, plan, journal, draft.record, task.advance)


def _write_units(
    checkpoint: Checkpoint, units: Sequence[Unit], scheme: Scheme, writer: ShardWriter, progress: Progress
) -> dict[str, float]:
    """Write what is left of ``units``. -> the relative error of each matrix."""
    from toolchain.quantizers.rows import Workers
    from toolchain.quantizers.source import Source

    source = Source(checkpoint)
    inputs = [[tensor.name for tensor in unit.tensors if tensor.name in checkpoint.tensors] for unit in units]
    sizes = [sum(checkpoint.tensors[name].nbytes for name in names) for names in inputs]
    done = len(writer.finished)
    errors: dict[str, float] = {}
    with progress.task("quantize", sum(sizes), "bytes") as task, Workers() as workers:
        task.advance(sum(sizes[:done]))
        for place in range(done, len(units)):
            task.describe(_title(checkpoint, units[place:]))
            source.read_ahead(name for names in inputs[place : place + 2] for name in names)
            found = _write_unit(source, units[place], scheme, writer, task, workers)
            writer.end_unit(errors=found)
            errors |= found
    return errors


def _write_unit(
    source: Source, unit: Unit, scheme: Scheme, writer: ShardWriter, task: Task, workers: Workers
) -> dict[str, float]:
    from toolchain.quantizers.layer import quantize_layer
    from toolchain.quantizers.source import as_bytes

    layer = layout.layer_of(unit.name)
    errors = {}
    for name in layout.copied_names(unit):
        for piece in source.pieces(name):
            writer.put(name, piece)
            task.advance(piece.nbytes)
    if layer is None:
        return {}
    for matrix in quantize_layer(source, layer, scheme, workers):
        for suffix, tensor in matrix.tensors.items():
            writer.put(f"{matrix.name}.{suffix}", as_bytes(tensor))
        errors[matrix.name] = matrix.error.relative
        task.advance(matrix.source_bytes)
    for scale in layout.kv_tensors(layer, scheme.kv):
        writer.put(scale.name, _ONE)
    return errors


def _keep(checkpoint: Checkpoint, draft: workspace.Draft, scheme: Scheme, progress: Progress) -> None:
    """The weights as they are, by hard links where the file system can; fp8 KV scales come in a shard of their own."""
    config = checkpoint.config
    scales = [tensor for layer in range(config.num_layers) for tensor in layout.kv_tensors(layer, scheme.kv)]
    scales = [tensor for tensor in scales if tensor.name not in checkpoint.tensors]
    files = sorted({info.file for info in checkpoint.tensors.values()})
    count = len(files) + bool(scales)
    names = {file: shards.file_name(place, count) for place, file in enumerate(files)}
    with progress.task("quantize: keep the weights as they are", checkpoint.nbytes, "bytes") as task:
        for file, name in names.items():
            task.describe(name)
            _link(file, draft.path / name, draft)
            draft.known_hash(name, workspace.sha256_of(draft.path / name, task.advance))
    tensor_bytes: dict[str, dict[str, int]] = {name: {} for name in names.values()}
    for info in checkpoint.tensors.values():
        tensor_bytes[names[info.file]][info.name] = info.nbytes
    if scales:
        shard = Shard(shards.file_name(count - 1, count), (Unit("kv scales", tuple(scales)),))
        with ShardWriter(draft.path, [shard]) as writer:
            for tensor in scales:
                writer.put(tensor.name, _ONE)
            writer.end_unit()
        tensor_bytes[shard.file] = shard.tensor_bytes
    if count > 1:
        _write_index(draft, tensor_bytes)
    document = layout.hf_quant_config(scheme)
    if checkpoint.quantization:
        document = read_json(checkpoint.path / layout.HF_QUANT_CONFIG)
        document["quantization"]["kv_cache_quant_algo"] = layout.kv_algo(scheme.kv)
    _write_documents(checkpoint, draft, document)


def _link(file: Path, target: Path, draft: workspace.Draft) -> None:
    target.unlink(missing_ok=True)
    try:
        # Hugging Face's cache is made of symbolic links: link to what they stand for.
        os.link(file.resolve(), target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        _check_room(draft, file.stat().st_size)
        shutil.copyfile(file, target)


def _write_documents(checkpoint: Checkpoint, draft: workspace.Draft, document: dict[str, Any]) -> None:
    """``config.json`` (every key of the model's, and ``quantization_config``) and ``hf_quant_config.json``."""
    config = read_json(checkpoint.path / "config.json")
    quantization = document["quantization"]
    if quantization["quant_algo"] or quantization["kv_cache_quant_algo"]:
        config["quantization_config"] = layout.quantization_config(document)
        workspace.write_durably(draft.path / layout.HF_QUANT_CONFIG, _json(document))
    workspace.write_durably(draft.path / "config.json", _json(config))


def _write_index(draft: workspace.Draft, tensor_bytes: Mapping[str, Mapping[str, int]]) -> None:
    workspace.write_durably(draft.path / shards.INDEX, shards.index_document(tensor_bytes).encode())


def _write_report(draft: workspace.Draft, scheme: Scheme, errors: Mapping[str, float]) -> None:
    """||W' - W|| / ||W|| of each matrix, W' being what the stored codes and scales stand for."""
    how = {"group_size": scheme.group_size, "scales": scheme.scales} if WEIGHTS[scheme.weights].group_sizes else {}
    worst = sorted(errors, key=lambda name: errors[name], reverse=True)[:10]
    report = {"weights": scheme.weights, **how, "worst": worst, "relative_error": dict(errors)}
    workspace.write_durably(draft.path / REPORT, _json(report))


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _title(checkpoint: Checkpoint, units_left: Sequence[Unit]) -> str:
    """What comes next, in words: ``"layer 12 of 40"`` (counted from 1), ``"embeddings"``, ``"head"``."""
    if not units_left:
        return "its end"
    layer = layout.layer_of(units_left[0].name)
    return units_left[0].name if layer is None else f"layer {layer + 1} of {checkpoint.config.num_layers}"


def _check_room(draft: workspace.Draft, needed: int) -> None:
    """ArtifactError when the disk cannot take what is still to be written."""
    free = shutil.disk_usage(draft.path).free
    if free < needed + _ROOM_FOR_DOCUMENTS:
        raise ArtifactError(
            f"{draft.path}: {format_bytes(needed)} are to be written here and {format_bytes(free)} are free",
            hint="Make room and run the same command again: finished work is kept. Or choose another place: --work DIR",
        )
