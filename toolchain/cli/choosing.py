"""The verbs that decide before anything is made: plan, which also compares, and init, which writes a recipe."""

from __future__ import annotations

import datetime
import json
import os
import shlex
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain.cli.flags import PATH, common, complete_recipe, open_job, open_screen, work_flag
from toolchain.cli.wish import GOALS, Wish, asked_for, choice_flags
from toolchain.errors import PlanError, RecipeError, ScalellmError

if TYPE_CHECKING:
    from toolchain.console import Screen
    from toolchain.planning.choice import Choice
    from toolchain.planning.choice_table import Sheet
    from toolchain.planning.option import Asked
    from toolchain.planning.plan import Plan


@click.command()
@click.option("-r", "--recipe", metavar="FILE|NAME", shell_complete=complete_recipe, help="The recipe to plan.")
@click.option("-m", "--model", metavar="DIR|ORG/NAME", help="Use this model instead of the recipe's, or without one.")
@work_flag()
@click.option("--device", "names", metavar="DEVICE[,DEVICE]|all", help="Instead of the recipe's; several are compared.")
@click.option("--goal", type=click.Choice(GOALS), help="Compare formats and devices: what is wanted most.")
@choice_flags
@click.option("--plot", type=PATH, metavar="FILE.svg|png|html", help="Draw memory, time to first token and score.")
@click.option("--explain", is_flag=True, help="Say where the rule behind each decision comes from.")
@click.option("--schema", is_flag=True, help="Print the JSON Schema of what --json prints.")
@common
def plan(
    recipe: str | None,
    model: str | None,
    work: Path,
    names: str | None,
    goal: str | None,
    plot: Path | None,
    explain: bool,
    schema: bool,
    json_output: bool,
    verbose: int,
    **wish: Any,
) -> None:
    """Say what will be done and why, and whether it fits; or compare what could be. Needs no GPU and makes nothing.

    With --goal, --slo, --services, --prompt, --price or several devices, every device is ranked with every pair of
    formats that its backends have: whether it fits, and our estimates of its speed and of what it costs.

    \b
    Examples:
      scalellm plan --recipe t4
      scalellm plan --recipe llama2-13b --device all --goal cost --slo ttft=1s,itl=50ms --plot plan.html
      scalellm plan --model meta-llama/Llama-2-13b-chat-hf --device rtx4090,l4 --services auto --price l4=0.6
    """
    screen = open_screen(json_output, verbose)
    wished = Wish(**wish)
    if schema:
        _print_schema()
        return
    if recipe is None and model is None:
        raise click.UsageError("Name a recipe (--recipe) or a model (--model).")
    _check_plot(plot)
    several = names is not None and ("," in names or names == "all")
    if recipe is not None and not (goal or wished.given or several):
        try:
            job = open_job(screen, recipe, model, work, target=names)
        except PlanError as error:
            asked = _asked_of(screen, recipe, model, work, names)
            if asked and plot:
                _draw_refused(screen, plot, asked)
            raise _with_alternative(error, asked) from error
        screen.emit({**job.plan.to_json(), "build_peaks": [vars(peak) for peak in job.peaks]})
        screen.plan(job.plan, job.source, job.peaks, explain=explain)
        if plot:
            _draw_plan(screen, plot, job.plan, _asked_of(screen, recipe, model, work, names))
        return
    asked, devices = asked_for(screen, recipe, model, work, names, wished)
    choice = _choose(asked, devices, goal or "ttft")
    if json_output:  # it is long, and made for nobody else
        screen.emit(choice.to_json())
    _show_choice(screen, choice, asked, plot, every=verbose > 0, explain=explain)


def _show_choice(
    screen: Screen, choice: Choice, asked: Asked, plot: Path | None, *, every: bool, explain: bool
) -> None:
    """The table and the pictures. Exits with a refused plan's code where nothing fits."""
    from toolchain.planning.choice_table import sheet

    shown = sheet(choice, asked.prices, every=every)
    screen.sheet_of(shown)
    if plot:
        _draw_choice(screen, plot, choice, asked, shown)
    if choice.best is None:
        screen.note("error: nothing of this fits" + _nearest(choice))
        sys.exit(PlanError.exit_code)
    if explain and choice.best.plan:
        screen.say()
        screen.plan(choice.best.plan, asked.recipe.model, explain=True)


def _print_schema() -> None:
    from toolchain.planning import plan_schema

    click.echo(json.dumps(plan_schema.schema(), indent=2))


def _check_plot(file: Path | None) -> None:
    from toolchain.drawing import check

    if file:
        check(file)


def _asked_of(screen: Screen, recipe: str, model: str | None, work: Path, name: str | None) -> Asked | None:
    """What the recipe asks for on its device, with nothing wished beside it; None where that itself is refused."""
    from toolchain.variant import for_device

    try:
        asked, devices = asked_for(screen, recipe, model, work, name, Wish())
        return replace(asked, recipe=for_device(asked.recipe, devices[0]))
    except ScalellmError:
        return None


def _with_alternative(error: PlanError, asked: Asked | None) -> PlanError:
    """The refusal of a recipe, with what works that is most like it; as it was where nothing does."""
    from toolchain.planning.alternative import alternative, told

    try:
        found = alternative(asked) if asked else None
    except ScalellmError:
        return error
    hint = "\n".join(filter(None, (error.hint, told(found, asked.recipe) if found and asked else "")))
    return PlanError(error.message, hint=hint, reasons=error.reasons)


