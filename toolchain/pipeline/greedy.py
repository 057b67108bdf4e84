"""verify --greedy: how long greedy answers to chat prompts stay those of the unquantized model.

Until the first other token both models have the same text before them, so the text of one of them tells how far they
go together, each by itself: the other one only has to look at it once. Of a checkpoint it is the unquantized model that
writes, a pass over its weights for each token; of a running engine (``--endpoint``) the engine writes, and the
unquantized model looks. The report lies beside the one on predictions and is no part of the verdict.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from toolchain import __version__, workspace
from toolchain.checkpoint import Checkpoint, read_json
from toolchain.endpoint import Endpoint
from toolchain.errors import PlanError
from toolchain.pipeline.job import Job
from toolchain.pipeline.state import state_of
from toolchain.pipeline.verifying import quantized_checkpoint
from toolchain.quality.answers import Answer, Compared, compare_answers
from toolchain.quality.chats import Chats, chats
from toolchain.quality.greedy import continue_greedily
from toolchain.quality.measures import Measure, mean_of
from toolchain.quantizers.place import memory_errors
from toolchain.quantizers.samples import open_tokenizer
from toolchain.stages import verify as stage

REPORT = "greedy.json"
"""Of a checkpoint. Of a running engine: ``greedy-endpoint.json``."""
_ANSWERS = "answers.json"
_LEAST_PROMPT = 8


@dataclass(frozen=True)
class GreedyReport:
    """Agreement by the model's name: ``"weights"``, the cache's format, or ``"engine"``."""

    report: dict[str, Any]
    file: Path


@dataclass(frozen=True)
class Asked:
    """What the flags say."""

    text: str
    samples: int
    tokens: int
    """Of a prompt and its answer together."""
    count: int
    """Of the answer."""
    reference: Path | None = None


def verify_greedy(job: Job, asked: Asked, endpoint: Endpoint | None = None) -> GreedyReport:
    """Raises ArtifactError where the checkpoint is missing or stale, PlanError where lengths or memory do not fit,
    EndpointError where nobody answers."""
    quantized, _ = quantized_checkpoint(job)
    original = Checkpoint.open(asked.reference) if asked.reference else job.original()
    if original.quantization is not None:
        raise PlanError(f"{original.path}: is quantized itself", hint="Name the unquantized model: --reference DIR")
    prompts = _prompts(job, original, asked)
    if endpoint:
        tokenizer = open_tokenizer(quantized.path)
        answers = stage.ask(endpoint, prompts.texts, tokenizer, max_tokens=asked.count, progress=job.progress)
        compared = {"engine": _looked_at(job, original, answers)}
    else:
        answers = _written(job, original, prompts, asked)
        rounds = job.plan.backend != "openvino"
        kvs = [None, job.plan.kv.name] if job.plan.kv.quant_algo and rounds else [None]
        compared = {kv or stage.WEIGHTS: _looked_at(job, quantized, answers, kv=kv, rounds_inputs=rounds) for kv in kvs}
    report = {
        "report": "greedy",
        "scalellm": __version__,
        "original": str(original.path),
        "checkpoint": str(quantized.path),
        **({"endpoint": endpoint.http_url} if endpoint else {}),
        "text": {"source": prompts.source, "digest": prompts.digest, "prompts": len(answers)},
        "asked_tokens": asked.count,
        "models": {name: _plain(one) for name, one in compared.items()},
        "answers": [
            {**asdict(answer), "leading": {name: one[number].leading for name, one in compared.items()}}
            for number, answer in enumerate(answers)
        ],
    }
    file = job.folder / (f"{Path(REPORT).stem}-endpoint.json" if endpoint else REPORT)
    workspace.write_durably(file, (json.dumps(report, indent=1) + "\n").encode())
    return GreedyReport(report, file)


def _prompts(job: Job, original: Checkpoint, asked: Asked) -> Chats:
    limits = job.plan.limits
    tokens = min(asked.tokens, limits.max_seq_len, original.config.max_position_embeddings)
    prompt = min(tokens - asked.count, limits.max_input_len)
    if prompt < _LEAST_PROMPT:
        raise PlanError(
            f"--greedy {asked.count}: leaves {max(0, prompt)} of {tokens} tokens for a prompt",
            hint=f"--greedy {max(1, tokens // 2)}, or more --tokens",
        )
    data = job.recipe.calibration.data if job.plan.calibrates else None
    return chats(asked.text, original.path, samples=asked.samples, tokens=prompt, calibration=data)


def _written(job: Job, original: Checkpoint, prompts: Chats, asked: Asked) -> list[Answer]:
    """What the unquantized model says: written once, and token by token after an interruption."""
    folder = job.folder / "greedy"
    inputs = {"original": original.fingerprint, "text": prompts.digest, "tokens": asked.count}
    if not state_of("greedy", folder, inputs).fresh:
        with workspace.draft(folder, "greedy", inputs) as draft, memory_errors():
            answers = continue_greedily(
                original,
                prompts.ids,
                asked.count,
                journal=draft.journal(),
                record=draft.record,
                progress=job.progress,
                place=job.place,
            )
            said = {"answers": [asdict(one) for one in answers]}
            workspace.write_durably(draft.path / _ANSWERS, (json.dumps(said) + "\n").encode())
            draft.commit(versions={"scalellm": __version__}, recipe=job.recipe.text)
    return list(_read(folder / _ANSWERS))


def _read(file: Path) -> Iterator[Answer]:
    for one in read_json(file)["answers"]:
        yield Answer(tuple(one["prompt"]), tuple(one["tokens"]), one["ended"])


def _looked_at(
    job: Job, checkpoint: Checkpoint, answers: Sequence[Answer], *, kv: str | None = None, rounds_inputs: bool = False
) -> list[Compared]:
    with tempfile.TemporaryDirectory(dir=job.folder, prefix="verify-") as states, memory_errors():
        return compare_answers(
            checkpoint,
            answers,
            Path(states),
            kv=kv,
            rounds_inputs=rounds_inputs,
            progress=job.progress,
            place=job.place,
        )


def _plain(compared: Sequence[Compared]) -> dict[str, dict[str, Any]]:
    """``agreement_length``: tokens before the first other one; ``same_answers``: the share without any."""
    ones = [1] * len(compared)
    found: dict[str, Measure] = {
        "agreement_length": mean_of([one.leading for one in compared], ones),
        "same_answers": mean_of([one.leading == one.count for one in compared], ones),
        "greedy_agreement": mean_of([one.agree for one in compared], [one.count for one in compared]),
    }
    return {name: one.to_json() for name, one in found.items()}
