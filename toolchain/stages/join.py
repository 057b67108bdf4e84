"""join: a token -> this machine is a node of an endpoint, until it is asked to end, or its cloud takes it away.

It dials the endpoint's head and listens to nobody. What it runs, the head decides. It prints nothing.
"""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain import gpu
from toolchain.errors import ScalellmError
from toolchain.progress import Progress
from toolchain.registry import Manifest
from toolchain.signals import ending_sets

if TYPE_CHECKING:
    from toolchain.fleet.hosts.joining import Membership
    from toolchain.fleet.node.agent import Node, Provide
    from toolchain.fleet.node.notices import Notices
    from toolchain.fleet.node.replica import Check

CPU = "cpu"
_RENEW_S = 6 * 3600.0
"""Between two looks at how long the certificate is good. Our choice."""


def folder_of(work: Path, endpoint: str) -> Path:
    """Where a node keeps what it has of an endpoint."""
    return (work / "nodes" / endpoint).resolve()


def machine() -> tuple[str, tuple[str, ...]]:
    """The device that this machine's GPUs are, and their names for CUDA; ``cpu`` and none without one that may be
    used.
    """
    for one in gpu.gpus():
        if one.device is not None and (names := gpu.names_of(one.device.name, os.environ)):
            return one.device.name, names
    return CPU, ()


def fetching(
    folder: Path, device: str, progress: Progress, *, check: Callable[[Manifest], None], registry: str = ""
) -> Provide:
    """Each version's package for this device, from ``registry`` or where the head says. Once for each version."""
    from toolchain.errors import ArtifactError
    from toolchain.fleet.hosts import packages

    one_at_a_time = threading.Lock()

    def provide(version: Mapping[str, Any], _replica: str) -> Path:
        package, place = packages.choose(version, device), registry or str(version.get(packages.REGISTRY) or "")
        if not place:
            raise ArtifactError(
                "the endpoint names no registry from which its engines can be fetched",
                hint="scalellm deploy join TOKEN --registry FOLDER|URL, or --recipe RECIPE to build one here",
            )
        with one_at_a_time:
            return packages.fetch(package, place, folder, progress, check=check)

    return provide


def serve(
    membership: Membership,
    node: Node,
    provide: Provide,
    *,
    progress: Progress,
    check: Check | None = None,
    notices: Notices | None = None,
    gpus: Sequence[str] = (),
    door: str = "",
) -> None:
    """Runs what the head wants until SIGINT, SIGTERM or a notice of the cloud; then drains. A second signal ends
    everything at once. ``gpus``: the names of the node's, for CUDA. ``door``: where the node's certificate is renewed
    before it runs out. Raises ScalellmError.
    """
    from toolchain.fleet.node.agent import Agent, Maker

    asked = threading.Event()
    maker = Maker(membership.folder, str(membership.discovery), provide, progress=progress, check=check, gpus=gpus)
    context = membership.identity.client_context(nameless=True)
    board = membership.board(context)
    agent = Agent(node, board, maker, progress)

    def taken_away(notice: str) -> None:
        progress.note(f"this machine is about to be taken away: {notice}")
        asked.set()

    if notices:
        threading.Thread(target=notices.watch, args=(asked, taken_away), daemon=True).start()
    if door:
        keeping = (membership, door, context, asked, progress)
        threading.Thread(target=keep_certificate, args=keeping, daemon=True).start()
    with ending_sets(asked):
        try:
            agent.run(asked)
            progress.note("draining")
            agent.drain()
        finally:
            agent.kill()
            board.close()


def keep_certificate(
    membership: Membership,
    door: str,
    context: ssl.SSLContext,
    until: threading.Event,
    progress: Progress,
    every_s: float = _RENEW_S,
) -> None:
    """Renews the node's certificate before it runs out, for new connections of ``context`` too, until ``until`` is set.
    What is connected stays so; workers that start later have the new one.
    """
    from toolchain.fleet.hosts import joining

    identity = membership.identity
    while not until.wait(every_s):
        try:
            if joining.renew(membership, door):
                context.load_cert_chain(identity.nameless, identity.key)
                progress.note(f"{membership.node} has a new certificate")
        except ScalellmError as error:
            progress.note(f"the certificate of {membership.node} is not renewed: {error.message}")
