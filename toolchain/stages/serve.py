"""serve: a model repository -> a running Triton, in the foreground until a signal, or in the background of a block.

It prints nothing: ``on_ready`` gets the addresses.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypedDict, Unpack

from toolchain.errors import ScalellmError
from toolchain.progress import Progress
from toolchain.servers.triton.command import Ports
from toolchain.servers.triton.health import Policy
from toolchain.servers.triton.locate import Preference, Server, backends_of, find_server
from toolchain.servers.triton.supervisor import ServingInfo, Supervisor

__all__ = ["Options", "Policy", "Ports", "ServingInfo", "background", "serve"]


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

    Must be called in the main thread, because it takes over the two signals for as long as it runs. The log is by
    default ``triton.log`` beside the repository. A server that does not start or cannot be kept running is an
    ``EndpointError``.
    """
    supervisor = _supervisor(repository, server, ports, log, progress, options)
    with _signals(supervisor) as asked:
        try:
            on_ready(supervisor.start())
            supervisor.watch()
            supervisor.stop()
        except ScalellmError:
            if not asked.is_set():
                raise
        finally:
            supervisor.kill()
    return 0


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
    """Serves, supervised by a thread, for the length of a ``with`` block; drains at its end, kills after an error."""
    supervisor = _supervisor(repository, server, ports, log, progress, options)
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
    repository: Path, server: Server | Preference, ports: Ports, log: Path | None, progress: Progress, options: Options
) -> Supervisor:
    needs = backends_of(repository)
    if isinstance(server, str):
        server = find_server(server, environ=os.environ, needs=needs)
    log = log or repository.resolve().parent / "triton.log"
    return Supervisor(server, repository, ports, log=log, progress=progress, **options)


def _watch_quietly(supervisor: Supervisor, progress: Progress) -> None:
    try:
        supervisor.watch()
    except ScalellmError as error:  # the block's own requests will fail, and this line says why
        progress.note(f"triton: {error.message}")


@contextmanager
def _signals(supervisor: Supervisor) -> Iterator[threading.Event]:
    """SIGINT and SIGTERM ask to stop, and the second time hurry; restored at the end. Yields "was asked"."""
    asked = threading.Event()

    def handle(_number: int, _frame: FrameType | None) -> None:
        if asked.is_set():
            supervisor.hurry()
        asked.set()
        supervisor.ask_to_stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
