"""verify --tasks: accuracy in the lm-evaluation-harness, of a job's checkpoint and of the model that it was made from.

With ``--endpoint`` it is a running engine that answers, by itself: in writing. The report lies beside the one on
predictions, ``WORK/RECIPE/tasks.json``, and is made anew each time: a task's file can change without its name. It is no
part of the verdict: which loss of which task matters, a person says.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain import __version__, workspace
from toolchain.checkpoint import Checkpoint
from toolchain.endpoint import Endpoint
from toolchain.engine import Limits
from toolchain.errors import PlanError
from toolchain.pipeline.job import Job
from toolchain.pipeline.verifying import quantized_checkpoint
from toolchain.quality import tasks as harness
from toolchain.quality.measures import Measure
from toolchain.quantizers.place import memory_errors
from toolchain.quantizers.samples import open_tokenizer

REPORT = "tasks.json"
"""Of a checkpoint. Of a running engine: ``tasks-endpoint.json``."""
_MAX_TOKENS = 256
"""Of an answer where the task does not say: what the harness's own models do (``max_gen_toks``)."""
_MOST_AT_ONCE = 16


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


def verify_tasks_of_endpoint(job: Job, tasks: Sequence[str], endpoint: Endpoint, *, limit: int | None) -> TaskReport:
    """The same of a running engine, which writes its answers. Raises RejectedError for tasks that compare likelihoods,
    EndpointError where nobody answers."""
    harness.harness()
    tokenizer = open_tokenizer(job.original().path)

    def write(asked: Sequence[harness.Writing]) -> list[str]:
        limits = job.plan.limits
        with (
            ThreadPoolExecutor(min(limits.max_batch_size, _MOST_AT_ONCE)) as pool,
            job.progress.task("verify: tasks, the running engine", len(asked), "answers") as task,
        ):

            def answer(one: harness.Writing) -> str:
                said = written(endpoint, tokenizer, one, job.plan.limits)
                task.advance(1)
                return said

            return list(pool.map(answer, asked))

    found = harness.evaluate(tasks, harness.model(tokenizer, write=write), limit)
    report = {
        "report": "tasks",
        "scalellm": __version__,
        "lm_eval": str(harness.harness().__version__),
        "endpoint": endpoint.http_url,
        "limit": limit,
        "questions": {name: len(rows) for name, rows in found["samples"].items()},
        "models": {"engine": _plain(harness.measures(found))},
        "changes": {},
    }
    file = job.folder / f"{Path(REPORT).stem}-endpoint.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    workspace.write_durably(file, (json.dumps(report, indent=1) + "\n").encode())
    return TaskReport(report, file)


def written(endpoint: Endpoint, tokenizer: Any, asked: harness.Writing, limits: Limits) -> str:
    """A question that is too long loses its beginning, as in the harness's own models."""
    most = min(asked.max_tokens or _MAX_TOKENS, limits.max_seq_len // 2)
    room = min(limits.max_input_len, limits.max_seq_len - most)
    ids, text = tokenizer.encode(asked.text), asked.text
    kept = room - len(tokenizer.encode(""))
    while len(ids) > room and kept > 0:
        text = tokenizer.decode(ids[-kept:], skip_special_tokens=True)
        ids, kept = tokenizer.encode(text), kept - 1  # the second time a text may take a token more
    wished: dict[str, Any] = {**asked.sampling, "exclude_input_in_output": True}
    if asked.sampling:
        wished["seed"] = 0
    if asked.until:
        wished["stop_words"] = list(asked.until)
    chunks = endpoint.generate(text, max_tokens=most, stream=False, **wished)
    return "".join(chunk.text for chunk in chunks)


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
