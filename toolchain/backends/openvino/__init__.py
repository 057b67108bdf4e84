"""The CPU engine: an OpenVINO model written straight from a checkpoint in the unified layout.

No model is traced or loaded for it, so memory is bounded by the pages of one tensor: the weights pass in blocks from
the mapped checkpoint to ``openvino_model.bin``. OpenVINO GenAI's ContinuousBatchingPipeline serves it; that takes token
ids and so needs no tokenizer model beside it. How requests reach the pipeline is not known here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolchain.adapters import Adapter, digest, open_adapter
from toolchain.backends import Order
from toolchain.backends.openvino.graph import write_llama
from toolchain.backends.openvino.guides import write_guides
from toolchain.backends.openvino.ir import IrWriter
from toolchain.backends.openvino.runtime import settings
from toolchain.backends.openvino.weights import Weights
from toolchain.checkpoint import Checkpoint
from toolchain.errors import ToolError
from toolchain.planning.plan import Plan
from toolchain.progress import Progress

name = "openvino"
VERSION = "2"
MODEL_FILE = "openvino_model.xml"

_PACKAGES = {"openvino": "openvino", "openvino_genai": "openvino-genai"}


def inputs(plan: Plan) -> dict[str, Any]:
    """Beyond the plan's slice, what requests may be guided by, and the adapters. Raises ArtifactError without them."""
    guided = {"guided_decoding": plan.recipe.guided_decoding} if plan.recipe.guided_decoding else {}
    adapters = [{"name": one.name, "sha256": digest(Path(one.path))} for one in plan.recipe.lora]
    return {**guided, **({"lora": adapters} if adapters else {})}


def lacks(order: Order) -> tuple[str, ...]:
    """The Python packages that are not installed."""
    return tuple(
        f"the Python package {package}: pip install 'scalellm-toolchain[cpu]'"
        for module, package in _PACKAGES.items()
        if importlib.util.find_spec(module) is None
    )


def build(order: Order) -> None:
    """Write the engine of the order's quantized checkpoint; see ``write``."""
    checkpoint = Checkpoint.open(order.source)
    recipe, config = order.plan.recipe, checkpoint.config
    adapters = [open_adapter(one.name, Path(one.path), config) for one in recipe.lora]
    write(checkpoint, order.out, order.progress, adapters)
    if recipe.guided_decoding:
        write_guides(order.source, config, order.out, copies=len(adapters) + 1)


def write(checkpoint: Checkpoint, out: Path, progress: Progress, adapters: Sequence[Adapter] = ()) -> None:
    """Write ``openvino_model.xml`` and ``.bin``, ``config.json`` and the tokenizer's files into ``out``, fsynced.

    Raises ArtifactError naming the file where the checkpoint is damaged, ToolError if OpenVINO refuses the result.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (
        progress.task("build", checkpoint.nbytes, "bytes") as task,
        IrWriter(out / MODEL_FILE, checkpoint.config.architecture) as ir,
    ):
        write_llama(ir, checkpoint.config, Weights(checkpoint, ir, task.advance), adapters)
    for file in (checkpoint.path / "config.json", *checkpoint.side_files):
        shutil.copyfile(file, out / file.name)
        with (out / file.name).open("rb") as stream:
            os.fsync(stream.fileno())
    _check(out / MODEL_FILE)


def runtime(plan: Plan) -> dict[str, Any]:
    """What the pipeline is told at load: ``{"properties": {...}, "scheduler": {...}}``, see ``runtime.settings``."""
    guided = plan.recipe.guided_decoding
    told = settings(
        kv=plan.kv.name,
        cache_tokens=plan.max_kv_tokens,
        max_sequences=plan.limits.max_batch_size,
        max_step_tokens=plan.limits.max_num_tokens,
        precision=plan.recipe.cpu.precision,
        activation_group=plan.activation_group,
        threads=plan.recipe.cpu.threads,
        reuse=plan.kv_reuse,
        window=plan.window,
        speculation=plan.speculation,
    )
    names = [one.name for one in plan.recipe.lora]
    return {**told, **({"guided_decoding": guided} if guided else {}), **({"lora": names} if names else {})}


def versions() -> dict[str, str]:
    """Distribution name -> version, of those that are installed."""
    found = {}
    for package in _PACKAGES.values():
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _check(model: Path) -> None:
    """Let OpenVINO read the model: it infers every shape, and the weights stay on disk."""
    import openvino

    try:
        openvino.Core().read_model(model)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ToolError(
            f"{model}: OpenVINO {openvino.get_version()} does not accept the model written for it: {reason}",
            hint="This is a fault of scalellm or a version of OpenVINO that it was not tested with.",
        ) from error
