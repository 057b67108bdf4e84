"""verify: the report on a job's quantized checkpoint, what the recipe says of it, and the verdict beside its engine.

The report is an artifact of its own, ``WORK/RECIPE/quality``: made once for a checkpoint and a text. What is good
enough (``accept``) is asked anew each time. A verdict lies beside an engine (``accuracy``); where there is no engine
yet, the same command writes it once there is one, from the report at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from toolchain import __version__, accuracy, workspace
from toolchain.checkpoint import Checkpoint, read_json
from toolchain.endpoint import Endpoint
from toolchain.engine import Engine
from toolchain.errors import ArtifactError, PlanError
from toolchain.pipeline.job import Job
from toolchain.pipeline.state import state_of
from toolchain.planning.gate import only_running_tells
from toolchain.planning.plan import Plan, make_plan
from toolchain.quality.held_out import held_out_rows
from toolchain.quantization import KV
from toolchain.quantizers.samples import open_tokenizer
from toolchain.recipe import Accept
from toolchain.stages import verify as stage

MEASURES = ("perplexity_ratio", "kl", "top1_agreement")
WEIGHTS, ENGINE = "weights", "engine"
"""The two parts of a verdict: what the checkpoint was found to be, and what a running engine answered."""


@dataclass(frozen=True)
class Capacity:
    """What a cache of one format costs on the job's device."""

    kv: str
    tokens: int | None
    """Of one service; None where the plan does not fit with it."""
    sequences: int | None
    """At full length."""
    bytes_per_token: int | None


@dataclass(frozen=True)
class Judgment:
    """What came of it."""

    passed: bool
    judged: str
    """Which model of the report: ``"weights"``, or the cache's format."""
    failures: tuple[str, ...]
    summary: str
    report: dict[str, Any]
    folder: Path
    """Where the report lies."""
    accept: dict[str, Any]
    advice: tuple[str, ...] = ()
    capacities: tuple[Capacity, ...] = ()
    verdict: Path | None = None
    notes: tuple[str, ...] = field(default=())


def verify(job: Job, *, text: str, samples: int, tokens: int, reference: Path | None = None) -> Judgment:
    """Measure the job's checkpoint unless that was done, judge it, and write the verdict beside its engine.

    ``reference``: the unquantized model, where the recipe's is quantized already. Raises ArtifactError where the
    checkpoint is missing or stale, PlanError where there is nothing to compare it with.
    """
    quantized, key = quantized_checkpoint(job)
    original = Checkpoint.open(reference) if reference else job.original()
    if original.quantization is not None:
        raise PlanError(
            f"{original.path}: is quantized itself, so it is no measure of what quantization changed",
            hint="Name the unquantized model: --reference DIR",
        )
    if tokens > original.config.max_position_embeddings:
        most = original.config.max_position_embeddings
        raise PlanError(f"--tokens {tokens}: the model knows {most} positions", hint=f"--tokens {most}")
    data = job.recipe.calibration.data if job.plan.calibrates else None
    rows = held_out_rows(text, original.path, samples=samples, tokens=tokens, calibration=data)
    kvs, notes = _caches(job.plan)
    folder = job.folder / "quality"
    rounds = job.plan.backend != "openvino"
    inputs = {
        "verify_version": stage.VERSION,
        "checkpoint": key,
        "original": original.fingerprint,
        "text": rows.digest,
        "kv": list(kvs),
        "rounds_inputs": rounds,
    }
    if not state_of("quality", folder, inputs).fresh:
        with workspace.draft(folder, "verify", inputs) as draft:
            stage.verify(
                original,
                quantized,
                draft,
                kvs=kvs,
                rounds_inputs=rounds,
                samples=rows,
                progress=job.progress,
                place=job.place,
            )
            draft.commit(versions={"scalellm": __version__}, recipe=job.recipe.text)
    judged = judge(read_json(folder / stage.REPORT), job, folder, notes)
    return _with_verdict(judged, job, key)


@dataclass(frozen=True)
class Answers:
    """What came of asking a running engine."""

    passed: bool
    failures: tuple[str, ...]
    summary: str
    report: dict[str, Any]
    file: Path
    accept: dict[str, Any]
    verdict: Path | None = None
    notes: tuple[str, ...] = ()


