"""deploy: model repositories -> an endpoint on this machine: a head, and one node that runs the replicas.

The gateway in front is opened by the caller inside ``local``. It prints nothing.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain import running
from toolchain.errors import ArtifactError, EndpointError
from toolchain.progress import Progress
from toolchain.signals import ending_sets

if TYPE_CHECKING:
    from toolchain.fleet.board import Board, FolderBoard
    from toolchain.fleet.deployment import Deployment
    from toolchain.fleet.head.head import Head, Version
    from toolchain.fleet.head.versions import ModelOf
    from toolchain.fleet.node.agent import Agent
    from toolchain.fleet.node.replica import Check
    from toolchain.fleet.plane import Plane
    from toolchain.gateway.service import MakeEngines

NODE = "local"
_POLL_S = 0.2
_DRAIN_MARGIN_S = 30.0
"""For nodes on other machines to hear that they are to drain, and to end their servers."""
VERSIONS = "versions"


@dataclass(frozen=True)
class Place:
    """Where an endpoint on this machine keeps its files."""

    folder: Path

    @classmethod
    def of(cls, work: Path, endpoint: str) -> Place:
        return cls((work / "endpoints" / endpoint).resolve())

    def board(self) -> FolderBoard:
        """Where operators ask its head; on one machine it is all of the board."""
        from toolchain.fleet.board import FolderBoard

        return FolderBoard(self.folder / "board")

    @property
    def events(self) -> Path:
        """What has happened, a JSON object a line."""
        from toolchain.fleet.head.head import EVENTS

        return self.folder / EVENTS

    def read(self) -> dict[str, Any] | None:
        """What the endpoint says of itself; None where none runs."""
        return running.Place(self.folder).state()


class Local:
    """A running endpoint of this machine."""

    def __init__(self, deployment: Deployment, record: running.Record, head: Head, agent: Agent | None) -> None:
        """``agent``: of this machine, where it runs replicas itself."""
        self.deployment, self.head, self.agent = deployment, head, agent
        self._record = record
        self.engines: MakeEngines
        """For the gateway in front."""
        self.asked = threading.Event()
        """Set when it is to end."""
        self.doors: dict[str, str] = {}
        """Where the gateway answers, by door."""

    def replicas(self) -> list[dict[str, Any]]:
        """How each of this machine is, without the figures of its engine."""
        return [_plain(one) for one in self.agent.replicas()] if self.agent is not None else []

    def wait(self) -> None:
        """Until it is to end; keeps the state file."""
        while not self._ended():
            self.tell("running")
            self.asked.wait(_POLL_S)

    def wait_until_ready(self) -> None:
        """As many replicas as it is to have at least, and one, where this machine runs them. Raises ScalellmError where
        the first ones fail.
        """
        least = max(1, self.deployment.replicas.min)
        while self.agent is not None and sum(one["state"] == "ready" for one in self.agent.replicas()) < least:
            if self._ended():
                raise EndpointError("stopped before it was ready")
            if self.agent.failure is not None:
                raise self.agent.failure
            self.tell("starting")
            self.asked.wait(_POLL_S)

    def tell(self, state: str) -> None:
        """Write the state file, whole or not at all."""
        spec = self.head.spec
        told = [{**_plain(one), "node": node["node"]} for node in self.head.nodes.values() for one in node["replicas"]]
        self._record(
            {
                "endpoint": self.deployment.endpoint,
                "state": state,
                "version": spec["current"],
                "next_version": spec["next"],
                **{name: spec[name] for name in ("min", "max", "desired")},
                "room": self.head.room(),
                "cost_per_hour": self.head.cost_per_hour(),
                "replicas": told,
                **self.deployment.standing,
                "doors": self.doors,
            }
        )

    def drain(self) -> None:
        """Ends the replicas as gently as the deployment says."""
        if self.agent is not None:
            self.agent.drain()
        else:
            self.head.end(self.deployment.drain_seconds + _DRAIN_MARGIN_S)

    def _ended(self) -> bool:
        if self.head.failure is not None:
            raise self.head.failure
        return self.asked.is_set() or self.head.asked.is_set()


@contextmanager
def local(
    deployment: Deployment,
    repositories: Sequence[Path],
    place: Place,
    *,
    progress: Progress,
    check: Check | None = None,
    model_of: ModelOf | None = None,
    allow_unverified: bool = False,
) -> Iterator[Local]:
    """The endpoint for the length of a ``with`` block, once its first replicas are ready where this machine runs them
    (with a ``network`` others do, as they join); drained at its end, killed after an error. SIGINT and SIGTERM set
    ``asked``; a second one ends the drain. ``check`` is asked of a server before its worker starts, while its version
    is on trial or where the deployment wants that. Raises ScalellmError.
    """
    from toolchain.fleet.head.versions import version_of
    from toolchain.fleet.node import alone
    from toolchain.fleet.plane import require

    require()
    runs = EndpointError(
        f"the endpoint {deployment.endpoint} runs already", hint=f"scalellm deploy down {deployment.endpoint}"
    )
    _make(place)
    with ExitStack() as stack:
        record = stack.enter_context(running.Place(place.folder).hold(lambda: runs))
        _clear(place, keep=deployment.network is not None)
        folder = place.folder / VERSIONS
        version = version_of(deployment, repositories, folder, progress, allow_unverified=allow_unverified)
        if deployment.network is None:
            alone.must_have_room(deployment, version, alone.machine_of(version))
        yield stack.enter_context(_opened(deployment, version, place, record, progress, check, model_of))


@contextmanager
def _opened(
    deployment: Deployment,
    version: Version,
    place: Place,
    record: running.Record,
    progress: Progress,
    check: Check | None,
    model_of: ModelOf | None,
) -> Iterator[Local]:
    from toolchain.fleet.front.front import steered
    from toolchain.fleet.front.meter import Meter
    from toolchain.fleet.front.traffic import Traffic
    from toolchain.fleet.front.view import View
    from toolchain.fleet.head.ground import ground
    from toolchain.fleet.head.head import Head, Surroundings
    from toolchain.fleet.head.versions import lane_of, resumed
    from toolchain.ledger.book import FILE, Ledger

    with ground(deployment, place.folder, progress) as (board, plane):
        traffic, meter = Traffic(), Meter(Ledger.open(place.folder / FILE, deployment.endpoint), progress.note)
        around = Surroundings(
            board, traffic, lambda one: lane_of(one, model_of), place.events, progress, meter, place.board()
        )
        spec = resumed(board.read("spec").get("spec"), deployment.endpoint, version, deployment.scaling)
        head = Head(spec, around)
        agent = None if deployment.network else _agent(version, place, board, plane, progress, check)
        found = Local(deployment, record, head, agent)
        found.engines = steered(plane, traffic, meter, View(board, meter, place.events))
        with ending_sets(found.asked):
            try:
                with _threads(head.run, *([] if agent is None else [agent.run])):
                    found.wait_until_ready()
                    yield found
                found.tell("draining")
                found.drain()
            finally:
                if agent is not None:
                    agent.kill()
                meter.close()


def _agent(
    version: Version, place: Place, board: Board, plane: Plane, progress: Progress, check: Check | None
) -> Agent:
    """This machine as a node, which the board knows from now on."""
    from toolchain.fleet.head.versions import provided
    from toolchain.fleet.node import alone
    from toolchain.fleet.node.agent import Agent, Maker, Node

    device, gpus = alone.gpus_of(version)
    maker = Maker(place.folder, str(plane.folder), provided, progress=progress, check=check, gpus=gpus)
    agent = Agent(Node(NODE, device=device, gpus=len(gpus), room=alone.LIMIT, turns=True), board, maker, progress)
    agent.round()
    return agent


@contextmanager
def _threads(*works: Callable[[threading.Event], None]) -> Iterator[None]:
    """Each in a thread, told to end at the end of the block."""
    until = threading.Event()
    threads = [threading.Thread(target=work, args=(until,)) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        until.set()
        for thread in threads:
            thread.join()


def _plain(replica: Mapping[str, Any]) -> dict[str, Any]:
    """Without the figures of its engine."""
    return {name: value for name, value in replica.items() if name != "figures"}


def ask(place: Place, what: Mapping[str, Any]) -> dict[str, Any]:
    """Ask a running endpoint's head. Raises ScalellmError for what it refuses."""
    from toolchain.fleet.head import asking

    if place.read() is None:
        raise EndpointError(f"the endpoint {place.folder.name} does not run here", hint="scalellm deploy status")
    return asking.ask(place.board(), what)


