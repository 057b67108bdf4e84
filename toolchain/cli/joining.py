"""The verbs with which machines come to an endpoint and go: ``deploy token``, ``deploy join``, ``deploy revoke``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain.cli.flags import common, complete_recipe, open_screen, work_flag

if TYPE_CHECKING:
    from toolchain.fleet.control.seats import Share


@click.command()
@click.argument("endpoint")
@click.option("--expires", default="1h", show_default=True, metavar="TIME", help="30m, 1h, 2d: until when it is good.")
@click.option("--uses", type=click.IntRange(1, 1000), default=1, show_default=True, help="For so many machines.")
@work_flag("Where the endpoints' folders lie.")
@common
def token(endpoint: str, expires: str, uses: int, work: Path, json_output: bool, verbose: int) -> None:
    """Make a token with which a machine joins an endpoint. On the machine that the endpoint was deployed from.

    Whoever has it can join: give it to nobody else. It is printed once and kept as a hash.

    \b
    Example:
      scalellm deploy token my-llama --expires 1h
    """
    from toolchain.fleet.hosts.network import Guests
    from toolchain.fleet.hosts.tokens import seconds_of
    from toolchain.stages.deploy import Place

    screen = open_screen(json_output, verbose)
    lives_s = seconds_of(expires)
    made = Guests.open(Place.of(work, endpoint).folder / "network", endpoint).token(lives_s=lives_s, uses=uses)
    screen.emit({"endpoint": endpoint, "token": str(made), "expires_s": lives_s, "uses": uses})
    screen.say(f"On the machine that is to join:\n  scalellm deploy join {made}")


@click.command()
@click.argument("text", metavar="TOKEN", envvar="SCALELLM_JOIN_TOKEN")
@click.option("--name", metavar="NODE", help="What this machine is called in the endpoint. [default: its host's name]")
@click.option(
    "--room",
    type=click.IntRange(1, 64),
    metavar="N",
    help="Replicas at once, at most. [default: the recipe's services, on each GPU]",
)
@click.option("--provider", default="own", show_default=True, metavar="NAME", help="Whose machine it is.")
@click.option("--price-per-hour", type=click.FloatRange(min=0), metavar="USD", help="Of this machine while it works.")
@click.option("--registry", metavar="FOLDER|URL", help="Fetch engines from here. [default: where the endpoint says]")
@click.option(
    "-r",
    "--recipe",
    metavar="FILE|NAME",
    shell_complete=complete_recipe,
    help="Build the engine here, by this recipe, instead of fetching one; it must be of the same model.",
)
@click.option("--spot", metavar="CLOUD", help="aws, gcp or azure: drain when it takes this machine away.")
@click.option("--metadata", metavar="URL", hidden=True, help="The cloud's metadata server, for tests.")
@work_flag("Where this machine keeps what it has of the endpoint.")
@common
def join(text: str, work: Path, json_output: bool, verbose: int, **flags: Any) -> None:
    """Make this machine a node of an endpoint, until Ctrl-C, which drains. It only dials out: nothing listens here.

    A replica takes requests after its engine's passport was checked, its server has generated a token and, where the
    endpoint asks for it, passed the conformance suite. A machine that has joined before keeps its place.
    The token may stand in SCALELLM_JOIN_TOKEN instead, where no list of processes shows it.

    \b
    Examples:
      scalellm deploy join TOKEN
      scalellm deploy join TOKEN --spot aws --price-per-hour 0.31
    """
    from toolchain.fleet.hosts import joining
    from toolchain.fleet.hosts.tokens import Token
    from toolchain.fleet.node.agent import Node
    from toolchain.fleet.node.notices import Notices
    from toolchain.fleet.plane import require
    from toolchain.stages import join as stage

    screen = open_screen(json_output, verbose)
    require()
    wanted = Token.read(text)
    notices = Notices(flags["spot"], flags["metadata"] or "") if flags["spot"] else None
    folder = stage.folder_of(work, wanted.endpoint)
    device, gpus = stage.machine()
    provide, own = (
        _building(screen, flags["recipe"], work) if flags["recipe"] else _fetching(screen, folder, device, flags)
    )
    membership = joining.join(wanted, flags["name"] or joining.own_name(), folder)
    node = Node(
        name=membership.node,
        provider=flags["provider"],
        device=device,
        gpus=len(gpus),
        room=flags["room"],
        own=own,
        price_per_hour=flags["price_per_hour"],
    )
    told = {"device": device, "gpus": node.gpus, "room": node.room, "folder": folder}
    screen.emit({"endpoint": wanted.endpoint, "node": node.name, **told})
    screen.say(f"{node.name} is a node of {wanted.endpoint}; Ctrl-C drains it.")
    stage.serve(
        membership,
        node,
        provide,
        progress=screen,
        check=_conformance(),
        notices=notices,
        gpus=gpus,
        door=wanted.door,
    )


@click.command()
@click.argument("endpoint")
@click.argument("node")
@work_flag("Where the endpoints' folders lie.")
@common
def revoke(endpoint: str, node: str, work: Path, json_output: bool, verbose: int) -> None:
    """Put a machine out of an endpoint: it is asked nothing any more, and cannot come back without a new token.

    \b
    Example:
      scalellm deploy revoke my-llama gpu-7
    """
    from toolchain.fleet.hosts.network import Guests
    from toolchain.stages.deploy import Place

    screen = open_screen(json_output, verbose)
    guests = Guests.open(Place.of(work, endpoint).folder / "network", endpoint)
    guests.put_out(node)
    screen.emit({"endpoint": endpoint, "node": node, "nodes": guests.nodes()})
    screen.say(f"{node} is no node of {endpoint} any more")


def _fetching(screen: Any, folder: Path, device: str, flags: dict[str, Any]) -> tuple[Any, None]:
    from toolchain.pipeline.packing import check_code
    from toolchain.stages.join import fetching

    def check(manifest: Any) -> None:
        check_code(manifest, "the endpoint's registry")

    return fetching(folder, device, screen, check=check, registry=flags["registry"] or ""), None


def _building(screen: Any, recipe: str, work: Path) -> tuple[Any, Share]:
    """The repository of a recipe, made now where it is missing or stale, the same for every version; and what a
    replica of it takes.
    """
    from toolchain.cli.deploying import built
    from toolchain.fleet.head.versions import share_of

    repository = built(screen, recipe, work)
    return lambda _version, _replica: repository, share_of(repository)


def _conformance() -> Any:
    from toolchain.cli.deploying import _conformance as suite

    return suite