def verify_endpoint(job: Job, endpoint: Endpoint, *, text: str, samples: int, tokens: int) -> Answers:
    """Ask a running engine to continue ``samples`` texts, and compare with the checkpoint that it was built from.

    ``tokens`` are those of a prompt and its answer together, half of each, within the engine's limits. The verdict is
    written beside the job's engine: that this is the engine behind the endpoint, the caller vouches for.
    """
    quantized, key = quantized_checkpoint(job)
    limits = job.plan.limits
    tokens = min(tokens, limits.max_seq_len, quantized.config.max_position_embeddings)
    prompt = max(4, min(tokens // 2, limits.max_input_len) - 2)  # a text may take a token more the second time
    data = job.recipe.calibration.data if job.plan.calibrates else None
    rows = held_out_rows(text, quantized.path, samples=samples, tokens=prompt, calibration=data)
    kv = job.plan.kv.name if job.plan.kv.quant_algo and job.plan.backend != "openvino" else None
    tokenizer = open_tokenizer(quantized.path)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in rows.token_ids.tolist()]
    answers = stage.ask(
        endpoint,
        [text.strip("\ufffd") for text in texts],  # without half a character
        tokenizer,
        max_tokens=max(1, tokens // 2 - 2),
        progress=job.progress,
    )
    report = stage.answers_report(
        quantized,
        answers,
        job.folder,
        kv=kv,
        rounds_inputs=job.plan.backend != "openvino",
        progress=job.progress,
        place=job.place,
    )
    accept = job.recipe.accept or Accept()
    failures = accept.failures(report["measures"])
    numbers = ", ".join(f"{name} {_shown(one)}" for name, one in report["measures"].items())
    summary = (
        f"{len(answers)} greedy answers of {endpoint.http_url} against the checkpoint's own forward pass: {numbers}"
    )
    found = Answers(not failures, tuple(failures), summary, report, job.folder / stage.ANSWERS, accept.model_dump())
    part = {
        "passed": found.passed,
        "summary": summary,
        "accept": found.accept,
        "failures": failures,
        "measures": report["measures"],
    }
    file, notes = _beside_engine(job, key, ENGINE, part)
    return replace(found, verdict=file, notes=notes)


def _beside_engine(
    job: Job, checkpoint: str, kind: str, part: Mapping[str, Any]
) -> tuple[Path | None, tuple[str, ...]]:
    """Write one part of the verdict on the job's engine. -> its file, or None and why there is none."""
    try:
        engine = Engine.open(job.folder / "engine")
    except ArtifactError:
        again = f"once there is, scalellm verify --recipe {job.spoken} writes the verdict beside it"
        return None, (f"there is no engine here yet: {again}",)
    if engine.passport.checkpoint != checkpoint:
        return None, (f"{engine.path}: was built from another checkpoint: no verdict",)
    file = record(engine, kind, part, running=only_running_tells(job.plan))
    if file is not None:
        return file, ()
    command = f"scalellm verify --recipe {job.spoken} --endpoint http://HOST:PORT"
    return None, (
        "this does not open the gate: the plan doubts the engine's kernels, which weights do not show. Serve it "
        f"for the comparison only (scalellm serve --allow-unverified), then: {command}",
    )


def judge(report: Mapping[str, Any], job: Job, folder: Path, notes: Sequence[str] = ()) -> Judgment:
    """What the recipe's ``accept`` says of a report."""
    accept = job.recipe.accept or Accept()
    models = report["models"]
    name = job.plan.kv.name if job.plan.kv.name in models else stage.WEIGHTS
    failures = accept.failures(_judged(report, name))
    text = report["text"]
    what = f"weights {report['quant_algo'] or 'unquantized'}"
    if name != stage.WEIGHTS:
        what += f" and a simulated {name} cache"
    one = models[name]
    numbers = ", ".join(f"{key} {_shown(one[key])}" for key in MEASURES)
    advice, capacities = _advice(report, job, name, accept)
    return Judgment(
        passed=not failures,
        judged=name,
        failures=tuple(failures),
        summary=f"{what} against the unquantized model on {text['sequences']} x {text['tokens']} tokens: {numbers}",
        report=dict(report),
        folder=folder,
        accept=accept.model_dump(),
        advice=advice,
        capacities=capacities,
        notes=tuple(notes),
    )


def _shown(measure: Mapping[str, float | None]) -> str:
    value, error = measure["value"], measure["error"]
    if value is None:
        return "not a number"
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def _judged(report: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The measures that ``accept`` has limits for, of one model of a report."""
    found = {key: report["models"][name][key] for key in MEASURES}
    if name != "int8":
        return found
    used = [max(one["k_amax"], one["v_amax"]) / (127 * one["scale"]) for one in report["caches"][name]]
    return {**found, "int8_kv_range": {"value": min(used), "error": None}}


def quantized_checkpoint(job: Job) -> tuple[Checkpoint, str]:
    """The quantized checkpoint, if it is what the recipe says, and its key."""
    state = job.states()[0]
    if not state.fresh:
        raise ArtifactError(
            f"{state.folder}: the checkpoint is not up to date: {'; '.join(state.reasons)}",
            hint=f"scalellm quantize --recipe {job.spoken}",
        )
    return Checkpoint.open(state.folder), workspace.require(state.folder, "checkpoint").key


def _caches(plan: Plan) -> tuple[tuple[str, ...], list[str]]:
    """Which caches are simulated: the plan's, and what it could fall back to; and what is not."""
    if plan.kv.quant_algo is None:
        return (), []
    if plan.backend == "openvino":
        return (), ["the u8 cache of openvino makes its scales while running: compare the running engine (--endpoint)"]
    if plan.kv.name == "int8" and KV["fp8"].needs <= plan.device.dtypes:
        return ("int8", "fp8"), []
    return (plan.kv.name,), []


def _advice(
    report: Mapping[str, Any], job: Job, name: str, accept: Accept
) -> tuple[tuple[str, ...], tuple[Capacity, ...]]:
    """Whether the cache is at fault, and what to fall back to: int8, fp8 where the device has it, 16 bits."""
    if name == stage.WEIGHTS:
        return (), ()
    order = [kv for kv in ("int8", "fp8") if kv in report["models"]]
    capacities = tuple(_capacity(job, kv) for kv in (*order, "fp16"))
    if not accept.failures(_judged(report, name)):
        return (), capacities
    if accept.failures(_judged(report, stage.WEIGHTS)):
        return ("the weights alone do not pass: another method, smaller groups, or more bits",), capacities
    after = [kv for kv in order[order.index(name) + 1 :] if not accept.failures(_judged(report, kv))]
    better = after[0] if after else "fp16"
    costs = {one.kv: one for one in capacities}
    tokens = costs[better].tokens
    room = f"{tokens} tokens of cache instead of {costs[name].tokens}" if tokens else "which does not fit this device"
    return (f"the weights pass and the {name} cache does not: kv_cache: {{dtype: {better}}} ({room})",), capacities


def _capacity(job: Job, kv: str) -> Capacity:
    recipe = job.plan.recipe
    cache = recipe.kv_cache.model_copy(update={"dtype": kv, "max_tokens": None})
    changed = recipe.model_copy(update={"kv_cache": cache}).from_file(recipe.text, recipe.path)
    try:
        memory = make_plan(changed, job.plan.config, draft=job.draft.plan.config if job.draft else None).memory
    except PlanError:
        return Capacity(kv, None, None, None)
    return Capacity(kv, memory.max_kv_tokens, memory.sequences_at_full_length, memory.kv_bytes_per_token)


def _with_verdict(found: Judgment, job: Job, checkpoint: str) -> Judgment:
    """The judgment on the weights beside the engine that was made from them, where there is one."""
    part = {
        "passed": found.passed,
        "summary": found.summary,
        "judged": found.judged,
        "accept": found.accept,
        "failures": list(found.failures),
        "measures": _judged(found.report, found.judged),
    }
    file, notes = _beside_engine(job, checkpoint, WEIGHTS, part)
    return replace(found, verdict=file, notes=(*found.notes, *notes))


def record(engine: Engine, kind: str, part: Mapping[str, Any], *, running: bool) -> Path | None:
    """Join one part (``WEIGHTS`` or ``ENGINE``) to the verdict beside an engine. -> its file; None where it is open.

    With ``running``, only what the running engine answered can make it a good one; bad news always counts.
    """
    digest = accuracy.digest_of(engine.stamp.files)
    before = accuracy.read_verdict(engine.path, digest)
    parts = {**(before.measured if before else {}), kind: dict(part)}
    passed = all(one["passed"] for one in parts.values())
    if passed and running and ENGINE not in parts:
        accuracy.file_of(engine.path, digest).unlink(missing_ok=True)  # of weights that were found wrong before
        return None
    told = [f"{name}: {one['summary']}" for name, one in parts.items() if one["passed"] == passed]
    accuracy.write_verdict(engine.path, digest, passed=passed, summary="; ".join(told), measured=parts)
    return accuracy.file_of(engine.path, digest)
