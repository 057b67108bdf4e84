"""quantize: a Hugging Face checkpoint -> the same model in the unified quantized layout, one decoder layer at a time.

Memory is bounded by a few matrices, whatever the model's size, and a restart continues at the layer in hand. It knows
no recipe and no device of the fact tables: what to do is said in words, where to do it in flags, and ``workspace``
makes the folder an artifact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from toolchain import family, workspace
from toolchain.checkpoint import Checkpoint, CheckpointQuantization, read_json
from toolchain.errors import PlanError
from toolchain.progress import Progress
from toolchain.quantization import WEIGHTS, weights_of
from toolchain.quantizers import METHODS, SCALES, documents, layout, report, shards
from toolchain.quantizers.kept import keep
from toolchain.quantizers.layout import Scheme
from toolchain.quantizers.place import ON_CPU, Place, give_back, memory_errors
from toolchain.quantizers.report import REPORT
from toolchain.quantizers.run import Run
from toolchain.quantizers.shards import Shard, ShardWriter, Unit
from toolchain.units import GIB

if TYPE_CHECKING:
    from toolchain.quantizers.calibration import Calibration
    from toolchain.quantizers.samples import Samples

VERSION = "2"
"""Raised when the same model and scheme would give other bits."""

MAX_SHARD_BYTES = 4 * GIB


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
            keep(run)
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
            hint=f"Write in the recipe: {_recipe_words(found)}\nor start from the unquantized model: --model DIR",
        )
    if wanted.calibrated_always and not found and not scheme.calibrated:
        raise PlanError(f"weights: {scheme.weights} needs text to calibrate on", hint="calibration: {data: builtin}")
    if not 0 <= scheme.smoothquant_alpha <= 1:
        raise PlanError(f"smoothquant_alpha: {scheme.smoothquant_alpha} is not within 0 and 1")
    if group_size is not None:
        _check_groups(checkpoint, scheme, group_size)


def _recipe_words(found: CheckpointQuantization) -> str:
    scheme = weights_of(found.quant_algo)
    assert scheme is not None  # Checkpoint.open refuses others
    return scheme.in_recipe(found.group_size or 128)


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
        documents.check_room(draft, needed + (calibration.nbytes if calibration and writer.units_left else 0))
        entries += _write_units(run, units, writer, calibration)
    if calibration:
        calibration.close()
        documents.write_kv_ranges(draft, [entry["calibration"] for entry in entries if "calibration" in entry])
    for file, digest in writer.hashes.items():
        draft.known_hash(file, digest)
    documents.write_index(draft, {shard.file: shard.tensor_bytes for shard in plan})
    config = read_json(checkpoint.path / "config.json")
    documents.write_config(draft, config, layout.hf_quant_config(scheme), static_inputs=scheme.calibrated)
    documents.write_json(draft, REPORT, report.document(scheme, entries, run.samples))


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


def _title(checkpoint: Checkpoint, units_left: Sequence[Unit]) -> str:
    """What comes next, in words: ``"layer 12 of 40"`` (counted from 1), ``"embeddings"``, ``"head"``."""
    if not units_left:
        return "its end"
    layer = layout.layer_of(units_left[0].name)
    return units_left[0].name if layer is None else f"layer {layer + 1} of {checkpoint.config.num_layers}"
