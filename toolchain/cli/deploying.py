"""The verb ``deploy``: an endpoint over several replicas, its state, its end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain.cli import doors, exporting
from toolchain.cli.flags import PATH, common, open_job, open_screen, work_flag

if TYPE_CHECKING:
    from toolchain.console import Screen
    from toolchain.fleet.deployment import Deployment
    from toolchain.gateway.run import Listen
    from toolchain.stages.serve import ServingInfo


class _FileOrVerb(click.Group):
    """``deploy FILE`` besides ``deploy VERB``."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        asked_for_help = bool({"-h", "--help"} & set(args[:1]))
        if args and args[0] not in self.commands and not asked_for_help:
            args = ["up", *args]
        return super().parse_args(context, args)


@click.group(cls=_FileOrVerb)
def deploy() -> None:
    """Run an endpoint over several replicas: a lost one costs no client its answer.

    \b
    DEPLOYMENT.yaml:
      endpoint: my-llama        # what clients call the model
      recipes: [tiny]           # in turn; all of one model
      replicas: {min: 2}        # this release keeps this number
      drain_seconds: 30
      max_queue: 64
      ports: {openai: 8080, predict: 2345, grpc: 8001}
      conformance: true         # each replica is checked before it takes requests

    \b
    Examples:
      scalellm deploy DEPLOYMENT.yaml --local
      scalellm deploy status
      scalellm deploy down my-llama
      scalellm deploy export kubernetes DEPLOYMENT.yaml -o manifests --registry s3://bucket/models
    """


deploy.add_command(exporting.export)


@deploy.command("up", hidden=True)
@click.argument("file", type=PATH, metavar="DEPLOYMENT.yaml")
@click.option("--local", is_flag=True, help="On this machine: the only place that this release knows.")
@click.option("--insecure-open", is_flag=True, help="Let other machines in without any API key.")
@doors.keys_flag
@work_flag()
@common
def up(file: Path, local: bool, work: Path, keys: Path | None, json_output: bool, verbose: int, **flags: Any) -> None:
    """Build what is stale, start the replicas and the gateway, and keep them until Ctrl-C, which drains.

    \b
    Example:
      scalellm deploy DEPLOYMENT.yaml --local
    """
    from toolchain.fleet.deployment import load_deployment, must_be_local

    screen = open_screen(json_output, verbose)
    deployment = load_deployment(file)
    must_be_local(local)
    require_libraries()
    repositories = [built(screen, recipe, work) for recipe in deployment.recipes]
    run(screen, deployment, repositories, work, keys=keys, insecure_open=flags["insecure_open"])


def require_libraries() -> None:
    """Raises ToolError where what an endpoint needs is not installed."""
    from toolchain.fleet.plane import require
    from toolchain.stages import gateway

    require()
    gateway.require_libraries()


def run(
    screen: Screen,
    deployment: Deployment,
    repositories: Sequence[Path],
    work: Path,
    *,
    keys: Path | None,
    insecure_open: bool,
    on_open: Callable[[Listen], None] = lambda _listen: None,
) -> None:
    """An endpoint over these repositories, with its gateway, until it is told to end. Raises ScalellmError."""
    from toolchain.gateway.run import check
    from toolchain.stages import deploy as stage
    from toolchain.stages import gateway

    for note in deployment.notes:
        screen.note(f"note: {note}")
    ports = deployment.ports
    settings = doors.settings_of(
        gateway.model_of_repository(repositories[0], deployment.endpoint),
        (),
        work=work,
        keys=keys,
        max_queue=deployment.max_queue,
        kserve=repositories[0] / gateway.TRITON_MODEL / "config.pbtxt",
    )
    listen = doors.listen_of(
        host=deployment.host,
        port=ports.openai,
        predict_port=ports.predict or 0,
        no_predict=not ports.predict,
        grpc_port=ports.grpc or None,
        insecure_open=insecure_open,
    )
    check(settings, listen)
    place = stage.Place.of(work, deployment.endpoint)
    suite = _conformance if deployment.conformance else None
    _errors_of_libraries_into(place.folder / "dynamo.log")
    with stage.local(deployment, repositories, place, progress=screen, check=suite) as endpoint:
        endpoint.doors = listen.urls
        log = place.folder / "gateway.log"
        with gateway.background(settings, listen, log=log, engines=endpoint.engines):
            endpoint.tell("running")
            on_open(listen)
            screen.emit({"endpoint": deployment.endpoint, "openai": listen.urls["OpenAI"], "folder": place.folder})
            doors.announce(screen, listen, settings)
            endpoint.wait()
            screen.say("Draining.")


@deploy.command()
@work_flag("Where the endpoints' folders lie.")
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
        screen.say(f"{endpoint['endpoint']}: {endpoint['state']}, port {endpoint['ports']['openai']}")
        for one in endpoint["replicas"]:
            why = f": {one['why']}" if one["why"] else ""
            pids = ", ".join(f"{name} {pid}" for name, pid in one["pids"].items())
            screen.say(f"  replica {one['replica']}  {one['state']}{why}  ({pids}; {one['restarts']} restarts)")
    if not found:
        screen.say("No endpoint runs here.")


@deploy.command()
@click.argument("endpoint")
@click.option("--timeout", "timeout_s", type=float, default=120, show_default=True, metavar="SECONDS")
@work_flag("Where the endpoints' folders lie.")
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


def built(screen: Screen, recipe: str, work: Path) -> Path:
    """The repository of a recipe, made where it is missing or stale."""
    from toolchain.pipeline.job import folder_of

    job = open_job(screen, recipe, None, work)
    job.run("repository", on_result=lambda result: screen.detail(f"{result.state.name}: {result.action}"))
    return folder_of(job.recipe, work, job.target) / "repository"


def _errors_of_libraries_into(log: Path) -> None:
    """Dynamo writes a line for each request to file descriptor 2, whatever it is told; ours go on to the terminal."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    with log.open("ab") as stream:
        os.dup2(stream.fileno(), 2)


def _conformance(info: ServingInfo) -> None:
    """Raises RejectedError for a server that does not pass the suite."""
    from toolchain.endpoint import Endpoint
    from toolchain.errors import RejectedError
    from toolchain.measuring.conformance_doors import Kserve
    from toolchain.stages.conformance import conformance

    asked = [Kserve(Endpoint(info.http_url, ""), "http"), Kserve(Endpoint("", info.grpc_url), "grpc")]
    failed = [one for one in conformance(asked) if not one.passed]
    if failed:
        raise RejectedError(f"{info.http_url}: {failed[0].check}: {failed[0].detail}")
