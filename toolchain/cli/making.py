"""The verbs that make: commands, quantize, convert, build, package."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain.cli.flags import (
    common,
    host_flag,
    open_job,
    open_screen,
    place_flags,
    recipe_flags,
    stage_flags,
    targets_flag,
)
from toolchain.errors import ScalellmError

if TYPE_CHECKING:
    from toolchain.console import Screen
    from toolchain.pipeline import Job, Result, State


@click.command()
@recipe_flags
@host_flag
@common
def commands(recipe: str, model: str | None, work: Path, on: tuple[str, ...], json_output: bool, verbose: int) -> None:
    """Print the command lines of a recipe, ready to paste; run none of them.

    For a TensorRT-LLM engine: all that scalellm build runs on the host that --on names, with the exact trtllm-build of
    the plan's release. The authors had no GPU to try these lines on.

    \b
    Examples:
      scalellm commands --recipe rtx4090
      scalellm commands --recipe rtx4090 --on container
      scalellm commands --recipe t4 --json
    """
    from dataclasses import asdict

    from toolchain.stages.commands import commands as lane_of

    screen = open_screen(json_output, verbose)
    job = open_job(screen, recipe, model, work, on=on)
    built = job.host_commands(job.folder / "trtllm-engine")
    lane, release = lane_of(job.plan, job.spoken, model, work, built), job.plan.release
    if job.draft:
        drafted = job.draft.host_commands(job.draft.folder / "trtllm-engine")
        lane = lane.with_draft(lane_of(job.draft.plan, job.spoken, None, job.folder, drafted))
    screen.emit(
        {
            "recipe": job.recipe.name,
            "backend": job.plan.backend,
            "tensorrt_llm": release.version if release else None,
            "container": release.container if release else None,
            "steps": [asdict(step) for step in lane.steps],
            "notes": lane.notes,
        }
    )
    for step in lane.steps:
        for line in step.lines():
            screen.say(line)
    for note in lane.notes:
        screen.say(f"# note: {note}")


@click.command()
@stage_flags
@place_flags("--device")
def quantize(**flags: Any) -> None:
    """Quantize the model, a layer at a time, into the unified Hugging Face layout.

    Interrupted work continues at the layer in hand.

    \b
    Examples:
      scalellm quantize --recipe rtx4090 --model ./Llama-2-13b-chat-hf
      scalellm quantize --recipe rtx4090 --max-ram 4GiB --device cpu
    """
    _run("checkpoint", **flags)


@click.command()
@stage_flags
@targets_flag
@place_flags()
def convert(**flags: Any) -> None:
    """Write the TensorRT-LLM checkpoint that trtllm-build takes, from the quantized checkpoint. Needs no GPU.

    \b
    Example:
      scalellm convert --recipe rtx4090 --model ./Llama-2-13b-chat-hf
    """
    _run("trtllm-checkpoint", **flags)


@click.command()
@stage_flags
@targets_flag
@place_flags()
@host_flag
def build(**flags: Any) -> None:
    """Plan, quantize, build the engine and emit the Triton model repository; skip what is fresh.

    \b
    Examples:
      scalellm build --recipe rtx4090.yaml --model ./Llama-2-13b-chat-hf
      scalellm build --recipe tiny --explain
      scalellm build --recipe llama2-13b --device rtx4090,l4,t4,a100-80gb --on rtx4090=ssh:gpu-box
    """
    _run("repository", **flags)


@click.command()
@click.option("--allow-unverified", is_flag=True, help="Also an engine that failed or was never verified.")
@stage_flags
def package(
    recipe: str,
    model: str | None,
    work: Path,
    allow_unverified: bool,
    explain: bool,
    json_output: bool,
    verbose: int,
) -> None:
    """Emit the Triton model repository of a finished engine. Refuses where the engine is missing or stale.

    An engine that was found wrong, or was never verified though its recipe or plan asks for that, is refused, too.
    (build emits its repository all the same: an engine has to run before its answers can be compared.)

    \b
    Example:
      scalellm package --recipe tiny
    """
    screen = open_screen(json_output, verbose)
    job = open_job(screen, recipe, model, work)
    engine = next(state for state in job.states() if state.name == "engine")
    if not engine.fresh and not explain:
        from toolchain.errors import ArtifactError

        raise ArtifactError(
            f"{engine.folder}: the engine is not up to date: {'; '.join(engine.reasons)}",
            hint=f"scalellm build --recipe {recipe}",
        )
    if not explain:
        from toolchain.admission import Asked, check_engine
        from toolchain.engine import Engine

        asked = Asked(recipe, job.recipe, allow_unverified=allow_unverified)
        for note in check_engine(Engine.open(engine.folder), asked).notes:
            screen.note(f"note: {note}")
    screen.emit(run_job(screen, job, "repository", explain))


def _run(
    until: str,
    recipe: str,
    model: str | None,
    work: Path,
    explain: bool,
    json_output: bool,
    verbose: int,
    targets: tuple[str | None, ...] = (None,),
    **place: Any,
) -> None:
    """One job, or one for each target device: then a device that fails does not stop the others."""
    screen = open_screen(json_output, verbose)
    for one in place.get("on", ()):
        device, named, _ = one.partition("=")
        if named and device not in targets:
            raise click.UsageError(f"--on {one}: --device does not name {device}")
    if targets == (None,):
        job = open_job(screen, recipe, model, work, **place)
        screen.emit(run_job(screen, job, until, explain))
        return
    told: dict[str, Any] = {}
    failed: dict[str, ScalellmError] = {}
    for target in targets:
        screen.say(f"== {target}")
        try:
            job = open_job(screen, recipe, model, work, target=target, **place)
            told[str(target)] = run_job(screen, job, until, explain)
        except ScalellmError as error:
            failed[str(target)] = error
            told[str(target)] = {"error": error.message, "hint": error.hint}
            screen.note(f"{error.message}\n  try: {error.hint}" if error.hint else error.message)
    screen.emit(told)
    if failed:
        screen.note(f"error: not made for {', '.join(failed)}; made for {_listed(told, failed)}")
        sys.exit(next(reversed(failed.values())).exit_code)


def _listed(told: Mapping[str, Any], failed: Mapping[str, Any]) -> str:
    return ", ".join(target for target in told if target not in failed) or "none"


def run_job(screen: Screen, job: Job, until: str, explain: bool = False, *, then: bool = True) -> Any:
    """Make what is stale up to ``until``, or with ``explain`` only say what that would be. -> what --json prints.

    ``then``: say what to type next.
    """
    if explain:
        states = [state for state in job.states() if job.names.index(state.kind) <= job.names.index(until)]
        return [_explained(screen, job, state) for state in states]
    for warning in job.plan.warnings:
        screen.note(f"note: {warning}")
    for decision in job.plan.decisions:
        screen.detail(f"plan: {decision.name} = {decision.value}: {decision.reason}")
    results = job.run(until, on_result=lambda result: screen.say(_report(result)))
    if all(result.action == "kept" for result in results):
        screen.say("Nothing to do: everything is up to date.")
    if until == "repository" and then:
        device = f" --device {job.target}" if job.target else ""
        screen.say(f"Next: scalellm serve --recipe {job.spoken}{device} --work {job.work}")
    return {
        "recipe": job.recipe.name,
        "artifacts": {
            r.state.name: {"folder": r.state.folder, "action": r.action, "seconds": r.seconds, "key": r.key}
            for r in results
        },
    }


def _explained(screen: Screen, job: Job, state: State) -> dict[str, Any]:
    """Say what would be done about one artifact, with the foreign command lines of an engine -> the same for --json."""
    from toolchain.stages.commands import paste

    screen.say(_explain(state))
    owner = job.draft if job.draft and state.name != state.kind else job
    commands = () if state.fresh or state.kind != "engine" else owner.host_commands()
    for command in commands:
        screen.say(f"# {command.says} ({command.where})\n{paste(command.argv)}")
    return {**vars(state), "stage": state.stage, **({"commands": [vars(one) for one in commands]} if commands else {})}


def _explain(state: State) -> str:
    if state.fresh:
        return f"{state.stage}: up to date ({state.folder})"
    verb = "to do" if state.reasons == ("there is none yet",) else "again"
    return f"{state.stage}: {verb}, {'; '.join(state.reasons)}"


def _report(result: Result) -> str:
    from toolchain.units import format_seconds

    if result.action == "kept":
        return f"{result.state.name}: up to date, kept ({result.state.folder})"
    why = "" if result.state.reasons == ("there is none yet",) else f" because {'; '.join(result.state.reasons)}"
    return f"{result.state.name}: made in {format_seconds(result.seconds)}{why} ({result.state.folder})"
