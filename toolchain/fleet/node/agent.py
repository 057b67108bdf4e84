"""A node's agent: it runs the replicas that the board wants of its node, and says on the board how they are.

While the board cannot be reached it keeps running what runs. It decides nothing: that is the head's part.
"""

from __future__ import annotations

import functools
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from toolchain import runner
from toolchain.admission import Asked, admit
from toolchain.errors import ArtifactError, EndpointError, ScalellmError
from toolchain.fleet.board import Board
from toolchain.fleet.control.seats import Seat, Share
from toolchain.fleet.node.replica import Check, Offer, Replica
from toolchain.fleet.worker import membership
from toolchain.progress import Progress

TTL_S = 10.0
"""A node that has said nothing for so long is taken for gone."""
_TELL_S = 1.0
_ROUND_S = 0.2
_KEPT_LOGS = 16
"""Folders of replicas that have ended."""


@dataclass(frozen=True)
class Node:
    """A machine, or a part of one, that runs replicas."""

    name: str
    provider: str = "local"
    device: str = ""
    gpus: int = 0
    room: int | None = None
    """How many replicas it holds at most; None: as many as their recipes' ``services`` say, see ``control.seats``."""
    own: Share | None = None
    """Of the recipe by which it builds its engine itself."""
    turns: bool = False
    """Whether its replicas take all of the endpoint's recipes in turn."""
    price_per_hour: float | None = None
    """US dollars, of the whole node while it runs at least one replica; None where nobody knows."""


@dataclass(frozen=True)
class _Wanted:
    """A replica, as the board wants it."""

    version: int
    seat: Seat


class Running(Protocol):
    """What is used of a ``replica.Replica``."""

    failure: ScalellmError | None

    def start(self) -> None: ...

    def state(self) -> dict[str, Any]: ...

    def stop(self) -> None: ...

    def kill(self) -> None: ...


Make = Callable[[str, Mapping[str, Any]], Running]
"""A replica's name and the version that it is to run (one of the board's ``spec``, under ``trial`` whether it has still
to take the place of another, under ``gpus`` the numbers of its GPUs) -> the replica, not yet started.
"""


Provide = Callable[[Mapping[str, Any], str], Path]
"""A version (one of the board's ``spec``) and a replica's name -> its repository on this node. Raises ScalellmError."""


class Maker:
    """Replicas of this machine: repository, gate, Triton and worker. A ``Make``."""

    def __init__(
        self,
        folder: Path,
        discovery: str,
        provide: Provide,
        *,
        progress: Progress,
        check: Check | None = None,
        gpus: Sequence[str] = (),
    ) -> None:
        """``check`` is asked of each replica's server while its version is on trial, and always where that wants it.
        ``gpus``: how CUDA_VISIBLE_DEVICES names those of the node, in the order in which they are numbered.
        """
        self._folder, self._discovery, self._provide, self._gpus = folder, discovery, provide, gpus
        self._progress, self._check = progress, check
        self._made: dict[str, Replica] = {}

    def __call__(self, name: str, version: Mapping[str, Any]) -> Replica:
        offer = Offer(
            lane=str(version["lane"]),
            discovery=self._discovery,
            identity=str(version["identity"]),
            drain_s=float(version["drain_seconds"]),
            start_s=float(version["start_seconds"]),
        )
        check = self._check if version["conformance"] or version["trial"] else None
        folder = self._folder / "replicas" / name
        self._prune(folder.parent)
        provide = functools.partial(self._checked, version, name)
        gpus = [self._gpus[one] for one in version["gpus"] if one < len(self._gpus)]
        self._made[name] = Replica(name, provide, folder, offer, progress=self._progress, check=check, gpus=gpus)
        return self._made[name]

    def _prune(self, folder: Path) -> None:
        """Removes the oldest logs of replicas that have ended."""
        self._made = {name: one for name, one in self._made.items() if not one.ended}
        found = [one for one in folder.glob("*") if one.name not in self._made]
        for old in sorted(found, key=lambda one: one.stat().st_mtime)[:-_KEPT_LOGS]:
            shutil.rmtree(old, ignore_errors=True)

    def _checked(self, version: Mapping[str, Any], name: str) -> Path:
        """Its repository, whose engine is of the endpoint's model and may be trusted. Raises ScalellmError."""
        if version["gpus"] and max(version["gpus"]) >= len(self._gpus):
            raise ArtifactError(f"{name} is to run on GPU {max(version['gpus'])}, and there are {len(self._gpus)} here")
        repository = self._provide(version, name)
        membership.checked_passport(repository, str(version["identity"]))
        admit(repository, Asked(allow_unverified=bool(version["allow_unverified"])))
        return repository


