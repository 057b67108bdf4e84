"""deploy: model repositories -> an endpoint on this machine: replicas, each a Triton and a worker, kept running.

The gateway in front is opened by the caller inside ``local``. It prints nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain import runner, running
from toolchain.errors import ArtifactError, EndpointError, ScalellmError
from toolchain.progress import Progress
from toolchain.servers.triton.locate import find_server
from toolchain.servers.triton.needs import needs_of
from toolchain.servers.triton.ports import free_ports
from toolchain.servers.triton.supervisor import ServingInfo, Supervisor

if TYPE_CHECKING:
    from toolchain.fleet.deployment import Deployment
    from toolchain.fleet.plane import Plane
    from toolchain.gateway.service import MakeEngines

_BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 10.0)
"""Before a dead worker's next start; one that lived for ``_STEADY_S`` begins again at the first."""
_STEADY_S = 60.0
_POLL_S = 0.2
_KILL_MARGIN_S = 10.0


@dataclass(frozen=True)
class Place:
    """Where an endpoint on this machine keeps its files."""

    folder: Path

    @classmethod
    def of(cls, work: Path, endpoint: str) -> Place:
        return cls((work / "endpoints" / endpoint).resolve())

    def plane(self, endpoint: str) -> Plane:
        """Its discovery: a folder that nobody else may read."""
        from toolchain.fleet.plane import Plane

        return Plane(self.folder / "discovery", endpoint)

    def read(self) -> dict[str, Any] | None:
        """What the endpoint says of itself; None where none runs."""
        return running.Place(self.folder).state()


class Replica:
    """A supervised Triton on ports of its own, and the worker in front of it."""

    def __init__(self, number: int, repository: Path, place: Place, deployment: Deployment, progress: Progress) -> None:
        self.number, self.repository = number, repository
        self._folder = place.folder / f"replica-{number}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._place, self._deployment, self._progress = place, deployment, progress
        needs, self._ports = needs_of(repository), free_ports()
        self._supervisor = Supervisor(
            find_server("auto", environ=os.environ, needs=needs),
            repository,
            self._ports,
            log=self._folder / "triton.log",
            progress=progress,
            ranks=needs.ranks,
            exit_timeout_s=max(1, round(deployment.drain_seconds)),
        )
        self._worker: runner.Process | None = None
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self.failure: ScalellmError | None = None
        self.restarts = 0

    def start(self, check: Callable[[ServingInfo], None] | None, fingerprint: str) -> None:
        """Until its Triton has generated a token and its worker runs. Raises EndpointError."""
        from toolchain.fleet.worker import Spec

        info = self._supervisor.start()
        if check is not None:
            check(info)
        spec = Spec(
            endpoint=self._deployment.endpoint,
            discovery=str(self._place.folder / "discovery"),
            triton_url=info.http_url,
            repository=str(self.repository.resolve()),
            card=str(self._place.folder / "card"),
            drain_s=self._deployment.drain_seconds,
            fingerprint=fingerprint,
            state=str(self._folder / "worker.json"),
        )
        spec.write(self._folder / "spec.json")
        self._threads = [threading.Thread(target=self._guarded, args=(one,)) for one in (self._watch, self._keep)]
        for thread in self._threads:
            thread.start()

    def state(self) -> dict[str, Any]:
        """For the state file."""
        found: dict[str, Any] = {"state": "starting", "why": ""}
        with contextlib.suppress(FileNotFoundError, ValueError):
            found |= json.loads((self._folder / "worker.json").read_text(encoding="utf-8"))
        if self.failure is not None:
            found |= {"state": "failed", "why": self.failure.message}
        pids = {"worker": self._worker.pid if self._worker else 0, "triton": self._supervisor.pid}
        found.pop("pid", None)
        return {"replica": self.number, **found, "pids": pids, "ports": self._ports.named(), "restarts": self.restarts}

    def stop(self) -> None:
        """Drains the worker, then its Triton."""
        self._stopping.set()
        self._supervisor.ask_to_stop()
        for thread in self._threads:
            thread.join()
        self._supervisor.stop()

    def kill(self) -> None:
        """Everything, at once."""
        self._stopping.set()
        self._supervisor.ask_to_stop()
        if self._worker is not None:
            self._worker.hurry()
        for thread in self._threads:
            thread.join()
        self._supervisor.kill()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except ScalellmError as error:
            self.failure = error
            self._progress.note(f"replica {self.number} is given up: {error.message}")
            self._stopping.set()
            self._supervisor.ask_to_stop()

    def _watch(self) -> None:
        """The Triton, replaced when it dies or generates no more, until the supervisor is asked to stop."""
        self._supervisor.watch()

    def _keep(self) -> None:
        """The worker, started again whenever it dies; drained at the end."""
        argv = [sys.executable, "-m", "toolchain.fleet.worker", str(self._folder / "spec.json")]
        tries = 0
        while not self._stopping.is_set():
            begun = time.monotonic()
            (self._folder / "worker.json").unlink(missing_ok=True)
            with runner.start(argv, log=self._folder / "worker.log") as worker:
                self._worker = worker
                while worker.poll() is None and not self._stopping.wait(_POLL_S):
                    pass
                if self._stopping.is_set():
                    worker.terminate(self._deployment.drain_seconds + _KILL_MARGIN_S)
                    return
            tries = 0 if time.monotonic() - begun > _STEADY_S else tries + 1
            self.restarts += 1
            self._progress.note(f"replica {self.number}: its worker ended; it is started again")
            self._stopping.wait(_BACKOFF_S[min(tries, len(_BACKOFF_S)) - 1])


