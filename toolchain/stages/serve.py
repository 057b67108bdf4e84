"""serve: a model repository -> a running Triton, or several, until a signal, or in the background of a block.

It prints nothing: ``on_ready`` gets the addresses.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict, Unpack

from toolchain import runner
from toolchain.errors import EndpointError, ScalellmError
from toolchain.progress import Progress
from toolchain.servers.triton.command import PORTS_APART, Ports
from toolchain.servers.triton.health import Policy
from toolchain.servers.triton.locate import Preference, Server, find_server
from toolchain.servers.triton.needs import Needs, needs_of
from toolchain.servers.triton.supervisor import ServingInfo, Supervisor, status_file_of
from toolchain.signals import on_ending

__all__ = ["Options", "Policy", "Ports", "ServingInfo", "background", "ports_of", "serve", "status_file"]

_LAST_PORT = 65535


class Options(TypedDict, total=False):
    """What else the server and its ``Supervisor`` may be told; see there for the defaults."""

    host: str
    model: str
    policy: Policy
    exit_timeout_s: int
    start_timeout_s: float


def serve(
    repository: Path,
    *,
    ports: Ports,
    progress: Progress,
    on_ready: Callable[[ServingInfo], None],
    server: Server | Preference = "auto",
    log: Path | None = None,
    **options: Unpack[Options],
) -> int:
    """Serves until SIGINT or SIGTERM, then drains; a second signal ends the drain. Gives the exit code.

    A repository for several services gets as many servers, one after the other, each with its own ports
    (``ports_of``) and watched by itself: a crash takes one of them, and the others go on. ``on_ready`` is called for
    each. The code is 1 when one of several was given up on the way.

    Must be called in the main thread, because it takes over the two signals for as long as it runs. The log is by
    default ``triton.log`` beside the repository, of several services ``triton-1.log`` and so on. A server that does not
    start or cannot be kept running, or the last of several, is an ``EndpointError``.
    """
    needs = needs_of(repository)
    places = ports_of(ports, needs.services)
    found = find_server(server, environ=os.environ, needs=needs) if isinstance(server, str) else server
    supervisors = []
    for number, place in enumerate(places, 1):
        service = f"{number} of {needs.services}" if needs.services > 1 else ""
        file = _log_of(repository, log, number if service else 0)
        supervisors.append(_supervisor(found, repository, needs, place, file, progress, options, service))
    with _signals(supervisors) as asked:
        watchers = [_Watcher(supervisor, progress) for supervisor in supervisors]
        try:
            for watcher in watchers:
                on_ready(watcher.supervisor.start())
                watcher.start()
            _attend(watchers)
            runner.in_parallel(supervisor.stop for supervisor in supervisors)
        except ScalellmError:
            if not asked.is_set():
                raise
        finally:
            runner.in_parallel(supervisor.kill for supervisor in supervisors)
    return 1 if any(watcher.failure for watcher in watchers) else 0


def ports_of(ports: Ports, services: int) -> list[Ports]:
    """The ports of each service: the first has ``ports``, each next one all three 10 higher (8000, 8010, 8020 ...).

    Raises EndpointError where a port would be needed twice or is none.
    """
    places = [
        Ports(**{name: port + PORTS_APART * number for name, port in ports.named().items()})
        for number in range(services)
    ]
    taken: dict[int, str] = {}
    for number, place in enumerate(places, 1):
        for name, port in place.named().items():
            use = f"{name} of service {number}"
            if port > _LAST_PORT:
                raise EndpointError(
                    f"{use} would be port {port}, and {_LAST_PORT} is the last", hint="take lower ports"
                )
            if port in taken:
                raise EndpointError(
                    f"port {port} is needed twice, for {taken[port]} and {use}",
                    hint=f"leave a gap: each service's ports are {PORTS_APART} higher than those of the one before",
                )
            taken[port] = use
    return places


def status_file(repository: Path, ports: Ports) -> Path:
    """Where the engine of the service on these ports writes what it does, as long as nobody names another log."""
    return status_file_of(_log_of(repository, None), ports.http)


@contextmanager
def background(
    repository: Path,
    *,
    ports: Ports,
    progress: Progress,
    server: Server | Preference = "auto",
    log: Path | None = None,
    **options: Unpack[Options],
) -> Iterator[ServingInfo]:
    """Serves, supervised by a thread, for the length of a ``with`` block; drains at its end, kills after an error.

    One service, also of a repository for several.
    """
    needs = needs_of(repository)
    found = find_server(server, environ=os.environ, needs=needs) if isinstance(server, str) else server
    supervisor = _supervisor(found, repository, needs, ports, _log_of(repository, log), progress, options)
    watcher = threading.Thread(target=_watch_quietly, args=(supervisor, progress), name="triton-supervisor")
    try:
        info = supervisor.start()
        watcher.start()
        yield info
        supervisor.ask_to_stop()
        watcher.join()
        supervisor.stop()
    finally:
        supervisor.ask_to_stop()
        if watcher.is_alive():
            watcher.join()
        supervisor.kill()


def _supervisor(
    server: Server,
    repository: Path,
    needs: Needs,
    ports: Ports,
    log: Path,
    progress: Progress,
    options: Options,
    service: str = "",
) -> Supervisor:
    return Supervisor(
        server, repository, ports, log=log, progress=progress, ranks=needs.ranks, service=service, **options
    )


def _log_of(repository: Path, log: Path | None, number: int = 0) -> Path:
    file = log or repository.resolve().parent / "triton.log"
    return file.with_name(f"{file.stem}-{number}{file.suffix}") if number else file


class _Watcher(threading.Thread):
    """Keeps one of the services running; ``failure`` is why it was given up."""

    def __init__(self, supervisor: Supervisor, progress: Progress) -> None:
        super().__init__(name=f"triton-supervisor-{supervisor.service}", daemon=True)
        self.supervisor = supervisor
        self.failure: ScalellmError | None = None
        self._progress = progress

    def run(self) -> None:
        try:
            self.supervisor.watch()
        except ScalellmError as error:
            self.failure = error
            self.supervisor.kill()
            if self.supervisor.service:
                self._progress.note(f"triton: service {self.supervisor.service} is given up: {error.message}")


def _attend(watchers: Sequence[_Watcher]) -> None:
    """Returns when all were asked to stop; raises the last failure when none is left."""
    for watcher in watchers:
        watcher.join()
    failures = [watcher.failure for watcher in watchers if watcher.failure]
    if len(failures) == len(watchers):
        raise failures[-1]


def _watch_quietly(supervisor: Supervisor, progress: Progress) -> None:
    try:
        supervisor.watch()
    except ScalellmError as error:  # the block's own requests will fail, and this line says why
        progress.note(f"triton: {error.message}")


@contextmanager
def _signals(supervisors: Sequence[Supervisor]) -> Iterator[threading.Event]:
    """SIGINT and SIGTERM ask to stop, and the second time hurry; restored at the end. Yields "was asked"."""
    asked = threading.Event()

    def ask() -> None:
        for supervisor in supervisors:
            if asked.is_set():
                supervisor.hurry()
            supervisor.ask_to_stop()
        asked.set()

    with on_ending(ask):
        yield asked
