"""The verbs of ``deploy`` around an endpoint that runs: status, scale, logs, down."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain.cli.flags import common, open_screen, work_flag
from toolchain.errors import ArtifactError, RecipeError

if TYPE_CHECKING:
    from toolchain.console import Screen
    from toolchain.fleet.deployment import Deployment
    from toolchain.stages.deploy import Place

_FOLDERS = work_flag("Where the endpoints' folders lie.")
_LOGS = ("triton.log", "worker.log")
_LAST_LINES = 40


@click.command()
@_FOLDERS
@common
def status(work: Path, json_output: bool, verbose: int) -> None:
    """The endpoints that run on this machine, and their replicas.

    \b
    Example:
      scalellm deploy status --json
    """
    from toolchain.stages import deploy as stage

    screen = open_screen(json_output, verbose)
    found = stage.all_running(work)
    screen.emit(found)
    for endpoint in found:
        version = f"version {endpoint['version']}"
        if endpoint["next_version"] is not None:
            version += f", version {endpoint['next_version']} is on its way"
        wanted = f"{endpoint['desired']} wanted of {endpoint['min']} to {endpoint['max']}"
        port = endpoint["ports"]["openai"]
        cost = f"; ${endpoint['cost_per_hour']:g}/h" if endpoint.get("cost_per_hour") else ""
        screen.say(f"{endpoint['endpoint']}: {endpoint['state']}, port {port}; {wanted}; {version}{cost}")
        if note := _room_of(endpoint):
            screen.say(f"  {note}")
        for one in endpoint["replicas"]:
            why = f": {one['why']}" if one["why"] else ""
            pids = ", ".join(f"{name} {pid}" for name, pid in one["pids"].items())
            about = f"{pids}; {one['restarts']} restarts{_seat(one)}"
            where = f"{one['node']}/{one['name']}"
            screen.say(f"  {where}  version {one['version']}  {one['state']}{why}  ({about})")
    if not found:
        screen.say("No endpoint runs here.")


@click.command()
@click.argument("endpoint")
@click.option("--min", "least", type=click.IntRange(0), help="As many at least; 0: none while nobody asks.")
@click.option("--max", "most", type=click.IntRange(1), help="As many at most.")
@click.option("--replicas", type=click.IntRange(1), help="So many, whatever the load.")
@_FOLDERS
@common
def scale(
    endpoint: str,
    least: int | None,
    most: int | None,
    replicas: int | None,
    work: Path,
    json_output: bool,
    verbose: int,
) -> None:
    """Change how many replicas an endpoint has. The load decides between the two numbers.

    \b
    Examples:
      scalellm deploy scale my-llama --min 0 --max 4
      scalellm deploy scale my-llama --replicas 2
    """
    from toolchain.stages import deploy as stage

    screen = open_screen(json_output, verbose)
    if (replicas is None) == (least is None and most is None):
        raise click.UsageError("Name --replicas, or --min and --max, or one of these two.")
    ask = {
        "ask": "scale",
        "min": least if replicas is None else replicas,
        "max": most if replicas is None else replicas,
    }
    place = stage.Place.of(work, endpoint)
    answer = stage.ask(place, ask)
    if note := _room_of({**(place.read() or {}), **answer, "endpoint": endpoint}):
        screen.note(f"note: {note}")
    screen.emit({"endpoint": endpoint, "min": answer["min"], "max": answer["max"]})
    screen.say(f"{endpoint}: {answer['min']} to {answer['max']} replicas\nNext: scalellm deploy status")


@click.command()
@click.argument("endpoint")
@click.option("--replica", metavar="NAME", help="What this replica's Triton and worker say, such as r1.")
@click.option("--follow", is_flag=True, help="And what comes, until Ctrl-C.")
@_FOLDERS
@common
def logs(endpoint: str, replica: str | None, follow: bool, work: Path, json_output: bool, verbose: int) -> None:
    """What has happened to an endpoint, also to one that has ended: each start, loss, update; or a replica's own words.

    \b
    Examples:
      scalellm deploy logs my-llama --follow
      scalellm deploy logs my-llama --replica r3
    """
    from toolchain import runner
    from toolchain.fleet.head import asking
    from toolchain.stages import deploy as stage

    screen = open_screen(json_output, verbose)
    place = stage.Place.of(work, endpoint)
    if replica is not None:
        for file in _logs_of(place, replica):
            screen.say(f"--- {file}\n{runner.tail(file, _LAST_LINES)}")
        if follow:
            _follow(place, replica)
        return
    if not place.events.exists():
        raise ArtifactError(f"{endpoint} has not run here: no {place.events}", hint="scalellm deploy status")
    found = asking.events(place.events, 0, lambda: follow and place.read() is not None)
    if json_output and not follow:
        screen.emit(list(found))
        return
    for event in found:
        click.echo(json.dumps(event) if json_output else line_of(event))


@click.command()
@click.argument("endpoint")
@click.option("--timeout", "timeout_s", type=float, default=120, show_default=True, metavar="SECONDS")
@_FOLDERS
@common
def down(endpoint: str, timeout_s: float, work: Path, json_output: bool, verbose: int) -> None:
    """End an endpoint of this machine; requests at work finish first.

    \b
    Example:
      scalellm deploy down my-llama
    """
    from toolchain.stages import deploy as stage

    screen = open_screen(json_output, verbose)
    ended = stage.down(stage.Place.of(work, endpoint), timeout_s)
    screen.emit({"endpoint": endpoint, "ended": ended})
    screen.say(f"{endpoint}: ended" if ended else f"{endpoint}: does not run here")


def _room_of(endpoint: Mapping[str, Any]) -> str:
    """What stands in the way of as many replicas as it may have; empty where nothing does."""
    name, most = endpoint["endpoint"], endpoint["max"]
    room = endpoint.get("room", most)
    if room >= most:
        return ""
    if endpoint["network"]:
        return f"room for {room} of {most} replicas; for more, machines must join: scalellm deploy token {name}"
    return f"this machine has room for {room} of {most} replicas: scalellm deploy scale {name} --max {max(1, room)}"


def _seat(replica: Mapping[str, Any]) -> str:
    """Which GPUs it has, or which part of one."""
    gpus, of = replica.get("gpus"), replica.get("of", 1)
    if not gpus:
        return ""
    return f"; GPU {', '.join(map(str, gpus))}" + (f", one of {of} services" if of > 1 else "")


def line_of(event: Mapping[str, Any]) -> str:
    """An event for people."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(event["time"])))
    return f"{when}  {event['kind']:<12} {event['text']}"


