"""What the verbs of ``scalellm model`` share: the home, the model's name, the registry, and building what is stale."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain.cli.flags import PATH, Function
from toolchain.errors import RecipeError

if TYPE_CHECKING:
    from toolchain.console import Screen
    from toolchain.registry import Card, Store


def _default_home() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser() / "scalellm"


def home_flag(function: Function) -> Function:
    """``--home``: where models are known by name."""
    return click.option(
        "--home",
        type=PATH,
        default=_default_home,
        callback=lambda _ctx, _param, folder: folder.expanduser().absolute(),
        envvar="SCALELLM_HOME",
        metavar="DIR",
        help="Where models are known by name. [env: SCALELLM_HOME; default: ~/.local/share/scalellm]",
    )(function)


def complete_model(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    from toolchain.registry.card import names

    home = ctx.params.get("home") or Path(os.environ.get("SCALELLM_HOME") or _default_home())
    return [name for name in names(home) if name.startswith(incomplete)]


def named(function: Function) -> Function:
    """``NAME`` or ``-n NAME``, whichever is typed, and ``--home``."""

    def one(ctx: click.Context, param: click.Parameter, text: str | None) -> str:
        given = [each for each in (ctx.params.pop("flagged", None), text) if each]
        if len(given) != 1:
            told = "Name the model once" if given else "Name the model"
            raise click.UsageError(f"{told}: -n NAME.", ctx)
        return str(given[0])

    flagged = click.option(
        "-n", "--name", "flagged", metavar="NAME", is_eager=True, shell_complete=complete_model, help="The model."
    )
    positional = click.argument("name", required=False, metavar="[NAME]", callback=one, shell_complete=complete_model)
    return home_flag(flagged(positional(function)))


def registry_flag(function: Function) -> Function:
    """``--registry``: where packages go to and come from."""
    return click.option(
        "--registry",
        envvar="SCALELLM_REGISTRY",
        metavar="FOLDER|URL",
        help="A folder, or what fsspec opens: s3://bucket/models. [env: SCALELLM_REGISTRY; default: HOME/registry]",
    )(function)


def registry_at(text: str | None, home: Path) -> Store:
    """The registry that is named, else the home's own."""
    from toolchain.registry import open_store
    from toolchain.registry.card import registry_of

    return open_store(text) if text else registry_of(home)


def build(screen: Screen, card: Card, **flags: Any) -> None:
    """Build what is stale of a model; of one that was pulled there is nothing to build."""
    from toolchain.cli.flags import open_job
    from toolchain.cli.making import run_job

    if card.work is None:
        return
    job = open_job(screen, str(card.recipe_file), None, card.work, **flags)
    if job.recipe.name != card.name:
        raise RecipeError(
            f"{card.recipe_file}: name: {job.recipe.name} is not {card.name}",
            hint=f"name: {card.name}   # in that file",
        )
    run_job(screen, job, "repository", then=False)
