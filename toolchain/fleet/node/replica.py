"""A replica: a supervised Triton on ports of its own and the worker in front of it, kept running until it is ended.

It knows nothing of other replicas, nor of who wants it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain import gpu, runner
from toolchain.errors import ArtifactError, EndpointError, ScalellmError
from toolchain.fleet.worker.worker import Spec
from toolchain.progress import Progress
from toolchain.servers.triton.command import Ports
from toolchain.servers.triton.locate import find_server
from toolchain.servers.triton.needs import needs_of
from toolchain.servers.triton.ports import free_ports
from toolchain.servers.triton.supervisor import ServingInfo, Supervisor, status_file_of

_BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 10.0)
"""Before a dead worker's next start; after the last of them it is given up."""
_STEADY_S = 60.0
"""A worker that lived for so long begins again at the first."""
_POLL_S = 0.2
_KILL_MARGIN_S = 10.0
STARTING = "starting"


@dataclass(frozen=True)
class Offer:
    """What a worker is told of the endpoint that it is part of."""

    lane: str
    """The name under which it registers: replicas that can go on with each other's requests share it."""
    discovery: str
    identity: str
    """Of the model; see ``worker.membership.identity``."""
    drain_s: float
    start_s: float = 600.0
    """Until its Triton has generated a token."""


Check = Callable[[ServingInfo], None]
"""Raises ScalellmError for a server that may not take requests."""


class Replica:
    """Lives from ``start`` to ``stop`` or ``kill``. ``provide`` gives its repository, which may take long."""

    def __init__(
        self,
        name: str,
        provide: Callable[[], Path],
        folder: Path,
        offer: Offer,
        *,
        progress: Progress,
        check: Check | None = None,
        gpus: Sequence[str] = (),
    ) -> None:
        """``gpus``: those that it gets, as CUDA_VISIBLE_DEVICES names them; none: what its engine takes by itself."""
        self.name, self._gpus = name, gpus
        self._provide, self._folder, self._offer = provide, folder, offer
        self._progress, self._check = progress, check
        self._ports: Ports | None = None
        self._supervisor: Supervisor | None = None
        self._worker: runner.Process | None = None
        self._stopping = threading.Event()
        self._life = threading.Thread(target=self._live, name=f"replica-{name}")
        self._watching: threading.Thread | None = None
        self.failure: ScalellmError | None = None
        """Why it was given up."""
        self.restarts = 0
        """Of its worker."""

    def start(self) -> None:
        """Returns at once; ``state`` says how far it is."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._life.start()

    def state(self) -> dict[str, Any]:
        """How it is: ``state`` is starting, ready, down, draining, ended or failed."""
        found: dict[str, Any] = {"state": STARTING, "why": ""}
        with contextlib.suppress(FileNotFoundError, ValueError):
            found |= json.loads((self._folder / "worker.json").read_text(encoding="utf-8"))
        if self.failure is not None:
            found |= {"state": "failed", "why": self.failure.message}
        elif self._stopping.is_set():
            found["state"] = "draining" if self._life.is_alive() else "ended"
        worker, supervisor, ports = self._worker, self._supervisor, self._ports
        found.pop("pid", None)
        pids = {"worker": worker.pid if worker else 0, "triton": supervisor.pid if supervisor else 0}
        named = ports.named() if ports else {}
        return {"name": self.name, **found, "pids": pids, "ports": named, "restarts": self.restarts}

    @property
    def ended(self) -> bool:
        """Whether nothing of it will run any more."""
        return self._stopping.is_set() and not self._life.is_alive()

    def stop(self) -> None:
        """Drains the worker, then its Triton; returns when both have ended."""
        self._ask_to_stop()
        self._join()
        if self._supervisor is not None:
            self._supervisor.stop()

    def kill(self) -> None:
        """Everything, at once."""
        self._ask_to_stop()
        if self._worker is not None:
            self._worker.hurry()
        self._join()
        if self._supervisor is not None:
            self._supervisor.kill()

    def _ask_to_stop(self) -> None:
        self._stopping.set()
        if self._supervisor is not None:
            self._supervisor.ask_to_stop()

    def _join(self) -> None:
        for thread in (self._life, self._watching):
            if thread is not None and thread.is_alive():
                thread.join()

    def _live(self) -> None:
        """Its whole life, in a thread."""
        try:
            info = self._open(self._provide())
            if self._check is not None:
                self._check(info)
            if self._stopping.is_set():
                return
            self._watching = threading.Thread(target=self._watch, name=f"watch-{self.name}")
            self._watching.start()
            self._keep(info)
        except ScalellmError as error:
            self._give_up(error)
        except OSError as error:
            self._give_up(ArtifactError(f"{error.filename or self._folder}: {error.strerror}"))

    def _open(self, repository: Path) -> ServingInfo:
        """Until its Triton has generated a token. Raises ScalellmError."""
        offer = self._offer
        needs, self._ports = needs_of(repository), free_ports()
        self._supervisor = Supervisor(
            find_server("auto", environ={**os.environ, **gpu.only(self._gpus)}, needs=needs),
            repository,
            self._ports,
            log=self._folder / "triton.log",
            progress=self._progress,
            ranks=needs.ranks,
            exit_timeout_s=max(1, round(offer.drain_s)),
            start_timeout_s=offer.start_s,
        )
        if self._stopping.is_set():
            raise EndpointError("stopped before it was started")
        info = self._supervisor.start()
        spec = Spec(
            endpoint=offer.lane,
            discovery=offer.discovery,
            triton_url=info.http_url,
            repository=str(repository.resolve()),
            drain_s=offer.drain_s,
            fingerprint=offer.identity,
            state=str(self._folder / "worker.json"),
            replica=self.name,
            metrics_url=info.metrics_url,
            status_file=str(status_file_of(info.log, self._ports.http)),
        )
        spec.write(self._folder / "spec.json")
        return info

    def _give_up(self, error: ScalellmError) -> None:
        if self._stopping.is_set():  # then it is only that it was ended early
            return
        self.failure = error
        self._progress.note(f"replica {self.name} is given up: {error.message}")
        self._ask_to_stop()
        if self._supervisor is not None:
            self._supervisor.kill()

    def _watch(self) -> None:
        """The Triton, replaced when it dies or generates no more, until the supervisor is asked to stop."""
        assert self._supervisor is not None
        try:
            self._supervisor.watch()
        except ScalellmError as error:
            self._give_up(error)

    def _keep(self, info: ServingInfo) -> None:
        """The worker, started again whenever it dies; drained at the end. Raises EndpointError where it keeps dying."""
        argv = [sys.executable, "-m", "toolchain.fleet.worker", str(self._folder / "spec.json")]
        log = self._folder / "worker.log"
        tries = 0
        while not self._stopping.is_set():
            begun = time.monotonic()
            (self._folder / "worker.json").unlink(missing_ok=True)
            with runner.start(argv, log=log) as worker:
                self._worker = worker
                while worker.poll() is None and not self._stopping.wait(_POLL_S):
                    pass
                if self._stopping.is_set():
                    worker.terminate(self._offer.drain_s + _KILL_MARGIN_S)
                    return
            tries = 0 if time.monotonic() - begun > _STEADY_S else tries + 1
            self.restarts += 1
            if tries > len(_BACKOFF_S):
                raise EndpointError(
                    f"the worker of {info.http_url} ended {tries} times in a row; its last words:\n"
                    f"{runner.tail(log, 5)}",
                    hint=f"less {log}",
                )
            self._progress.note(f"replica {self.name}: its worker ended; it is started again")
            self._stopping.wait(_BACKOFF_S[tries - 1])