def must_be_same(file: Path, deployment: Deployment, endpoint: str, place: Place, screen: Screen) -> None:
    """Raises RecipeError for a deployment of another endpoint, or one that changes what stays as long as it runs."""
    if deployment.endpoint != endpoint:
        raise RecipeError(f"{file}: endpoint: {deployment.endpoint}, not {endpoint}")
    told, standing = place.read(), deployment.standing
    if told is None:
        return
    local = told.get("network", standing["network"]) is None
    if local and standing["network"] is not None:
        screen.note(f"note: network: not used, for {endpoint} was started with --local")
        standing["network"] = None
    changed = [name for name, value in standing.items() if told.get(name, value) != value]
    if changed:
        raise RecipeError(
            f"{file}: {', '.join(changed)}: cannot change while the endpoint runs",
            hint=f"scalellm deploy down {endpoint}; scalellm deploy {file}{' --local' if local else ''}",
        )


def _logs_of(place: Place, replica: str) -> list[Path]:
    """Raises ArtifactError for a replica that has left none."""
    folder = place.folder / "replicas" / replica
    found = [folder / name for name in _LOGS if (folder / name).is_file()]
    if not found:
        known = sorted(one.name for one in folder.parent.glob("*") if one.is_dir())
        raise ArtifactError(
            f"{place.folder.name}: no logs of a replica {replica}", hint=f"known: {', '.join(known) or 'none'}"
        )
    return found


def _follow(place: Place, replica: str) -> None:
    """What a replica's logs get, until Ctrl-C or the endpoint's end."""
    sizes = {file: file.stat().st_size for file in _logs_of(place, replica)}
    while place.read() is not None:
        for file, size in sizes.items():
            with file.open("rb") as stream:
                stream.seek(min(size, file.stat().st_size))
                click.echo(stream.read().decode(errors="replace"), nl=False)
                sizes[file] = stream.tell()
        time.sleep(0.2)
