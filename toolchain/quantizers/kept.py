"""Weights that stay as they are: hard links to the model's files, and what an FP8 cache needs beside them.

For ``weights: none``, and for checkpoints that are quantized already. Where the cache needs ranges, the samples run
through the model for them. It rounds nothing.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolchain import workspace
from toolchain.checkpoint import KV_RANGES, Checkpoint, TensorInfo, read_json
from toolchain.quantizers import documents, layout, report, shards
from toolchain.quantizers.layout import Scheme
from toolchain.quantizers.report import REPORT
from toolchain.quantizers.run import Run


def keep(run: Run) -> None:
    """The weights as they are, by hard links where the file system can; fp8 KV scales come in a shard of their own."""
    checkpoint, draft, scheme = run.checkpoint, run.draft, run.scheme
    ranges = _observe_kv(run) if run.samples and scheme.kv != "fp16" else []
    scales = _kept_scales(checkpoint, scheme, ranges)
    tensors = _kept_tensors(checkpoint, scheme)
    files = sorted({info.file for info in tensors})
    count = len(files) + bool(scales)
    names = {file: shards.file_name(place, count) for place, file in enumerate(files)}
    with run.progress.task("quantize: keep the weights as they are", checkpoint.nbytes, "bytes") as task:
        for file, name in names.items():
            task.describe(name)
            _link(file, draft.path / name, draft)
            draft.known_hash(name, workspace.sha256_of(draft.path / name, task.advance))
    tensor_bytes: dict[str, dict[str, int]] = {name: {} for name in names.values()}
    for info in tensors:
        tensor_bytes[names[info.file]][info.name] = info.nbytes
    if scales:
        file_name = shards.file_name(count - 1, count)
        workspace.write_durably(draft.path / file_name, shards.scalars(scales))
        tensor_bytes[file_name] = dict.fromkeys(scales, 4)
    documents.write_index(draft, tensor_bytes)
    document = layout.hf_quant_config(scheme)
    if checkpoint.quantization:
        document = read_json(checkpoint.path / layout.HF_QUANT_CONFIG)
        document["quantization"]["kv_cache_quant_algo"] = layout.kv_algo(scheme.kv)
    static_inputs = any(name.endswith(".input_scale") for name in checkpoint.tensors)
    idle_scales = any(info.name.endswith(layout.KV_SCALES) for info in tensors)
    config = read_json(checkpoint.path / "config.json")
    documents.write_config(draft, config, document, static_inputs=static_inputs, idle_scales=idle_scales)
    if ranges:
        documents.write_kv_ranges(draft, ranges)
        seen = [{"calibration": layer} for layer in ranges]
        documents.write_json(draft, REPORT, report.document(scheme, seen, run.samples))
    elif checkpoint.kv_ranges:
        workspace.write_durably(draft.path / KV_RANGES, (checkpoint.path / KV_RANGES).read_bytes())


def _kept_tensors(checkpoint: Checkpoint, scheme: Scheme) -> list[TensorInfo]:
    """All tensors, but for a shard that holds nothing but fp8 KV scales where the cache is not fp8."""
    by_file: dict[Path, list[TensorInfo]] = {}
    for info in checkpoint.tensors.values():
        by_file.setdefault(info.file, []).append(info)
    kept = (
        tensors
        for tensors in by_file.values()
        if scheme.kv == "fp8" or not all(info.name.endswith(layout.KV_SCALES) for info in tensors)
    )
    return [info for tensors in kept for info in tensors]


def _observe_kv(run: Run) -> list[dict[str, Any]]:
    """The ranges of K and V of each layer of a checkpoint whose weights stay as they are."""
    from toolchain.quantizers.calibration import observe_kv

    calibration, layers = run.calibration(), run.checkpoint.config.num_layers
    assert calibration
    documents.check_room(run.draft, calibration.nbytes)
    with run.progress.task("quantize: observe keys and values", layers, "layers") as task:
        return observe_kv(calibration, layers, run.journal, run.record, task.advance)


def _kept_scales(checkpoint: Checkpoint, scheme: Scheme, ranges: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The fp8 KV scales that the checkpoint lacks."""
    found: dict[str, float] = {}
    for layer in range(checkpoint.config.num_layers):
        amaxes = (ranges[layer]["k_amax"], ranges[layer]["v_amax"]) if ranges else None
        plans = layout.kv_tensors(layer, scheme.kv)
        found |= dict(zip((plan.name for plan in plans), layout.kv_scales(scheme, amaxes), strict=False))
    return {name: scale for name, scale in found.items() if name not in checkpoint.tensors}


def _link(file: Path, target: Path, draft: workspace.Draft) -> None:
    target.unlink(missing_ok=True)
    try:
        # Hugging Face's cache is made of symbolic links: link to what they stand for.
        os.link(file.resolve(), target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP):
            raise
        documents.check_room(draft, file.stat().st_size)
        shutil.copyfile(file, target)
