"""The verbs around a model's name: create, list, show, delete. The rest is in ``model_packages`` and ``model_doors``.

A model is a card in the model home: ``$XDG_DATA_HOME/scalellm``, which is ``~/.local/share/scalellm`` as a rule.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain.cli.flags import PATH, common, complete_recipe, open_screen
from toolchain.cli.model_flags import home_flag, named

if TYPE_CHECKING:
    from toolchain.console import Screen
    from toolchain.pipeline.packing import Standing
    from toolchain.registry import Card

_DEFAULT = Path("default.yaml")
"""What messages call the recipe of a model that was created without one."""


@click.group()
def model() -> None:
    """Models by name: create one from the hub or a folder, package it, share it, deploy it, ask it.

    \b
    Examples:
      scalellm model create -n llama -m hf:meta-llama/Llama-2-13b-chat-hf
      scalellm model deploy -n llama --local
      scalellm model run -n llama "Hello"
    """


@model.command()
@click.option("-n", "--name", required=True, metavar="NAME", help="What the model is to be called.")
@click.option(
    "-m", "--model", "source", required=True, metavar="hf:ORG/MODEL|DIR", help="On the hub, or a folder of yours."
)
@click.option(
    "-r",
    "--recipe",
    metavar="FILE|NAME",
    shell_complete=complete_recipe,
    help="Its device and formats. [default: the device that is found here, formats as they suit it]",
)
@click.option(
    "-w", "--work", type=PATH, envvar="SCALELLM_WORK", metavar="DIR", help="Where artifacts go. [default: HOME/work]"
)
@home_flag
@common
def create(
    name: str, source: str, recipe: str | None, work: Path | None, home: Path, json_output: bool, verbose: int
) -> None:
    """Give a model a name and a recipe. Nothing is downloaded or built yet, but all is checked that can be.

    The recipe is copied whole, with this name and this model in it; edit the copy that `model show` names.

    \b
    Examples:
      scalellm model create -n llama -m hf:meta-llama/Llama-2-13b-chat-hf --recipe rtx4090
      scalellm model create -n mine -m ./my-llama
    """
    from toolchain.recipe import find_recipe, parse_recipe
    from toolchain.registry import card as cards
    from toolchain.registry.names import check_name

    screen = open_screen(json_output, verbose)
    check_name(name)
    place = cards.source_of(source)
    folder = (work or home / "work").expanduser().absolute()
    if recipe is None:
        path = _DEFAULT
        text = _default(screen, name, place, folder)
    else:
        path = find_recipe(recipe)
        text = path.read_text(encoding="utf-8") if path.stat().st_size < 2**20 else ""
    text = cards.recipe_text(text, path, name, place)
    _check_plan(screen, parse_recipe(text, Path(f"{name}.yaml")), folder)
    card = cards.create(home, name, text, folder)
    screen.emit(_document(card, home))
    screen.say(f"created: {name}, {place} on {card.recipe.device} ({card.recipe_file})")
    screen.say(f"Next: scalellm model deploy -n {name} --local")


def _default(screen: Screen, name: str, source: str, work: Path) -> str:
    """The recipe for the device of this machine, and for weights that may be quantized already."""
    from toolchain.gpu import gpus
    from toolchain.pipeline import look
    from toolchain.recipe import parse_recipe
    from toolchain.registry import card as cards

    found = gpus()
    device = next((one.device.name for one in found if one.device), None)
    if found and device is None:
        screen.note(f"note: {found[0].name} is not a GPU that scalellm knows: the recipe is for the CPU")
    screen.note(f"note: no --recipe: one for the device {device or 'cpu'}, with formats as they suit it")
    text = cards.default_recipe(device or "cpu", {})
    if not _at_hand(source):
        return text
    plain = parse_recipe(cards.recipe_text(text, _DEFAULT, name, source), Path(f"{name}.yaml"))
    quantized = look(plain, work, screen)[0].quantized
    return cards.default_recipe(device or "cpu", quantized.model_dump(exclude_unset=True)) if quantized else text


def _at_hand(source: str) -> bool:
    """Whether the model's configuration is known without a download."""
    from toolchain import checkpoint
    from toolchain.family import published

    return checkpoint.find(source) is not None or published(source) is not None


