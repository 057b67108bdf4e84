"""Tasks of EleutherAI's lm-evaluation-harness, on a checkpoint or on a running engine.

The harness reads the tasks, makes the questions and counts the answers. A checkpoint tells the log-likelihood of each
answer, all in one pass over its layers; tasks that make the model write (``generate_until``) take a running engine,
which in turn says the probabilities of its own tokens only. What the one cannot is refused. The package ``lm_eval`` is
imported here and nowhere else, when it is needed: it is an extra, in an environment of its own where it wants another
numpy (``make test-lm-eval``).

Its API as of lm-eval 0.4.13: https://github.com/EleutherAI/lm-evaluation-harness (2026-11-22).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toolchain.checkpoint import Checkpoint
from toolchain.errors import ArtifactError, RejectedError, ToolError
from toolchain.progress import Progress
from toolchain.quality.measures import Measure, mean_of
from toolchain.quality.need import choose_chunk
from toolchain.quality.passes import Passes, Way
from toolchain.quantizers.place import Place, open_device, resident
from toolchain.quantizers.samples import Samples

Scored = tuple[float, bool]
"""(log-likelihood of an answer in nats, whether greedy decoding gives it)."""
Row = tuple[Sequence[int], Sequence[int]]
"""(tokens of the question, tokens of the answer)."""


def harness() -> Any:
    """The package, or ToolError that says how to get it."""
    try:
        return import_module("lm_eval")
    except ImportError as error:
        raise ToolError(
            f"tasks are those of the lm-evaluation-harness, which is not installed: {error}",
            hint="pip install 'scalellm-toolchain[lm-eval,quantize]'   # in an environment of its own",
        ) from None


@torch.no_grad()
def scored(
    checkpoint: Checkpoint, rows: Sequence[Row], folder: Path, *, rounds_inputs: bool, progress: Progress, place: Place
) -> list[Scored]:
    """The log-likelihood of each answer behind its question. ``folder`` takes hidden states meanwhile."""
    most = checkpoint.config.max_position_embeddings - 1
    whole = [(*question, *answer)[-most:] for question, answer in rows]
    longest = max(map(len, whole)) + 1  # one more, for what comes behind the last
    ids = np.zeros((len(rows), longest), dtype=np.int32)
    for number, row in enumerate(whole):
        ids[number, : len(row)] = row
    chunk = choose_chunk(checkpoint.config, len(rows), longest, 1, max_ram=place.max_ram, base=resident())
    samples = Samples(ids, "", "the tasks")
    way = Way("checkpoint", quantized=checkpoint.quantization is not None)
    passes = Passes(
        checkpoint,
        checkpoint,
        [way],
        samples,
        folder,
        chunk_tokens=chunk,
        rounds_inputs=rounds_inputs,
        device=open_device(place),
    )
    sums = passes.sums(progress)[0]
    found = []
    log_probs = (sums.target - sums.log_total).view(ids.shape)
    choice = sums.word.view(ids.shape)
    for number, (row, (_, answer)) in enumerate(zip(whole, rows, strict=True)):
        begin = len(row) - len(answer) - 1
        part = slice(begin, begin + len(answer))
        greedy = all(int(a) == b for a, b in zip(choice[number, part], answer, strict=True))
        found.append((float(log_probs[number, part].sum()), greedy))
    passes.clear()
    return found


@dataclass(frozen=True)
class Writing:
    """Text that a task wants to be continued."""

    text: str
    until: tuple[str, ...]
    """The answer ends before the first of these."""
    max_tokens: int | None
    sampling: Mapping[str, float]
    """temperature, top_p and top_k; empty: greedily."""


def cut(answer: str, until: Sequence[str]) -> str:
    """What stands before the first of ``until``."""
    return answer[: min((at for one in until if (at := answer.find(one)) >= 0), default=len(answer))]


def _writing(text: str, asked: Mapping[str, Any]) -> Writing:
    """The keys of ``generation_kwargs`` that the harness documents for every model (docs/task_guide.md)."""
    until, length = asked.get("until") or (), asked.get("max_gen_toks")
    several = (until,) if isinstance(until, str) else tuple(until)
    sampling: dict[str, float] = {}
    if asked.get("do_sample", True) and asked.get("temperature"):
        sampling = {"top_p": 1.0} | {name: asked[name] for name in ("temperature", "top_p", "top_k") if asked.get(name)}
    return Writing(text, several, int(length) if length else None, sampling)


def model(
    tokenizer: Any,
    score: Callable[[Sequence[Row]], list[Scored]] | None = None,
    write: Callable[[Sequence[Writing]], list[str]] | None = None,
) -> Any:
    """A model as the harness wants it: the engine's own tokenizer, ``score`` for log-likelihoods, ``write`` for texts;
    tasks for which there is none are a RejectedError."""
    harness()
    base: Any = import_module("lm_eval.api.model").TemplateLM

    class Asked(base):  # type: ignore[misc]
        @property
        def eot_token_id(self) -> int:
            return int(tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            start = tokenizer.bos_token_id
            return int(start if start is not None else tokenizer.eos_token_id)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_more: Any) -> list[int]:
            return list(tokenizer.encode(string, add_special_tokens=add_special_tokens is not False))

        def _loglikelihood_tokens(self, requests: Sequence[Any], **_more: Any) -> list[Scored]:
            return scores([(question, answer) for _, question, answer in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any], **_more: Any) -> list[float]:
            texts = [self.tok_encode(one.args[0], add_special_tokens=False) for one in requests]
            return [value for value, _ in scores([([self.prefix_token_id], text) for text in texts])]

        def generate_until(self, requests: Sequence[Any], **_more: Any) -> list[str]:
            if write is None:
                raise RejectedError(
                    "this task makes the model write, and a checkpoint only tells how likely a text is",
                    hint="ask the running engine: --endpoint URL; or choose tasks that compare answers (output_type: "
                    "multiple_choice or loglikelihood)",
                )
            asked = [_writing(*one.args) for one in requests]
            return [cut(answer, one.until) for answer, one in zip(write(asked), asked, strict=True)]

    def scores(rows: Sequence[Row]) -> list[Scored]:
        if score is None:
            raise RejectedError(
                "this task compares how likely given answers are, and a server tells that of its own answers only",
                hint="leave --endpoint out: the checkpoint tells it; or choose tasks with output_type: generate_until",
            )
        return score(rows)

    return Asked()


def evaluate(tasks: Sequence[str], made: Any, limit: int | None) -> Mapping[str, Any]:
    """What the harness finds. ``tasks``: names that it knows, or files of the kind that it reads (``task: NAME``).

    Raises ArtifactError for a task that is neither, or whose questions cannot be read.
    """
    package, manager = harness(), import_module("lm_eval.tasks").TaskManager
    files = [Path(one) for one in tasks if one.endswith((".yaml", ".yml"))]
    if missing := [str(one) for one in files if not one.is_file()]:
        raise ArtifactError(f"{missing[0]}: no such file", hint="name a task of the harness, or a file of one")
    names = [_name_in(Path(one)) if Path(one) in files else one for one in tasks]
    known = manager(include_path=sorted({str(one.resolve().parent) for one in files}) or None)
    if unknown := [one for one in names if one not in known.all_tasks]:
        raise ArtifactError(f"{unknown[0]}: the harness knows no such task", hint="lm-eval ls tasks")
    try:
        found = package.simple_evaluate(made, tasks=names, task_manager=known, limit=limit, bootstrap_iters=1000)
    except (OSError, ValueError, KeyError, ConnectionError) as error:
        raise ArtifactError(f"{', '.join(names)}: {type(error).__name__}: {error}") from error
    return dict(found)


def _name_in(file: Path) -> str:
    import yaml

    class Plain(yaml.SafeLoader):
        """The harness's own tags (``!function``) are not needed for a name."""

    Plain.add_multi_constructor("!", lambda _loader, _tag, _node: None)
    raw = yaml.load(file.read_text(encoding="utf-8"), Plain)
    if not isinstance(raw, Mapping) or not isinstance(raw.get("task"), str):
        raise ArtifactError(f"{file}: names no task", hint="task: NAME in its first lines, as the harness wants it")
    return str(raw["task"])


