"""What several verbs share: their flags, the screen they speak through, the job behind a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from toolchain.console import Screen
    from toolchain.pipeline import Job

Function = TypeVar("Function", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)


def work_flag(help_text: str = "Where artifacts live.") -> Callable[[Function], Function]:
    """``--work``, the same for every verb that reads or makes artifacts."""
    return click.option(
        "-w",
        "--work",
        type=PATH,
        default=Path("scalellm-work"),
        show_default=True,
        envvar="SCALELLM_WORK",
        metavar="DIR",
        help=help_text,
    )


def common(function: Function) -> Function:
    """``--json`` and ``-v``, which every verb takes."""
    function = click.option("--json", "json_output", is_flag=True, help="Print one JSON object on standard output.")(
        function
    )
    return click.option("-v", "--verbose", count=True, help="Say more, on standard error.")(function)


def recipe_flags(function: Function) -> Function:
    """``--recipe``, ``--model`` and ``--work``, which every verb that makes something takes."""
    for option in reversed(
        [
            click.option(
                "-r",
                "--recipe",
                required=True,
                metavar="FILE|NAME",
                shell_complete=complete_recipe,
                help="A recipe file, or the name of one in ./, ./recipes or the shipped recipes.",
            ),
            click.option("-m", "--model", metavar="DIR|ORG/NAME", help="Use this model instead of the recipe's."),
            work_flag(),
        ]
    ):
        function = option(function)
    return function


def stage_flags(function: Function) -> Function:
    """What every verb takes that makes artifacts or says why it would."""
    explained = click.option("--explain", is_flag=True, help="Only say what is stale and why.")(common(function))
    return recipe_flags(explained)


def size(_ctx: click.Context, param: click.Parameter, text: str | None) -> int | None:
    """A flag's ``8GiB`` in bytes."""
    from toolchain.units import parse_bytes

    try:
        return None if text is None else parse_bytes(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param=param) from error


def place_flags(*names: str) -> Callable[[Function], Function]:
    """``--quantize-on``, ``--max-ram`` and ``--max-vram``: where weights are quantized. They change no artifact's key.

    ``names``: what else the first is called.
    """

    def decorate(function: Function) -> Function:
        for option in (
            click.option(
                "--max-vram", callback=size, metavar="SIZE", help="Take no more of the GPU's memory, such as 14GiB."
            ),
            click.option("--max-ram", callback=size, metavar="SIZE", help="Quantize within this memory, such as 8GiB."),
            click.option(
                "--quantize-on",
                *names,
                "quantize_on",
                default="auto",
                show_default=True,
                metavar="auto|cpu|cuda[:N]",
                help="Where to quantize; auto: the GPU if torch sees one.",
            ),
        ):
            function = option(function)
        return function

    return decorate


def targets_flag(function: Function) -> Function:
    """``--device``: the devices to build for, instead of the recipe's."""
    return click.option(
        "--device",
        "targets",
        callback=lambda _ctx, _param, text: tuple(one.strip() for one in text.split(",")) if text else (None,),
        metavar="DEVICE[,DEVICE]",
        help="Build for these devices instead of the recipe's; they share checkpoints of equal formats.",
    )(function)


def host_flag(function: Function) -> Function:
    """``--on``: where TensorRT-LLM engines are built. It changes no artifact's key."""
    return click.option(
        "--on",
        multiple=True,
        metavar="[DEVICE=]HOST",
        help="Where trtllm-build runs; only for TensorRT-LLM engines. Several times for several devices. "
        "[default: local]",
    )(function)


def complete_recipe(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    from toolchain.recipe import available

    return [name for name in available() if name.startswith(incomplete)]


def open_screen(json_output: bool, verbose: int) -> Screen:
    from toolchain.console import Screen

    screen = Screen(json_output=json_output, verbose=verbose)
    click.get_current_context().find_root().obj = screen
    return screen


def open_job(
    screen: Screen,
    recipe: str,
    model: str | None,
    work: Path,
    *,
    target: str | None = None,
    on: tuple[str, ...] = (),
    quantize_on: str = "cpu",
    **place: Any,
) -> Job:
    """The job behind the flags; of several ``on``, the last that names the target or no device counts."""
    from toolchain import hosts
    from toolchain.pipeline import Job
    from toolchain.quantizers.place import Place
    from toolchain.recipe import load_recipe

    hosts_here = [host for device, _, host in (one.rpartition("=") for one in on) if device in ("", target)]
    host = hosts.load(hosts_here[-1] if hosts_here else "local")
    return Job(load_recipe(recipe), model, work, screen, Place(quantize_on, **place), host, target)