def update(
    place: Place,
    deployment: Deployment,
    repositories: Sequence[Path],
    *,
    progress: Progress,
    on_event: Callable[[Mapping[str, Any]], None],
    allow_unverified: bool = False,
) -> int:
    """Replace what a running endpoint runs, and wait until that is done. -> the new version's number. Raises
    RejectedError where it was given up and the old one stays.
    """
    from toolchain.fleet.control.seats import Machine
    from toolchain.fleet.head import asking, versions
    from toolchain.fleet.node import alone

    folder = place.folder / VERSIONS
    version = versions.version_of(deployment, repositories, folder, progress, allow_unverified=allow_unverified)
    if (told := place.board().read(f"nodes/{NODE}")) and not (place.read() or {}).get("network", True):
        alone.must_have_room(deployment, version, Machine.read(told[f"nodes/{NODE}"]))
    begin = place.events.stat().st_size if place.events.exists() else 0
    answer = ask(place, {"ask": "update", "version": version, "scaling": deployment.scaling})
    asking.outcome(asking.events(place.events, begin, lambda: place.read() is not None), on_event)
    return int(answer["version"])


def cancel(place: Place) -> tuple[int, int]:
    """End a running update. -> the version that stays, and the one that is given up. Raises ScalellmError."""
    answer = ask(place, {"ask": "cancel"})
    return int(answer["version"]), int(answer["given_up"])


def down(place: Place, timeout_s: float) -> bool:
    """Ask a running endpoint to end and wait for it; False where none runs. Raises EndpointError when it does not."""
    return running.Place(place.folder).end(timeout_s)


def all_running(work: Path) -> list[dict[str, Any]]:
    """What the endpoints of this machine say of themselves that run."""
    places = (Place(folder.resolve()) for folder in sorted((work / "endpoints").glob("*")))
    return [found for place in places if "endpoint" in (found := place.read() or {})]


def _make(place: Place) -> None:
    """A private folder."""
    try:
        place.folder.mkdir(parents=True, exist_ok=True)
        place.folder.chmod(0o700)
    except OSError as error:
        raise ArtifactError(f"{place.folder}: cannot be written: {error.strerror}") from error


def _clear(place: Place, *, keep: bool) -> None:
    """What an endpoint before this one left there would be found as workers, or as wanted. ``keep``: its versions,
    which run on other machines.
    """
    for name in ("discovery", "board", "replicas", *(() if keep else (VERSIONS,))):
        shutil.rmtree(place.folder / name, ignore_errors=True)
    (place.folder / "discovery").mkdir()