def measures(found: Mapping[str, Any]) -> dict[str, dict[str, Measure]]:
    """Task -> metric -> the harness's own value and standard error (None where it has none)."""
    told: dict[str, dict[str, Measure]] = {}
    for task, row in found["results"].items():
        for key, value in row.items():
            metric, _, rest = key.partition(",")
            if isinstance(value, float | int) and rest and not metric.endswith("_stderr"):
                error = row.get(f"{metric}_stderr,{rest}")
                own = float(error) if isinstance(error, float | int) else None
                told.setdefault(task, {})[metric] = Measure(float(value), own)
    return told


def changes(original: Mapping[str, Any], quantized: Mapping[str, Any]) -> dict[str, dict[str, Measure]]:
    """Task -> metric -> quantized minus original, paired by question, with its standard error.

    Of metrics that are numbers for each question (``acc``, ``acc_norm``): pairing takes out what makes questions hard.
    """
    told: dict[str, dict[str, Measure]] = {}
    for task, rows in quantized.get("samples", {}).items():
        pairs = list(zip(original["samples"][task], rows, strict=True))
        for metric in rows[0].get("metrics", ()) if rows else ():
            values = [(one.get(metric), two.get(metric)) for one, two in pairs]
            if all(isinstance(a, float | int) and isinstance(b, float | int) for a, b in values):
                told.setdefault(task, {})[metric] = mean_of([b - a for a, b in values], [1] * len(values))
    return told
