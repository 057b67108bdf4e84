"""quantize: a Hugging Face checkpoint -> the same model in the unified quantized layout, one decoder layer at a time.

Memory is bounded by a few matrices, whatever the model's size, and a restart continues at the layer in hand. It knows
no recipe and no device of the fact tables: what to do is said in words, where to do it in flags, and ``workspace``
makes the folder an artifact.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain import family, workspace
from toolchain.checkpoint import KV_RANGES, Checkpoint, CheckpointQuantization, TensorInfo, read_json
from toolchain.errors import ArtifactError, PlanError
from toolchain.progress import Progress
from toolchain.quantization import WEIGHTS, weights_of
from toolchain.quantizers import METHODS, SCALES, layout, report, shards
from toolchain.quantizers.layout import Scheme
from toolchain.quantizers.place import ON_CPU, Place, give_back, memory_errors
from toolchain.quantizers.run import Run
from toolchain.quantizers.shards import Shard, ShardWriter, Unit
from toolchain.units import GIB, format_bytes

if TYPE_CHECKING:
    from toolchain.quantizers.calibration import Calibration
    from toolchain.quantizers.samples import Samples

VERSION = "2"
"""Raised when the same model and scheme would give other bits."""

REPORT = "quantization_report.json"
MAX_SHARD_BYTES = 4 * GIB
_ROOM_FOR_DOCUMENTS = 2**20


def quantize(
    checkpoint: Checkpoint,
    draft: workspace.Draft,
    *,
    weights: str,
    group_size: int,
    scales: str,
    kv: str,
    progress: Progress,
    method: str = "rtn",
    clip: bool = False,
    fp8_scales: str = "shared",
    propagate: str = "clean",
    smoothquant_alpha: float = 0.5,
    samples: Samples | None = None,
    compute: str = "auto",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    place: Place = ON_CPU,
) -> dict[str, Any]:
    """Fill ``draft`` with the quantized checkpoint; the caller commits it. -> where it was computed, for the stamp.

    Without ``samples`` nothing is calibrated: ``method`` must be "rtn", ``weights`` neither int8_sq nor int4_fp8, and
    fp8 gets no input scales. With them every layer is run on them first: see ``layout.Scheme`` for the words. The
    ranges of K and V then come along in ``scalellm_kv_cache.json``.

    ``weights`` is a key of ``quantization.WEIGHTS``, ``kv`` one of ``quantization.KV``; ``group_size`` and ``scales``
    ("modelopt": amax/7, "mse": searched) matter for int4 and int4_fp8 only. Writes shards, index, ``config.json``,
    ``hf_quant_config.json``, ``quantization_report.json`` (relative error of each matrix) and the tokenizer's files.
    With ``weights="none"``, or for a checkpoint that is quantized so already, the shards are hard links.

    ``place`` says where the arithmetic is done and what memory it may take. A draft is continued on the kind of device
    and with the chunks of samples that it was begun with, since sums depend on both; else it begins again.

    Raises PlanError when the scheme does not fit the model, or a layer not the memory; ArtifactError for NaN or
    infinity in the weights, naming tensor and file, and for too little room. An OSError of the disk is left to
    ``workspace.draft``.
    """
    scheme = Scheme(
        weights,
        group_size,
        scales,
        kv,
        method,
        clip,
        fp8_scales,
        propagate,
        calibrated=samples is not None,
        smoothquant_alpha=smoothquant_alpha,
        compute=compute,
    )
    check(checkpoint, scheme)
    keeps = weights == "none" or checkpoint.quantization is not None
    run = Run.begin(checkpoint, draft, scheme, samples, progress, place, quantizes=not keeps)
    with memory_errors():
        if keeps:
            _keep(run)
        else:
            _convert(run, max_shard_bytes)
    for side in checkpoint.side_files:
        workspace.write_durably(draft.path / side.name, side.read_bytes())
    return run.how


def check(checkpoint: Checkpoint, scheme: Scheme) -> None:
    """Raises PlanError when these weights cannot be quantized so."""
    wanted, found = WEIGHTS[scheme.weights], checkpoint.quantization
    group_size = scheme.group_size if wanted.group_sizes else None
    if found and found.quant_algo and (found.quant_algo, found.group_size) != (wanted.quant_algo, group_size):
        raise PlanError(
            f"{checkpoint.path}: its weights are {found.quant_algo} already and cannot become {scheme.weights}"
            + (f" in groups of {group_size}" if group_size else ""),
            hint=f"Write in the recipe: {spoken(found)}\nor start from the unquantized model: --model DIR",
        )
    if wanted.calibrated_always and not found and not scheme.calibrated:
        raise PlanError(f"weights: {scheme.weights} needs text to calibrate on", hint="calibration: {data: builtin}")
    if not 0 <= scheme.smoothquant_alpha <= 1:
        raise PlanError(f"smoothquant_alpha: {scheme.smoothquant_alpha} is not within 0 and 1")
    if group_size is not None:
        _check_groups(checkpoint, scheme, group_size)


def _check_groups(checkpoint: Checkpoint, scheme: Scheme, group_size: int) -> None:
    """The choices that matter for int4, and the shapes that it needs."""
    wanted = WEIGHTS[scheme.weights]
    if scheme.method not in METHODS:
        raise PlanError(f"method: {scheme.method!r} is not one of {', '.join(METHODS)}")
    if scheme.method != "rtn" and not scheme.calibrated:
        raise PlanError(f"method: {scheme.method} needs text to calibrate on", hint="calibration: {data: builtin}")
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
                hint="Use weights: int4 with group_size: 64, or weights: int8, fp8 or none.",
            )


def spoken(found: CheckpointQuantization) -> str:
    """What a recipe says of such weights: ``"quantization: {weights: int4, group_size: 64}"``."""
    scheme = weights_of(found.quant_algo)
    assert scheme is not None
    group = f", group_size: {found.group_size or 128}" if scheme.group_sizes else ""
    return f"quantization: {{weights: {scheme.name}{group}}}"


def _convert(run: Run, max_shard_bytes: int) -> None:
    checkpoint, draft, scheme = run.checkpoint, run.draft, run.scheme
    units = layout.units(checkpoint.config, lambda name: checkpoint.tensors[name].dtype, scheme)
    plan = shards.plan_shards(units, max_shard_bytes)
    calibration = run.calibration()
    with _open_writer(run, plan, calibration) as writer:
        if writer.finished:
            run.progress.note(f"quantize: resumed at {_title(checkpoint, writer.units_left)}")
        entries = list(writer.finished)
        side_bytes = sum(side.stat().st_size for side in checkpoint.side_files)
        needed = sum(unit.nbytes for unit in writer.units_left) + side_bytes
        _check_room(draft, needed + (calibration.nbytes if calibration and writer.units_left else 0))
        entries += _write_units(run, units, writer, calibration)
    if calibration:
        calibration.close()
        _write_kv_ranges(draft, [entry["calibration"] for entry in entries if "calibration" in entry])
    for file, digest in writer.hashes.items():
        draft.known_hash(file, digest)
    if len(plan) > 1:
        _write_index(draft, {shard.file: shard.tensor_bytes for shard in plan})
    _write_documents(checkpoint, draft, layout.hf_quant_config(scheme), static_inputs=scheme.calibrated)
    workspace.write_durably(draft.path / REPORT, _json(report.document(scheme, entries, run.samples)))


def _open_writer(run: Run, plan: Sequence[Shard], calibration: Calibration | None) -> ShardWriter:
    """The writer, after what an interrupted run left has been checked: bytes and, where calibrated, hidden states."""
    draft, progress, journal = run.draft, run.progress, run.journal

    def record(entry: Mapping[str, Any]) -> None:
        run.record(entry)
        if calibration:
            calibration.recorded(entry)

    to_check = sum({entry["file"]: entry["end"] for entry in journal if "file" in entry}.values())
    if not to_check:
        return ShardWriter(draft.path, plan, record=record)
    with progress.task("quantize: check the finished layers", to_check, "bytes") as task:
        writer = ShardWriter(draft.path, plan, journal, record, task.advance)
    if not calibration or not writer.finished or calibration.can_continue(writer.finished):
        return writer
    with writer:
        progress.note("quantize: the calibration's hidden states are lost, so it begins again")
    return ShardWriter(draft.path, plan, record=record)


def _write_units(
    run: Run, units: Sequence[Unit], writer: ShardWriter, calibration: Calibration | None
) -> list[Mapping[str, Any]]:
    """Write what is left of ``units``. -> what the journal got for them."""
    from toolchain.quantizers.convert import Converter
    from toolchain.quantizers.rows import Workers

    checkpoint, source = run.checkpoint, run.source
    inputs = [[tensor.name for tensor in unit.tensors if tensor.name in checkpoint.tensors] for unit in units]
    sizes = [sum(checkpoint.tensors[name].nbytes for name in names) for names in inputs]
    done = len(writer.finished)
    entries: list[Mapping[str, Any]] = []
    with run.progress.task("quantize", sum(sizes), "bytes") as task, Workers() as workers:
        task.advance(sum(sizes[:done]))
        convert = Converter(source, run.scheme, writer, workers, task.advance, calibration)
        for place in range(done, len(units)):
            title = _title(checkpoint, units[place:])
            source.read_ahead(name for names in inputs[place : place + 2] for name in names)
            try:
                task.describe(title)
                entries.append(convert.write(units[place]))
            except KeyboardInterrupt:
                run.progress.note(f"quantize: interrupted at {title}; the layers before it are kept")
                raise
            give_back()
    return entries


def _keep(run: Run) -> None:
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
    if count > 1:
        _write_index(draft, tensor_bytes)
    document = layout.hf_quant_config(scheme)
    if checkpoint.quantization:
        document = read_json(checkpoint.path / layout.HF_QUANT_CONFIG)
        document["quantization"]["kv_cache_quant_algo"] = layout.kv_algo(scheme.kv)
    static_inputs = any(name.endswith(".input_scale") for name in checkpoint.tensors)
    idle_scales = any(info.name.endswith(layout.KV_SCALES) for info in tensors)
    _write_documents(checkpoint, draft, document, static_inputs=static_inputs, idle_scales=idle_scales)
    if ranges:
        _write_kv_ranges(draft, ranges)
        seen = [{"calibration": layer} for layer in ranges]
        workspace.write_durably(draft.path / REPORT, _json(report.document(scheme, seen, run.samples)))
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
    _check_room(run.draft, calibration.nbytes)
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
        _check_room(draft, file.stat().st_size)
        shutil.copyfile(file, target)


def _write_documents(
    checkpoint: Checkpoint,
    draft: workspace.Draft,
    document: dict[str, Any],
    *,
    static_inputs: bool,
    idle_scales: bool = False,
) -> None:
    """``config.json`` (every key of the model's, and ``quantization_config``) and ``hf_quant_config.json``.

    With ``idle_scales`` the latter also where nothing is quantized, since it is what explains scales in the shards.
    """
    config = read_json(checkpoint.path / "config.json")
    config.pop("quantization_config", None)
    quantization = document["quantization"]
    if quantization["quant_algo"] or quantization["kv_cache_quant_algo"]:
        config["quantization_config"] = layout.quantization_config(document, static_inputs=static_inputs)
    if quantization["quant_algo"] or quantization["kv_cache_quant_algo"] or idle_scales:
        workspace.write_durably(draft.path / layout.HF_QUANT_CONFIG, _json(document))
    workspace.write_durably(draft.path / "config.json", _json(config))


def _write_index(draft: workspace.Draft, tensor_bytes: Mapping[str, Mapping[str, int]]) -> None:
    workspace.write_durably(draft.path / shards.INDEX, shards.index_document(tensor_bytes).encode())


def _write_kv_ranges(draft: workspace.Draft, layers: Sequence[Mapping[str, Any]]) -> None:
    """``KV_RANGES``: max |K| after rotation and max |V| of each layer."""
    ranges = [{"k_amax": layer["k_amax"], "v_amax": layer["v_amax"]} for layer in layers]
    workspace.write_durably(draft.path / KV_RANGES, _json({"layers": ranges}))


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
