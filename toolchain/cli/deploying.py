"""The verb ``deploy``: an endpoint over several replicas. What is done to one that runs: see ``operating``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain.cli import doors, exporting, joining, operating
from toolchain.cli.flags import PATH, common, open_job, open_screen, work_flag

if TYPE_CHECKING:
    from toolchain.console import Screen
    from toolchain.fleet.deployment import Deployment
    from toolchain.gateway.run import Listen
    from toolchain.gateway.settings import Model
    from toolchain.stages.deploy import Place
    from toolchain.stages.serve import ServingInfo


_unverified_flag = click.option(
    "--allow-unverified", is_flag=True, help="Also an engine whose answers failed or were never verified."
)


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
      recipes: [tiny]           # in turn; all of one model; of services: N, N replicas share a GPU
      replicas:
        min: 0                  # 0: none while nobody asks; a request wakes one
        max: 4
        target_tokens_in_flight: 4096   # for each; beyond it there is one more
        idle_seconds: 300       # after so long in which fewer would have done
        max_unavailable: 1      # below min, while a version is replaced
        start_seconds: 600      # until a replica must be ready
      prices: {rtx4090: 0.34, vast/rtx4090: 0.29}   # $ per GPU and hour
      max_price_per_hour: 2.50  # of all nodes in use
      drain_seconds: 30
      max_queue: 64
      ports: {openai: 8080, predict: 2345, grpc: 8001}
      conformance: true         # each replica is checked before it takes requests
      network: {host: 203.0.113.7}    # other machines join here: etcd, NATS and a door with TLS
      registry: s3://bucket/models    # where they fetch their engines

    \b
    Examples:
      scalellm deploy DEPLOYMENT.yaml --local
      scalellm deploy status
      scalellm deploy scale my-llama --min 1 --max 3
      scalellm deploy update my-llama DEPLOYMENT.yaml; scalellm deploy update my-llama --cancel
      scalellm deploy logs my-llama --follow
      scalellm deploy down my-llama
      scalellm deploy token my-llama --expires 1h; scalellm deploy join TOKEN
      scalellm deploy export kubernetes DEPLOYMENT.yaml -o manifests --registry s3://bucket/models
      scalellm deploy dashboards DEPLOYMENT.yaml -o dashboards
    """


for _verb in (
    *(operating.status, operating.scale, operating.logs, operating.down),
    *(joining.token, joining.join, joining.revoke),
    *(exporting.export, exporting.dashboards),
):
    deploy.add_command(_verb)


