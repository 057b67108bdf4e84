"""The verb verify: what quantization changed, as a table, and whether the recipe accepts it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain.cli.flags import PATH, common, open_job, open_screen, place_flags, recipe_flags

if TYPE_CHECKING:
    from toolchain.console import Screen
    from toolchain.endpoint import Endpoint
    from toolchain.pipeline import Job
    from toolchain.pipeline.tasks import TaskReport
    from toolchain.pipeline.verifying import Answers, Judgment

_SHOWN_LAYERS = 8


@click.command()
@recipe_flags
@click.option("--device", "target", metavar="DEVICE", help="Of several devices that it was built for, this one.")
@click.option(
    "--text",
    default="builtin",
    show_default=True,
    metavar="FILE|builtin|hf:ORG/NAME",
    help="Text to measure on, that the model was not calibrated on; builtin: the reference of the Python language.",
)
@click.option("--samples", type=click.IntRange(1, 2**20), default=32, show_default=True, help="Rows of text.")
@click.option("--tokens", type=click.IntRange(8, 2**20), default=512, show_default=True, help="Tokens in each row.")
@click.option("--reference", type=PATH, metavar="DIR", help="The unquantized model, where the recipe's is quantized.")
@click.option(
    "--endpoint", metavar="URL", help="Ask the engine that runs there, such as http://127.0.0.1:8000, instead."
)
@click.option("--triton-model", default="tensorrt_llm_bls", show_default=True, help="With --endpoint: whom to ask.")
@click.option(
    "--tasks",
    multiple=True,
    metavar="NAME|FILE.yaml",
    help="Accuracy in the lm-evaluation-harness instead: its tasks, or files as it reads them.",
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="With --tasks: so many questions of each.")
@click.option(
    "--greedy",
    type=click.IntRange(1, 4096),
    metavar="N",
    help="Instead: how many of N greedy tokens behind chat prompts are the unquantized model's; a pass over its "
    "weights for each. --text is role-play (builtin) or a file of chats.",
)
@place_flags()
@common
def verify(
    recipe: str,
    model: str | None,
    work: Path,
    target: str | None,
    text: str,
    samples: int,
    tokens: int,
    reference: Path | None,
    endpoint: str | None,
    triton_model: str,
    tasks: tuple[str, ...],
    limit: int | None,
    greedy: int | None,
    json_output: bool,
    verbose: int,
    **place: Any,
) -> None:
    """Measure what quantization changed: the checkpoint against the unquantized model, on text that neither has seen.

    Perplexity and its ratio, KL divergence and top-1 agreement of the next token, each with a standard error over the
    rows of text; the cache of a TensorRT-LLM engine is simulated, layer by layer. One layer is in memory at a time, and
    interrupted work continues. With --endpoint, greedy answers of a running engine are held against the checkpoint that
    it was built from, token by token: that shows wrong kernels, which weights do not. With --tasks, both models answer
    the questions of lm-eval's tasks, layer by layer too, and the difference is paired question by question; with both,
    the engine answers in writing. With --greedy, of the checkpoint or of a running engine, each model goes on by itself
    behind chat prompts, until the first other token.

    The exit code is 1 where the recipe's accept is not met; the verdict lies beside the engine, and serve heeds it.

    \b
    Examples:
      scalellm verify --recipe rtx4090
      scalellm verify --recipe t4 --text chats.jsonl --samples 64 --max-ram 6GiB
      scalellm verify --recipe tiny --endpoint http://127.0.0.1:8000 --tokens 128
      scalellm verify --recipe rtx4090 --tasks hellaswag --tasks my_questions.yaml --limit 500
      scalellm verify --recipe tiny --greedy 64 --samples 16 --tokens 256
    """
    from toolchain.pipeline import verifying

    if tasks and greedy:
        raise click.UsageError("--tasks and --greedy are two measurements: give one of them")
    screen = open_screen(json_output, verbose)
    job = open_job(screen, recipe, model, work, target=target, **place)
    running = _running(endpoint, triton_model)
    if tasks:
        _tasks(screen, job, tasks, limit, reference, running)
        return
    if greedy:
        _greedy(screen, job, running, text=text, samples=samples, tokens=tokens, count=greedy, reference=reference)
        return
    if running:
        answers = verifying.verify_endpoint(job, running, text=text, samples=samples, tokens=tokens)
        screen.emit(vars(answers))
        _show_answers(screen, answers)
        sys.exit(0 if answers.passed else 1)
    found = verifying.verify(job, text=text, samples=samples, tokens=tokens, reference=reference)
    screen.emit(_document(found))
    _show(screen, found)
    sys.exit(0 if found.passed else 1)


def _running(url: str | None, model: str) -> Endpoint | None:
    from toolchain.endpoint import Endpoint

    return Endpoint(url, "", model=model) if url else None


def _tasks(
    screen: Screen,
    job: Job,
    tasks: tuple[str, ...],
    limit: int | None,
    reference: Path | None,
    running: Endpoint | None,
) -> None:
    from toolchain.pipeline.tasks import verify_tasks, verify_tasks_of_endpoint

    if running:
        answered = verify_tasks_of_endpoint(job, tasks, running, limit=limit)
    else:
        answered = verify_tasks(job, tasks, limit=limit, reference=reference)
    screen.emit({**answered.report, "file": str(answered.file)})
    _show_tasks(screen, answered)


def _greedy(screen: Screen, job: Job, running: Endpoint | None, **asked: Any) -> None:
    from toolchain.pipeline.greedy import Asked, verify_greedy

    found = verify_greedy(job, Asked(**asked), running)
    screen.emit({**found.report, "file": str(found.file)})
    report = found.report
    screen.table(
        f"{report['text']['prompts']} greedy answers of at most {report['asked_tokens']} tokens to "
        f"{report['text']['source']}, beside the unquantized model's",
        ("model", "tokens before the first other one", "same to the end", "same token, after the same text"),
        [(_named(name, ""), *(_cell(value) for value in one.values())) for name, one in report["models"].items()],
    )
    screen.say(f"report: {found.file}")


def _document(found: Judgment) -> dict[str, Any]:
    shown = {key: value for key, value in vars(found).items() if key != "capacities"}
    return {**shown, "capacities": [vars(one) for one in found.capacities]}


def _show(screen: Screen, found: Judgment) -> None:
    text = found.report["text"]
    screen.table(
        f"{text['sequences']} x {text['tokens']} tokens of {text['source']}",
        ("model", "perplexity", "ratio", "KL (nats)", "same top-1"),
        [
            (_named(name, found.judged), *(_cell(one[key]) for key in _COLUMNS))
            for name, one in found.report["models"].items()
        ],
    )
    for kv, layers in found.report["caches"].items():
        screen.say()
        worst = sorted(layers, key=lambda one: -max(one["k_error"], one["v_error"]))[:_SHOWN_LAYERS]
        worst.sort(key=lambda one: int(one["layer"]))
        of = f"the worst {len(worst)} of {len(layers)} layers" if len(worst) < len(layers) else "all layers"
        screen.table(
            f"{kv} cache, {of}",
            ("layer", "max |K|", "max |V|", "K / V", "scale", "error of K", "error of V", "clipped"),
            list(_cache_rows(worst)),
        )
    if found.capacities:
        screen.say()
        screen.table(
            "what each cache holds",
            ("cache", "bytes a token", "tokens", "sequences at full length"),
            [(one.kv, *map(_count, (one.bytes_per_token, one.tokens, one.sequences))) for one in found.capacities],
        )
    screen.say()
    for line in (*found.failures, *found.advice):
        screen.say(f"{'not accepted' if line in found.failures else 'try'}: {line}")
    screen.say(f"{'accepted' if found.passed else 'not accepted'}: {found.summary}")
    screen.say(f"report: {found.folder / 'report.json'}" + (f"   verdict: {found.verdict}" if found.verdict else ""))
    for note in found.notes:
        screen.note(f"note: {note}")


def _show_tasks(screen: Screen, found: TaskReport) -> None:
    report = found.report
    models, changes = report["models"], report["changes"]
    screen.table(
        f"lm-eval {report['lm_eval']}" + (f", {report['limit']} questions of each task" if report["limit"] else ""),
        ("task", "questions", "metric", *models, *(["difference, paired"] if changes else [])),
        [
            (
                *(task, str(report["questions"].get(task, "-")), metric),
                *(_cell(one[task][metric]) for one in models.values()),
                *([_cell(changes[task][metric]) if metric in changes.get(task, {}) else "-"] if changes else []),
            )
            for task, row in [*models.values()][-1].items()
            for metric in row
        ],
    )
    screen.say(f"report: {found.file}")


def _show_answers(screen: Screen, found: Answers) -> None:
    measures = found.report["measures"]
    screen.table(
        f"{len(found.report['answers'])} greedy answers against the checkpoint's own forward pass",
        ("measure", "found", "what it is"),
        [(name, _cell(one), _MEANINGS[name]) for name, one in measures.items()],
    )
    screen.say()
    for line in found.failures:
        screen.say(f"not accepted: {line}")
    screen.say(f"{'accepted' if found.passed else 'not accepted'}: {found.summary}")
    screen.say(f"report: {found.file}" + (f"   verdict: {found.verdict}" if found.verdict else ""))
    for note in found.notes:
        screen.note(f"note: {note}")


_MEANINGS = {
    "greedy_agreement": "share of tokens that the checkpoint would give too",
    "agreement_length": "tokens before the first other one",
    "regret": "nats a token by which the checkpoint prefers its own choice",
    "log_prob_error": "nats a token between the log-probabilities of both",
}

_COLUMNS = ("perplexity", "perplexity_ratio", "kl", "top1_agreement")


def _named(name: str, judged: str) -> str:
    words = {"original": "original", "weights": "quantized", "engine": "engine"}.get(name, f"+ {name} cache")
    return f"{words} *" if name == judged else words


def _cell(measure: Mapping[str, float | None]) -> str:
    value, error = measure["value"], measure["error"]
    if value is None:
        return "not a number"
    digits = 2 if value >= 10 else 4
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _count(number: int | None) -> str:
    return "does not fit" if number is None else str(number)


def _cache_rows(layers: list[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for one in layers:
        ratio = "-" if one["k_to_v"] is None else f"{one['k_to_v']:.1f}"
        errors = (f"{100 * one[f'{name}_error']:.2f} %" for name in ("k", "v"))
        clipped = 100 * max(one["k_clipped"], one["v_clipped"])
        yield (
            str(one["layer"]),
            f"{one['k_amax']:.2f}",
            f"{one['v_amax']:.2f}",
            ratio,
            f"{one['scale']:.4g}",
            *errors,
            f"{clipped:.3f} %",
        )
