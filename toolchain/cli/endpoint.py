"""The verbs around endpoints that run on this machine, whatever started them: list, run, delete."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain.cli.asking import ask, asked_flags, prompt_of
from toolchain.cli.flags import common, open_screen, work_flag
from toolchain.cli.model_flags import home_flag
from toolchain.errors import EndpointError, RejectedError

if TYPE_CHECKING:
    from toolchain.running import Place


@dataclass(frozen=True)
class Found:
    """One endpoint at work."""

    name: str
    kind: str
    """``replicas``: several that stand in for each other; ``model``: one server of ``model deploy --local``."""
    state: str
    pid: int
    doors: dict[str, str]
    folder: str
    replicas: list[dict[str, Any]] = field(default_factory=list)


def found_in(home: Path, work: Path) -> Iterator[tuple[Found, Place]]:
    """What runs of the models of a home, and of the deployments of a work folder."""
    from toolchain.registry import card as cards
    from toolchain.registry.deployment import deployed
    from toolchain.running import Place

    seen = set()
    roots = [home / "endpoints", work / "endpoints"]
    for folder in sorted({one.resolve() for root in roots for one in root.glob("*") if one.is_dir()}):
        told = Place(folder).state()
        if told is not None:
            state, replicas = str(told.get("state", "starting")), list(told.get("replicas", ()))
            doors = dict(told.get("doors") or {})
            seen.add(told["pid"])
            yield Found(folder.name, "replicas", state, told["pid"], doors, str(folder), replicas), Place(folder)
    for name in cards.names(home):
        card = cards.read(home, name)
        one = deployed(card)
        if one is not None and one.pid not in seen:
            doors = {"/predict": one.predict, "OpenAI": one.openai, **({"KServe": one.triton[0]} if one.triton else {})}
            state = "running" if one.ready else "starting"
            yield Found(name, "model", state, one.pid, doors, str(card.folder)), Place(card.folder)


def _the_one(name: str, home: Path, work: Path) -> tuple[Found, Place]:
    """Raises EndpointError where there is none of that name, or more than one."""
    found = [(one, place) for one, place in found_in(home, work) if one.name == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise EndpointError(
            f"there are {len(found)} endpoints named {name}: {', '.join(one.folder for one, _ in found)}"
        )
    known = ", ".join(sorted({one.name for one, _ in found_in(home, work)})) or "none"
    raise EndpointError(f"no endpoint {name} runs on this machine", hint=f"known: {known}   # scalellm endpoint list")


@click.group()
def endpoint() -> None:
    """Endpoints that run on this machine: of `deploy`, and of `model deploy`.

    \b
    Examples:
      scalellm endpoint list
      scalellm endpoint run my-llama "Name three rivers of France."
      scalellm endpoint delete my-llama
    """


@endpoint.command("list")
@home_flag
@work_flag("Where the endpoints' folders lie.")
@common
def list_endpoints(home: Path, work: Path, json_output: bool, verbose: int) -> None:
    """What runs, how many replicas of it are ready, and where it answers.

    \b
    Example:
      scalellm endpoint list --json
    """
    screen = open_screen(json_output, verbose)
    found = [one for one, _ in found_in(home, work)]
    screen.emit([vars(one) for one in found])
    if not found:
        screen.say("No endpoint runs here.\nNext: scalellm deploy DEPLOYMENT.yaml --local")
        return
    rows = [(one.name, one.state, _ready(one), str(one.pid), one.doors.get("OpenAI", "")) for one in found]
    screen.table("", ("name", "state", "replicas", "pid", "OpenAI"), rows)


def _ready(one: Found) -> str:
    ready = sum(replica.get("state") == "ready" for replica in one.replicas)
    return f"{ready} of {len(one.replicas)} ready" if one.replicas else "1"


@endpoint.command("run")
@click.argument("name")
@asked_flags
@home_flag
@work_flag("Where the endpoints' folders lie.")
@common
def run(
    name: str,
    prompt: str | None,
    max_tokens: int | None,
    temperature: float | None,
    key: str,
    home: Path,
    work: Path,
    json_output: bool,
    verbose: int,
) -> None:
    """Ask an endpoint; the answer comes as it is made. Without PROMPT, standard input is the prompt.

    \b
    Examples:
      scalellm endpoint run my-llama "Name three rivers of France."
      scalellm endpoint run my-llama --max-tokens 64 --temperature 0 < question.txt
    """
    from toolchain.measuring.doors import Door

    screen = open_screen(json_output, verbose)
    found, _ = _the_one(name, home, work)
    given = {"max_tokens": max_tokens, "temperature": temperature}  # None leaves the choice to the gateway
    if found.doors.get("/predict"):
        door = Door("predict", found.doors["/predict"], name, extra=given, key=key)
    elif found.doors.get("OpenAI"):
        door = Door("openai-chat", found.doors["OpenAI"], name, extra=given, key=key)
    else:
        raise EndpointError(f"{name} is not open yet: {found.state}", hint="scalellm endpoint list")
    ask(screen, name, door, prompt_of(prompt))


@endpoint.command("delete")
@click.argument("name")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("--timeout", "timeout_s", type=float, default=120, show_default=True, metavar="SECONDS")
@home_flag
@work_flag("Where the endpoints' folders lie.")
@common
def delete(name: str, yes: bool, timeout_s: float, home: Path, work: Path, json_output: bool, verbose: int) -> None:
    """End an endpoint; requests at work finish first. Its folder stays, with what was logged and booked.

    \b
    Examples:
      scalellm endpoint delete my-llama
      scalellm endpoint delete my-llama --yes
    """
    screen = open_screen(json_output, verbose)
    found, place = _the_one(name, home, work)
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("There is nobody to ask: --yes deletes without asking.")
        click.confirm(f"End {name} (pid {found.pid}, {found.state})?", abort=True, err=True)
    if not place.end(timeout_s):
        raise RejectedError(f"{name} has ended by itself")
    screen.emit({"deleted": name, "folder": found.folder})
    screen.say(f"deleted: {name}; its folder stays: {found.folder}")
