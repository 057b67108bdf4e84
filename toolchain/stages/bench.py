"""bench: running services -> a report of TTFT, ITL, end-to-end latency and throughput, with every request's times.

It starts no server and prints nothing. Each combination of prompt length and load is one run; warm-up requests go
before each, with prompts of their own, and are not in the report.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from toolchain import __version__
from toolchain.errors import EndpointError, RejectedError
from toolchain.measuring import load, prompts, report
from toolchain.measuring.doors import Door, counting_drafts
from toolchain.measuring.load import Raw, Task
from toolchain.measuring.memory import Watch
from toolchain.measuring.prompts import Prompt, Tokens
from toolchain.measuring.report import Conditions, Load, Pattern, Prediction, Report, Run, Service
from toolchain.progress import Progress

__all__ = ["Asked", "Door", "Load", "Provenance", "Tokens", "bench"]


@dataclass(frozen=True)
class Asked:
    """What is to be measured."""

    loads: tuple[Load, ...]
    lengths: tuple[int, ...] = prompts.LENGTHS
    """Of role-play prompts; ignored with a file."""
    output_tokens: int | None = None
    """None: what is left of ``prompts.TOTAL``, or what the file says."""
    file: Path | None = None
    """JSONL or ShareGPT."""
    requests: int = 30
    """Measured, for each service and run."""
    warmup: int = 3
    pattern: Pattern = "simultaneous"
    stagger_s: float | None = None
    """None: the warm-up's median answer divided by the number of services."""
    seed: int = 0


@dataclass(frozen=True)
class Provenance:
    """What is known of the services besides what they say."""

    title: str
    simulated: bool = False
    device: str | None = None
    engine: dict[str, Any] | None = None
    recipe: str | None = None
    predicted: Prediction | None = None


def bench(doors: Sequence[Door], asked: Asked, tokens: Tokens, known: Provenance, progress: Progress) -> Report:
    """Raises EndpointError when a service is not there or answers no warm-up request; later failures are recorded.

    Of services on this machine, the memory of their processes is sampled meanwhile.
    """
    for one in asked.loads:
        load.check(Task((), one, asked.pattern, asked.requests))
    lengths = asked.lengths if asked.file is None else (0,)
    sets = [(one, _prompts(asked, tokens, length, at)) for length in lengths for at, one in enumerate(asked.loads)]
    doors = [counting_drafts(door) for door in doors]
    services = tuple(Service(door=door.kind, url=door.url, model=door.model, server=door.about()) for door in doors)
    runs = [_run(doors, asked, one, made, tokens, progress) for one, made in sets]
    return Report(
        title=known.title,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        simulated=known.simulated,
        device=known.device,
        services=services,
        runs=tuple(runs),
        client=_client(),
        engine=known.engine,
        recipe=known.recipe,
        predicted=known.predicted,
        watched=Watch([door.url for door in doors]).watched,
    )


def _prompts(asked: Asked, tokens: Tokens, length: int, run: int) -> list[Prompt]:
    """The prompts of a run: ``warmup`` of them first, then those that are measured.

    No run has a prompt of another: a server that keeps the cache of prompts would answer a known one at once. A file's
    prompts are taken on from where the run before ended, and from its beginning again when it is at its end.
    """
    number = asked.warmup + asked.requests
    if asked.file is not None:
        found = prompts.from_file(asked.file, tokens.of_prompt, asked.output_tokens, number * (run + 1))
        return [found[(run * number + index) % len(found)] for index in range(number)]
    output = asked.output_tokens or prompts.TOTAL - length
    if output < 1:
        raise RejectedError(
            f"a prompt of {length} tokens leaves nothing of {prompts.TOTAL} for an answer", hint="--output-tokens N"
        )
    return prompts.roleplay(tokens.of_prompt, length, number, output, seed=f"{asked.seed} {run}")


def _run(
    doors: Sequence[Door], asked: Asked, one: Load, made: Sequence[Prompt], tokens: Tokens, progress: Progress
) -> Run:
    first, measured = made[: asked.warmup], made[asked.warmup :]
    task = Task(measured, one, asked.pattern, asked.requests)
    size = report.lengths([prompt.input_tokens for prompt in measured])
    with progress.task(
        f"{size or 'mixed'} tokens, {one}", (asked.requests + asked.warmup) * len(doors), "requests"
    ) as bar:
        warm = _warm_up(doors, asked, first, lambda: bar.advance(1))
        with Watch([door.url for door in doors]) as watch:
            raw = load.send(doors, replace(task, stagger_s=_stagger(asked, warm, len(doors))), lambda: bar.advance(1))
    requests = load.requests_of(raw, measured, lambda answer: tokens.of_answer(answer.text))
    conditions = Conditions(
        prompt_set="roleplay" if asked.file is None else asked.file.name,
        prompts_sha256=prompts.digest(measured),
        distinct_prompts=len({prompt.text for prompt in measured}),
        input_tokens=size,
        output_tokens=report.lengths([prompt.max_tokens for prompt in measured]),
        load=one,
        pattern=asked.pattern,
        services=len(doors),
        requests=asked.requests,
        warmup=asked.warmup,
        streaming=all(answer.arrivals or answer.error for answer in raw),
        sampling=_sampling(doors[0]),
        counted_by=f"tokenizer {tokens.sha256[:16]}",
    )
    return Run(
        conditions=conditions,
        wall_s=max(request.done_s for request in requests),
        requests=requests,
        memory=watch.samples(min(one.scheduled for one in raw)),
    )


def _warm_up(doors: Sequence[Door], asked: Asked, first: Sequence[Prompt], done: Any) -> list[Raw]:
    """Each service by itself, one request after the other."""
    if not first:
        return []
    task = Task(first, Load(kind="closed", concurrency=1), "one-at-a-time", len(first))
    raw = load.send(doors, task, done)
    for service, door in enumerate(doors):
        own = [one for one in raw if one.service == service]
        if all(one.error for one in own):
            raise EndpointError(
                f"{door.url}: not one warm-up request was answered: {own[0].error}", hint="see the server's log"
            )
    return raw


def _stagger(asked: Asked, warm: Sequence[Raw], services: int) -> float:
    if asked.pattern != "staggered" or services == 1:
        return 0.0
    if asked.stagger_s is not None:
        return asked.stagger_s
    took = [one.done - one.scheduled for one in warm if not one.error]
    if not took:
        raise RejectedError("without warm-up, staggered services need a distance", hint="--stagger SECONDS")
    return median(took) / services


def _sampling(door: Door) -> str:
    words = ["greedy", *(["end of text ignored"] if door.ignore_eos else [])]
    return ", ".join([*words, *([json.dumps(dict(door.extra), sort_keys=True)] if door.extra else [])])


def _client() -> dict[str, str | int]:
    return {
        "scalellm": __version__,
        "python": platform.python_version(),
        "tritonclient": version("tritonclient"),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