@deploy.command("up", hidden=True)
@click.argument("file", type=PATH, metavar="DEPLOYMENT.yaml")
@click.option("--local", is_flag=True, help="On this machine alone, whatever network the file names.")
@click.option("--insecure-open", is_flag=True, help="Let other machines in without any API key.")
@_unverified_flag
@doors.keys_flag
@work_flag()
@common
def up(file: Path, local: bool, work: Path, keys: Path | None, json_output: bool, verbose: int, **flags: Any) -> None:
    """Build what is stale, start the replicas and the gateway, and keep them until Ctrl-C, which drains.

    \b
    Example:
      scalellm deploy DEPLOYMENT.yaml --local
    """
    from toolchain.fleet.deployment import load_deployment, must_have_a_place

    screen = open_screen(json_output, verbose)
    deployment = load_deployment(file)
    must_have_a_place(deployment, local)
    if local:
        deployment = deployment.model_copy(update={"network": None})
    require_libraries()
    repositories = [admitted(screen, recipe, work, flags["allow_unverified"]) for recipe in deployment.recipes]
    run(screen, deployment, repositories, work, keys=keys, **flags)


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
    allow_unverified: bool = False,
    on_open: Callable[[Listen], None] = lambda _listen: None,
) -> None:
    """An endpoint over these repositories, with its gateway, until it is told to end. Raises ScalellmError."""
    from toolchain.gateway.run import check, freeze
    from toolchain.stages import deploy as stage
    from toolchain.stages import gateway

    ports = deployment.ports

    def model_of(repository: Path) -> Model:
        return gateway.model_of_repository(repository, deployment.endpoint)

    settings = doors.settings_of(
        model_of(repositories[0]),
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
    _errors_of_libraries_into(place.folder / "dynamo.log")
    with stage.local(
        deployment,
        repositories,
        place,
        progress=screen,
        check=_conformance,
        model_of=model_of,
        allow_unverified=allow_unverified,
    ) as endpoint:
        endpoint.doors = listen.urls
        log = place.folder / "gateway.log"
        with gateway.background(settings, listen, log=log, engines=endpoint.engines):
            freeze()
            endpoint.tell("running")
            on_open(listen)
            screen.emit({"endpoint": deployment.endpoint, "openai": listen.urls["OpenAI"], "folder": place.folder})
            doors.announce(screen, listen, settings)
            endpoint.wait()
            screen.say("Draining.")


@deploy.command()
@click.argument("endpoint")
@click.argument("file", type=PATH, metavar="[DEPLOYMENT.yaml]", required=False)
@click.option("--cancel", is_flag=True, help="End the update that is at work: the version before stays.")
@_unverified_flag
@work_flag()
@common
def update(
    endpoint: str,
    file: Path | None,
    cancel: bool,
    allow_unverified: bool,
    work: Path,
    json_output: bool,
    verbose: int,
) -> None:
    """Replace what an endpoint runs, without a lost request: all that its file says but host, ports and network.

    What is stale is built. One replica of the new version is started and must pass its gate; the others follow one by
    one. If it does not start, keeps dying or is refused, the old version stays, and the exit code is 7. Ctrl-C ends
    the waiting alone; --cancel ends the update, wherever it stands.

    \b
    Examples:
      scalellm deploy update my-llama DEPLOYMENT.yaml
      scalellm deploy update my-llama --cancel
    """
    from toolchain.stages import deploy as stage

    screen, place = open_screen(json_output, verbose), stage.Place.of(work, endpoint)
    if cancel == (file is not None):
        raise click.UsageError("Name the DEPLOYMENT.yaml of the new version, or --cancel.")
    if file is None:
        stays, given_up = stage.cancel(place)
        screen.emit({"endpoint": endpoint, "version": stays, "given_up": given_up})
        screen.say(f"{endpoint}: version {given_up} is given up, version {stays} stays\nNext: scalellm deploy status")
        return
    version = _updated(screen, place, file, endpoint, work, allow_unverified)
    screen.emit({"endpoint": endpoint, "version": version})
    screen.say(f"{endpoint}: version {version} answers")


def _updated(screen: Screen, place: Place, file: Path, endpoint: str, work: Path, allow_unverified: bool) -> int:
    """The number of the new version, which answers. Raises ScalellmError."""
    from toolchain.fleet.deployment import load_deployment
    from toolchain.stages import deploy as stage

    deployment = load_deployment(file)
    operating.must_be_same(file, deployment, endpoint, place, screen)
    require_libraries()
    repositories = [admitted(screen, recipe, work, allow_unverified) for recipe in deployment.recipes]

    def tell(event: Mapping[str, Any]) -> None:
        screen.note(operating.line_of(event))
        if event["kind"] == "waits":
            screen.note(f"To return to the version before: scalellm deploy update {endpoint} --cancel")

    return stage.update(
        place, deployment, repositories, progress=screen, on_event=tell, allow_unverified=allow_unverified
    )


def admitted(screen: Screen, recipe: str, work: Path, allow_unverified: bool) -> Path:
    """The repository of a recipe, made where it is missing or stale. Raises RejectedError for one whose answers must
    be verified first.
    """
    from toolchain.admission import Asked, admit
    from toolchain.recipe import load_recipe

    repository = built(screen, recipe, work)
    admission = admit(repository, Asked(recipe, load_recipe(recipe), None, allow_unverified))
    for note in admission.notes:
        screen.note(f"note: {note}")
    if admission.unverified:
        screen.note(f"NOT VERIFIED: {admission.unverified}")
    return repository


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