def _draw_plan(screen: Screen, file: Path, plan: Plan, asked: Asked | None) -> None:
    from toolchain.drawing import plans, save
    from toolchain.planning.option import options

    if asked is None:
        return
    figures = list(plans.plan_figures(plan, asked, list(options(asked, plan.device.name))))
    save(figures, file, title=f"{plan.recipe.name}: {asked.recipe.model} on the {plan.device.title}")
    screen.say(f"Plot: {file}")


def _draw_refused(screen: Screen, file: Path, asked: Asked) -> None:
    """The memory of a recipe that does not fit; nothing where it is refused for another reason."""
    from toolchain.drawing import plans, save
    from toolchain.planning.plan import memory_of

    with suppress(PlanError):
        memory = memory_of(asked.recipe, asked.config, draft=asked.draft, host_memory_bytes=asked.host_memory_bytes)
        title = f"{asked.recipe.name}: {asked.recipe.model} does not fit"
        save(plans.refused_figures(asked, memory), file, title=title)
        screen.note(f"Plot: {file}")


def _draw_choice(screen: Screen, file: Path, choice: Choice, asked: Asked, shown: Sheet) -> None:
    from toolchain.drawing import Table, plans, save

    rows = Table("What was compared", shown.columns, shown.rows, shown.title, frozenset({0, 1, 2, 3, 14, 15}))
    title = f"{asked.recipe.model}: where and how to serve it"
    save([*plans.choice_figures(choice, asked), rows], file, title=title, about=[shown.title])
    screen.say(f"Plot: {file}")


def _nearest(choice: Choice) -> str:
    hint = next((one.nearest for one in choice.ranked if one.nearest), "")
    return f"\n  try: {hint}" if hint else ""


def _choose(asked: Asked, names: list[str], goal: str) -> Choice:
    from toolchain.planning.choice import choose

    return choose(asked, names, goal, datetime.date.today())


@click.command()
@click.option("-m", "--model", metavar="DIR|ORG/NAME", help="The model that is to be served.")
@click.option("--device", "names", metavar="DEVICE[,DEVICE]|all", help="Where; of several the best one is taken.")
@click.option("--goal", type=click.Choice(GOALS), help="What is wanted most.")
@choice_flags
@click.option("-o", "--out", type=PATH, metavar="FILE", help="The recipe's file. [default: MODEL-DEVICE.yaml]")
@click.option("--force", is_flag=True, help="Overwrite the file.")
@work_flag()
@common
def init(
    model: str | None,
    names: str | None,
    goal: str | None,
    out: Path | None,
    force: bool,
    work: Path,
    json_output: bool,
    verbose: int,
    **wish: Any,
) -> None:
    """Write a recipe for a model, a device and a goal, with the reasons and the numbers in comments.

    Asks for what no flag says. Says at the end which command line it stands for, and what to type next.

    \b
    Examples:
      scalellm init
      scalellm init --model meta-llama/Llama-2-13b-chat-hf --device rtx4090 --goal ttft --slo ttft=1s -o mine.yaml
    """
    screen = open_screen(json_output, verbose)
    wished = Wish(**wish)
    model = model or _ask("Model: a folder, or ORG/NAME", flag="--model")
    names = names or _ask_device()
    goal = goal or _ask("Wanted most", flag="--goal", kind=click.Choice(GOALS), default="ttft")
    asked, devices = asked_for(screen, None, model, work, names, wished)
    choice = _choose(asked, devices, goal)
    best = choice.best
    if best is None:
        from toolchain.planning.choice import best_of_each

        told = "".join(f"\n  - {one.title}: {one.why_not}" for one in best_of_each(choice.ranked))
        raise PlanError(f"{model}: nothing of this fits:{told}", hint="\n".join(_nearest(choice).splitlines()[1:])[7:])
    from toolchain.planning.starter import name_of, recipe_text

    file = out or Path(f"{name_of(model, best.device)}.yaml")
    words = ["scalellm", "init", "--model", model, "--device", names, "--goal", goal, *wished.words()]
    words += ["-o", str(file)]
    text = recipe_text(choice, best, model, shlex.join(words))
    _write(file, text, force=force)
    screen.emit({"file": file, "option": best.name, "command": shlex.join(words)})
    screen.say(f"{file}: {best.title}, weights {best.weights}, cache {best.kv}, services {best.services}")
    screen.say(f"The same again: {shlex.join(words)} --force")
    screen.say(f"Next: scalellm build --recipe {file}   # or first: scalellm plan --recipe {file}")


def _ask(text: str, *, flag: str, kind: Any = None, default: str | None = None) -> str:
    """The person's answer. Raises UsageError that names the flag where nobody can be asked."""
    try:
        return str(click.prompt(text, type=kind, default=default, err=True))
    except click.Abort as error:
        if sys.stdin.isatty():
            raise
        raise click.UsageError(f"{flag} is missing, and there is nobody to ask.") from error


def _ask_device() -> str:
    from toolchain.device import closest_device, devices, find_device

    click.echo("Devices: " + ", ".join(devices()), err=True)
    while True:
        answer = _ask("Device, several with commas, or all", flag="--device", default="all")
        unknown = [one for one in answer.split(",") if answer != "all" and find_device(one) is None]
        if not unknown:
            return answer
        near = closest_device(unknown[0])
        click.echo(f"No device {unknown[0]!r}" + (f": did you mean {near}?" if near else "."), err=True)


def _write(file: Path, text: str, *, force: bool) -> None:
    """The whole file or none of it; never over another one without ``force``."""
    if file.exists() and not force:
        raise RecipeError(f"{file}: exists already", hint="-o ANOTHER.yaml, or --force to overwrite it")
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(file)
    except OSError as error:
        raise RecipeError(
            f"{file}: cannot be written: {error.strerror}", hint="-o FILE in a folder that exists"
        ) from error
    finally:
        draft.unlink(missing_ok=True)
