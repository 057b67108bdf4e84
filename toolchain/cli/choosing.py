"""The verbs that decide before anything is made: plan, which also compares, and init, which writes a recipe."""

from __future__ import annotations

import datetime
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain.cli.flags import PATH, Function, common, complete_recipe, open_job, open_screen, work_flag
from toolchain.errors import PlanError, RecipeError

if TYPE_CHECKING:
    from toolchain.choice import Choice
    from toolchain.console import Screen
    from toolchain.option import Asked, Load, Slo
    from toolchain.price_list import PriceList
    from toolchain.recipe import Recipe

GOALS = ("ttft", "throughput", "density", "cost")
PROMPT_TOKENS, OUTPUT_TOKENS = 1024, 256
"""The load that is assumed where neither a flag nor a recipe says one."""

STEP_TOKENS = 4096
"""max_num_tokens where there is no recipe: the builder's 8192 take twice the memory for activations."""


def _services(_ctx: click.Context, param: click.Parameter, text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    if not text.isdigit() or not 1 <= int(text) <= 64:
        raise click.BadParameter(f"{text!r}: a number from 1 to 64, or auto", param=param)
    return int(text)


def _slo(_ctx: click.Context, param: click.Parameter, text: str | None) -> Slo | None:
    from toolchain.option import Slo

    try:
        return None if text is None else Slo.parse(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param=param) from error


def choice_flags(function: Function) -> Function:
    """What is wanted, of which requests, at which prices: the same for ``plan`` and ``init``."""
    options: list[Callable[[Function], Function]] = [
        click.option("--slo", callback=_slo, metavar="ttft=1s,itl=50ms", help="Limits that come before the goal."),
        click.option(
            "--services", callback=_services, metavar="N|auto", help="Copies on one device; auto tries all that fit."
        ),
        click.option("--prompt", type=click.IntRange(min=1), metavar="TOKENS", help="Tokens in. [default: 1024]"),
        click.option("--output", type=click.IntRange(min=1), metavar="TOKENS", help="Tokens out. [default: 256]"),
        click.option(
            "--price", "own_prices", multiple=True, metavar="[DEVICE=]USD", help="Dollars per hour that you pay."
        ),
        click.option(
            "--prices", "price_file", type=PATH, metavar="FILE", help="Your prices instead of the public ones."
        ),
        click.option(
            "--old-after",
            "old_days",
            type=click.IntRange(min=1),
            default=180,
            show_default=True,
            metavar="DAYS",
            help="Mark prices that are older.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@dataclass(frozen=True)
class Wish:
    """The flags of ``choice_flags``."""

    slo: Slo | None
    services: int | str | None
    prompt: int | None
    output: int | None
    own_prices: tuple[str, ...]
    price_file: Path | None
    old_days: int

    @property
    def given(self) -> bool:
        """Whether any of them was."""
        return any((self.slo, self.services, self.prompt, self.output, self.own_prices, self.price_file))

    def words(self) -> list[str]:
        """The flags as they would be typed again."""
        slo = (
            [f"{key}={value:g}s" for key, value in (("ttft", self.slo.ttft_s), ("itl", self.slo.itl_s)) if value]
            if self.slo
            else []
        )
        pairs = (("--slo", ",".join(slo)), ("--services", self.services), ("--prompt", self.prompt))
        pairs += (("--output", self.output), ("--prices", self.price_file))  # type: ignore[assignment]
        named = [("--price", price) for price in self.own_prices]
        return [str(word) for flag, value in (*pairs, *named) if value for word in (flag, value)]

    def prices(self) -> PriceList:
        """What counts as a price."""
        from toolchain.price_list import PriceList, named, read_prices
        from toolchain.problems import read_text

        own, every = named(self.own_prices)
        rows = read_prices(read_text(self.price_file, "file of prices"), self.price_file) if self.price_file else None
        return PriceList(rows, own, every, self.old_days)


@click.command()
@click.option("-r", "--recipe", metavar="FILE|NAME", shell_complete=complete_recipe, help="The recipe to plan.")
@click.option("-m", "--model", metavar="DIR|ORG/NAME", help="Use this model instead of the recipe's, or without one.")
@work_flag()
@click.option("--device", "names", metavar="DEVICE[,DEVICE]|all", help="Instead of the recipe's; several are compared.")
@click.option("--goal", type=click.Choice(GOALS), help="Compare formats and devices: what is wanted most.")
@choice_flags
@click.option("--explain", is_flag=True, help="Say where the rule behind each decision comes from.")
@common
def plan(
    recipe: str | None,
    model: str | None,
    work: Path,
    names: str | None,
    goal: str | None,
    explain: bool,
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
      scalellm plan --recipe llama2-13b --device all --goal cost --slo ttft=1s,itl=50ms
      scalellm plan --model meta-llama/Llama-2-13b-chat-hf --device rtx4090,l4 --services auto --price l4=0.6
    """
    screen = open_screen(json_output, verbose)
    wished = Wish(**wish)
    if recipe is None and model is None:
        raise click.UsageError("Name a recipe (--recipe) or a model (--model).")
    several = names is not None and ("," in names or names == "all")
    if recipe is not None and not (goal or wished.given or several):
        job = open_job(screen, recipe, model, work, target=names)
        screen.emit({**job.plan.to_json(), "build_peaks": [vars(peak) for peak in job.peaks]})
        screen.plan(job.plan, job.source, job.peaks, explain=explain)
        return
    asked, devices = _asked(screen, recipe, model, work, names, wished)
    choice = _choose(asked, devices, goal or "ttft")
    screen.emit(choice.to_json())
    from toolchain.choice_table import sheet

    screen.sheet_of(sheet(choice, asked.prices, every=verbose > 0))
    if choice.best is None:
        screen.note("error: nothing of this fits" + _nearest(choice))
        sys.exit(PlanError.exit_code)
    if explain and choice.best.plan:
        screen.say()
        screen.plan(choice.best.plan, asked.recipe.model, explain=True)


def _nearest(choice: Choice) -> str:
    hint = next((one.nearest for one in choice.ranked if one.nearest), "")
    return f"\n  try: {hint}" if hint else ""


def _asked(
    screen: Screen, recipe: str | None, model: str | None, work: Path, names: str | None, wish: Wish
) -> tuple[Asked, list[str]]:
    """What is compared, and on which devices."""
    from toolchain.device import device, devices
    from toolchain.option import Asked, Slo
    from toolchain.pipeline import look
    from toolchain.recipe import load_recipe

    prices = wish.prices()
    chosen = [device(name.strip()).name for name in names.split(",")] if names and names != "all" else list(devices())
    if recipe is None:
        assert model is not None
        base = _plain_recipe(model, chosen[0], wish)
    else:
        base = load_recipe(recipe)
        base = base.model_copy(update={"model": model or base.model})
        chosen = chosen if names else [base.device]
    found, draft = look(base, work, screen)
    services = base.services if wish.services is None else None if wish.services == "auto" else int(wish.services)
    asked = Asked(
        base,
        found.config,
        _load(base, found.config.max_position_embeddings, wish),
        wish.slo or Slo(),
        services,
        prices,
        draft,
        found.quantized,
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )
    return asked, chosen


def _plain_recipe(model: str, device: str, wish: Wish) -> Recipe:
    """A recipe that says nothing but the load."""
    from toolchain.recipe import Recipe
    from toolchain.starter import name_of

    prompt, output = wish.prompt or PROMPT_TOKENS, wish.output or OUTPUT_TOKENS
    limits = {"max_seq_len": prompt + output, "max_input_len": prompt, "max_num_tokens": max(prompt, STEP_TOKENS)}
    name = name_of(model, "")[:-1][:64]
    return Recipe.model_validate({"name": name, "model": model, "device": device, "limits": limits})


def _load(recipe: Recipe, positions: int, wish: Wish) -> Load:
    """Tokens in and out: the flags', within the recipe's limits. Raises RecipeError where they are longer."""
    from toolchain.option import Load

    longest = recipe.limits.max_seq_len or positions
    most = min(recipe.limits.max_input_len or longest, longest - 1)
    prompt = wish.prompt or min(PROMPT_TOKENS, most)
    if prompt > most:
        raise RecipeError(f"--prompt {prompt}: the longest prompt has {most} tokens", hint=f"--prompt {most}")
    output = wish.output or min(OUTPUT_TOKENS, longest - prompt)
    if prompt + output > longest:
        room = longest - prompt
        raise RecipeError(
            f"--output {output}: a sequence has {longest} tokens, {prompt} of them the prompt", hint=f"--output {room}"
        )
    return Load(prompt, output)


def _choose(asked: Asked, names: list[str], goal: str) -> Choice:
    from toolchain.choice import choose

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
    asked, devices = _asked(screen, None, model, work, names, wished)
    choice = _choose(asked, devices, goal)
    best = choice.best
    if best is None:
        from toolchain.choice import best_of_each

        told = "".join(f"\n  - {one.title}: {one.why_not}" for one in best_of_each(choice.ranked))
        raise PlanError(f"{model}: nothing of this fits:{told}", hint="\n".join(_nearest(choice).splitlines()[1:])[7:])
    from toolchain.starter import name_of, recipe_text

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
