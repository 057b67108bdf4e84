"""verify --tasks: accuracy in the lm-evaluation-harness, of a job's checkpoint and of the model that it was made from.

The report lies beside the one on predictions, ``WORK/RECIPE/tasks.json``, and is made anew each time: a task's file can
change without its name. It is no part of the verdict: which loss of which task matters, a person says.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain import __version__, workspace
from toolchain.checkpoint import Checkpoint
from toolchain.errors import PlanError
from toolchain.pipeline.job import Job
from toolchain.pipeline.verifying import quantized_checkpoint
from toolchain.quality import tasks as harness
from toolchain.quality.measures import Measure
from toolchain.quantizers.place import memory_errors
from toolchain.quantizers.samples import open_tokenizer

REPORT = "tasks.json"


@dataclass(frozen=True)
class TaskReport:
    """What the harness found of both, and the paired difference."""

    report: dict[str, Any]
    file: Path


def verify_tasks(job: Job, tasks: Sequence[str], *, limit: int | None, reference: Path | None = None) -> TaskReport:
    """``limit``: so many questions of each task. Raises ToolError without the harness, ArtifactError where a checkpoint
    is missing or stale or a task unknown, RejectedError for tasks that make the model write."""
    harness.harness()
    quantized, _ = quantized_checkpoint(job)
    original = Checkpoint.open(reference) if reference else job.original()
    if original.quantization is not None:
        raise PlanError(f"{original.path}: is quantized itself", hint="Name the unquantized model: --reference DIR")
    rounds = job.plan.backend != "openvino"
    job.progress.note("verify: tasks, the unquantized model")
    before = _evaluate(original, tasks, limit, job, rounds_inputs=False)
    job.progress.note("verify: tasks, the quantized checkpoint")
    after = _evaluate(quantized, tasks, limit, job, rounds_inputs=rounds)
    report = {
        "report": "tasks",
        "scalellm": __version__,
        "lm_eval": str(harness.harness().__version__),
        "original": str(original.path),
        "checkpoint": str(quantized.path),
        "inputs_rounded": rounds,
        "limit": limit,
        "questions": {name: len(rows) for name, rows in after["samples"].items()},
        "models": {"original": _plain(harness.measures(before)), "quantized": _plain(harness.measures(after))},
        "changes": _plain(harness.changes(before, after)),
    }
    workspace.write_durably(job.folder / REPORT, (json.dumps(report, indent=1) + "\n").encode())
    return TaskReport(report, job.folder / REPORT)


def _evaluate(
    checkpoint: Checkpoint, tasks: Sequence[str], limit: int | None, job: Job, *, rounds_inputs: bool
) -> Mapping[str, Any]:
    def score(rows: Sequence[harness.Row]) -> list[harness.Scored]:
        with tempfile.TemporaryDirectory(dir=job.folder, prefix="tasks-") as states, memory_errors():
            return harness.scored(
                checkpoint,
                rows,
                Path(states),
                rounds_inputs=rounds_inputs,
                progress=job.progress,
                place=job.place,
            )

    return harness.evaluate(tasks, harness.model(open_tokenizer(checkpoint.path), score), limit)


def _plain(told: Mapping[str, Mapping[str, Measure]]) -> dict[str, dict[str, Any]]:
    return {task: {name: one.to_json() for name, one in row.items()} for task, row in told.items()}