def _check_plan(screen: Screen, recipe: Any, work: Path) -> None:
    """Raises PlanError where the model cannot run so; says where that cannot be known yet."""
    from toolchain.pipeline import Job

    if _at_hand(recipe.model):
        for warning in Job(recipe, None, work, screen).plan.warnings:
            screen.note(f"note: {warning}")
    else:
        screen.note(f"note: {recipe.model} is not on this machine: whether it fits is known once it is built")


@model.command("list")
@home_flag
@common
def list_models(home: Path, json_output: bool, verbose: int) -> None:
    """What models there are, for which device, and how far each has come.

    \b
    Example:
      scalellm model list --json
    """
    from toolchain.pipeline.packing import standing
    from toolchain.registry.card import names
    from toolchain.units import format_bytes

    screen = open_screen(json_output, verbose)
    found = [standing(home, name) for name in names(home)]
    screen.emit([_told(one) for one in found])
    if not found:
        screen.say(f"There are no models in {home}.\nNext: scalellm model create -n NAME -m hf:ORG/MODEL")
        return
    screen.table(
        "",
        ("name", "device", "state", "size", "digest", "date", "model"),
        [
            (
                one.name,
                one.device,
                one.state,
                format_bytes(one.size) if one.size is not None else "",
                one.digest[:12],
                one.date[:10],
                one.problem or one.model,
            )
            for one in found
        ],
    )


@model.command()
@named
@common
def show(name: str, home: Path, json_output: bool, verbose: int) -> None:
    """All that is known of one model: where it is, what was built, whether it was verified, where it answers.

    \b
    Example:
      scalellm model show -n llama
    """
    from toolchain.registry import card as cards

    screen = open_screen(json_output, verbose)
    card = cards.read(home, name)
    document = _document(card, home)
    screen.emit(document)
    engine = document["passport"].get("engine") or {}
    verified = {True: "yes", False: "FOUND WRONG", None: "no"}[document["verified"]]
    at = document["deployed"]
    rows = [
        ("model", document["model"]),
        ("state", document["state"] + (", pulled" if document["pulled"] else "")),
        ("device", document["device"]),
        ("recipe", document["recipe"]),
        ("artifacts", str(card.repository.parent)),
        ("engine", ", ".join(str(engine[key]) for key in ("backend", "weights", "kv", "release") if engine.get(key))),
        ("verified", verified),
        ("package", f"{name}@{document['digest']}" if document["digest"] else "none"),
        ("deployed", f"{at['predict'] or 'starting'} (pid {at['pid']})" if at else "no"),
    ]
    if unverified := document["passport"].get("unverified"):
        rows.append(("NOT VERIFIED", unverified))
    screen.table(name, ("", ""), rows)


def _document(card: Card, home: Path) -> dict[str, Any]:
    from toolchain.pipeline.packing import passport_in, standing

    return {**_told(standing(home, card.name)), "recipe_text": card.recipe.text, "passport": passport_in(card)}


def _told(one: Standing) -> dict[str, Any]:
    return {**vars(one), "deployed": vars(one.deployed) if one.deployed else None}


@model.command()
@named
@click.option("--artifacts", is_flag=True, help="Also what was built of it, and its packages in the home's registry.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@common
def delete(name: str, home: Path, artifacts: bool, yes: bool, json_output: bool, verbose: int) -> None:
    """Forget a model. What was built of it stays, and its packages do, unless --artifacts says otherwise.

    A model that is deployed is not deleted.

    \b
    Examples:
      scalellm model delete -n llama
      scalellm model delete -n llama --artifacts --yes
    """
    from toolchain.registry import card as cards
    from toolchain.registry import deployment, transfer

    screen = open_screen(json_output, verbose)
    card = cards.read(home, name)
    built = card.work / name if card.work else None
    what = [str(card.folder), *([str(built)] if artifacts and built and built.exists() else [])]
    what += ["its packages in " + cards.registry_of(home).url] if artifacts else []
    if not yes:
        _confirm(f"Delete {name}: {', '.join(what)}?")
    with deployment.hold(card):
        freed = transfer.forget(cards.registry_of(home), name) if artifacts else 0
        if artifacts and built:
            shutil.rmtree(built, ignore_errors=True)
        cards.remove(card)
    screen.emit({"deleted": name, "artifacts": artifacts, "freed_bytes": freed})
    screen.say(f"deleted: {name}" + ("" if artifacts or not built else f"; what was built stays in {built}"))


def _confirm(question: str) -> None:
    if not sys.stdin.isatty():
        raise click.UsageError("There is nobody to ask: --yes deletes without asking.")
    click.confirm(question, abort=True, err=True)