class Agent:
    """``run`` in a thread of its own, then ``drain`` or ``kill``."""

    def __init__(self, node: Node, board: Board, make: Make, progress: Progress) -> None:
        self.node = node
        self._board, self._make, self._progress = board, make, progress
        self._running: dict[str, tuple[_Wanted, Running]] = {}
        self._ending: dict[str, threading.Thread] = {}
        self._wanted: dict[str, _Wanted] = {}
        self._versions: dict[int, dict[str, Any]] = {}
        self._next: int | None = None
        self.failure: ScalellmError | None = None
        """Of the replica that was given up last."""
        self._state = "up"
        self._told: dict[str, Any] = {}
        self._told_s = float("-inf")
        self._reached = True

    def run(self, until: threading.Event) -> None:
        """Rounds until ``until`` is set."""
        while not until.is_set():
            self.round()
            until.wait(_ROUND_S)

    def round(self) -> None:
        """One look at the board: what is wanted is started, what is not is drained, how it is is told."""
        self._look()
        if self._state == "up":
            self._reconcile()
        self._tell()

    def replicas(self) -> list[dict[str, Any]]:
        """How each is."""
        return [
            {**one.state(), "version": wanted.version, **wanted.seat.told()}
            for wanted, one in list(self._running.values())
        ]

    def drain(self) -> None:
        """Takes no new replicas, ends those that run as gently as they were told, and leaves the board."""
        self._state = "draining"
        self._end(self._running)
        while self._ending:
            self._tell()
            self._forget()
            time.sleep(_ROUND_S)
        self._leave()

    def kill(self) -> None:
        """Ends everything at once."""
        self._state = "draining"
        runner.in_parallel(one.kill for _wanted, one in list(self._running.values()))
        for thread in self._ending.values():
            thread.join()
        self._running.clear()
        self._leave()

    def _look(self) -> None:
        """What is wanted; as before where the board cannot be reached."""
        try:
            key = f"assigned/{self.node.name}"
            assigned = self._board.read(key).get(key)
            spec = self._board.read("spec").get("spec")
        except EndpointError as error:
            self._lost(error)
            return
        self._found()
        if spec is not None:
            self._versions = {int(one["version"]): one for one in spec["versions"]}
            self._next = spec.get("next")
        if assigned is not None:  # a board that has forgotten it does not want the end of everything
            self._wanted = {
                str(one["name"]): _Wanted(int(one["version"]), Seat.read(one)) for one in assigned["replicas"]
            }

    def _reconcile(self) -> None:
        for name, wanted in self._wanted.items():
            if name not in self._running and wanted.version in self._versions:
                more = {"trial": wanted.version == self._next, "gpus": wanted.seat.gpus}
                one = self._make(name, {**self._versions[wanted.version], **more})
                self._running[name] = wanted, one
                one.start()
        self._end(name for name in self._running if name not in self._wanted)
        self._forget()

    def _end(self, names: Iterable[str]) -> None:
        for name in list(names):
            if name not in self._ending:
                _wanted, one = self._running[name]
                self.failure = one.failure or self.failure
                self._ending[name] = threading.Thread(target=one.kill if one.failure else one.stop, name=f"end-{name}")
                self._ending[name].start()

    def _forget(self) -> None:
        for name in [name for name, thread in self._ending.items() if not thread.is_alive()]:
            del self._ending[name], self._running[name]

    def _tell(self) -> None:
        """At once where something has changed, else once a second."""
        said = {**asdict(self.node), "node": self.node.name, "state": self._state, "replicas": self.replicas()}
        del said["name"]
        if said == self._told and time.monotonic() - self._told_s < _TELL_S:
            return
        try:
            self._board.put(f"nodes/{self.node.name}", said, ttl_s=TTL_S)
        except EndpointError as error:
            self._lost(error)
            return
        self._found()
        self._told, self._told_s = said, time.monotonic()

    def _leave(self) -> None:
        try:
            self._board.remove(f"nodes/{self.node.name}")
        except EndpointError as error:
            self._lost(error)

    def _lost(self, error: EndpointError) -> None:
        if self._reached:
            self._progress.note(f"{self.node.name}: {error.message}; what runs goes on")
        self._reached = False

    def _found(self) -> None:
        if not self._reached:
            self._progress.note(f"{self.node.name}: the endpoint's board is reached again")
        self._reached = True