class Local:
    """A running endpoint of this machine."""

    def __init__(
        self, deployment: Deployment, record: running.Record, replicas: Sequence[Replica], engines: MakeEngines
    ) -> None:
        self.deployment, self.replicas = deployment, replicas
        self._record = record
        self.engines = engines
        """For the gateway in front."""
        self.asked = threading.Event()
        """Set when it is to end."""
        self.doors: dict[str, str] = {}
        """Where the gateway answers, by door."""

    def wait(self) -> None:
        """Until it is to end; keeps the state file. Raises EndpointError when no replica is left."""
        while not self.asked.wait(_POLL_S):
            self.tell("running")
            if all(replica.failure for replica in self.replicas):
                failure = self.replicas[-1].failure
                raise EndpointError(f"no replica is left: {failure.message if failure else ''}")

    def tell(self, state: str) -> None:
        """Write the state file, whole or not at all."""
        self._record(
            {
                "endpoint": self.deployment.endpoint,
                "state": state,
                "replicas": [replica.state() for replica in self.replicas],
                "ports": self.deployment.ports.model_dump(),
                "doors": self.doors,
            }
        )


@contextmanager
def local(
    deployment: Deployment,
    repositories: Sequence[Path],
    place: Place,
    *,
    progress: Progress,
    check: Callable[[ServingInfo], None] | None = None,
) -> Iterator[Local]:
    """The replicas, for the length of a ``with`` block; drained at its end, killed after an error. SIGINT and
    SIGTERM set ``asked``; a second one ends the drain. ``check`` is called for each server before its worker starts.
    Raises ScalellmError.
    """
    from toolchain.fleet.plane import require

    require()
    runs = EndpointError(
        f"the endpoint {deployment.endpoint} runs already", hint=f"scalellm deploy down {deployment.endpoint}"
    )
    _make(place)
    with (
        running.Place(place.folder).hold(lambda: runs) as record,
        _opened(deployment, repositories, place, record, progress, check) as found,
    ):
        yield found


@contextmanager
def _opened(
    deployment: Deployment,
    repositories: Sequence[Path],
    place: Place,
    record: running.Record,
    progress: Progress,
    check: Callable[[ServingInfo], None] | None,
) -> Iterator[Local]:
    from toolchain.fleet import front, membership
    from toolchain.fleet.texts import Parameters, Texts
    from toolchain.repository import Repository

    passports = [membership.checked_passport(one, "") for one in repositories]
    identity = membership.identity(passports[0])
    for repository in repositories[1:]:
        membership.checked_passport(repository, identity)
    limits = passports[0].limits
    if limits.max_input_len < limits.max_seq_len - 1:
        most = limits.max_input_len
        progress.note(f"note: an answer is continued elsewhere up to {most} tokens with its prompt (max_input_len)")
    _clear(place)
    membership.write_card(repositories[0], passports[0], place.folder / "card")
    texts = Texts(repositories[0] / membership.TOKENIZER, Parameters.of(Repository.open(repositories[0]).parameters))
    replicas = [
        Replica(number, repositories[(number - 1) % len(repositories)], place, deployment, progress)
        for number in range(1, deployment.count + 1)
    ]
    room = sum(int(Repository.open(one.repository).parameters["bls_max_concurrent_requests"]) for one in replicas)
    found = Local(deployment, record, replicas, front.engines(place.plane(deployment.endpoint), texts, room))
    with _signals(found.asked):
        try:
            for replica in replicas:
                found.tell("starting")
                replica.start(check, identity)
            yield found
            found.tell("draining")
            _all(replica.stop for replica in replicas)
        finally:
            _all(replica.kill for replica in replicas)


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


def _clear(place: Place) -> None:
    """What an endpoint before this one left there would be found as workers."""
    for name in ("discovery", "card"):
        shutil.rmtree(place.folder / name, ignore_errors=True)
        (place.folder / name).mkdir()


def _all(calls: Iterable[Callable[[], None]]) -> None:
    """Each in a thread of its own, so that one drain does not wait for another."""
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@contextmanager
def _signals(asked: threading.Event) -> Iterator[None]:
    def handle(*_: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
