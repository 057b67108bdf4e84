"""What is deployed on this machine: one process for a model, found by a lock that the kernel drops when it dies.

``HOME/models/NAME/deployment.json`` says where it answers; it counts only while the process that wrote it holds the
lock. So a killed deployment is not deployed, whatever its file says. It starts nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from toolchain import workspace
from toolchain.errors import ArtifactError, EndpointError
from toolchain.registry.card import Card

FILE, LOCK = "deployment.json", ".deployment.lock"
_POLL_S = 0.1
_PATIENCE_S = 1.0


@dataclass(frozen=True)
class Deployment:
    """One model at work."""

    pid: int
    ready: bool = False
    """Whether it has answered; before that it is built or loaded."""
    predict: str = ""
    """The address of ``/predict``."""
    openai: str = ""
    """The address of OpenAI's API."""
    triton: tuple[str, ...] = ()
    """KServe HTTP, of each service."""
    log: str = ""


def deployed(card: Card) -> Deployment | None:
    """What runs of a model now; None where nothing does."""
    try:
        with (card.folder / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
    except FileNotFoundError:
        return None
    except BlockingIOError:
        pass
    with suppress(OSError, ValueError, TypeError):
        raw = json.loads((card.folder / FILE).read_text(encoding="utf-8"))
        return Deployment(**{**raw, "triton": tuple(raw["triton"])})
    return Deployment(0)


@contextmanager
def hold(card: Card) -> Iterator[Callable[[Deployment], None]]:
    """Be the one process that deploys a model, for the length of a block; what it yields records where it answers.

    Raises ArtifactError while another process is that.
    """
    file = card.folder / FILE

    def record(deployment: Deployment) -> None:
        text = json.dumps(asdict(deployment), indent=2) + "\n"
        workspace.write_durably(file, text.encode())

    with (card.folder / LOCK).open("ab") as lock:
        if not _taken(lock):
            raise busy(card)
        try:
            record(Deployment(os.getpid()))
            yield record
        finally:
            file.unlink(missing_ok=True)


def _taken(lock: BinaryIO) -> bool:
    """Take the lock; it is tried for a moment, because whoever looks (``deployed``) holds it, too, while looking."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S / 10)


def busy(card: Card) -> ArtifactError:
    """The refusal to change a model that is deployed."""
    found = deployed(card)
    return ArtifactError(
        f"{card.name} is deployed (pid {found.pid if found else 'unknown'})",
        hint=f"scalellm model undeploy {card.name}",
    )


def stop(card: Card, timeout_s: float = 120.0) -> bool:
    """Ask a deployment to finish, and wait for it. -> whether there was one. Raises EndpointError when it does not."""
    found = deployed(card)
    if found is None:
        return False
    if found.pid:
        with suppress(ProcessLookupError):
            os.kill(found.pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while deployed(card) is not None:
        if time.monotonic() > deadline:
            raise EndpointError(
                f"{card.name}: pid {found.pid} has not stopped within {timeout_s:g} s", hint=f"kill -9 {found.pid}"
            )
        time.sleep(_POLL_S)
    return True


def log_file(card: Card) -> Path:
    """Where a detached deployment writes."""
    return card.folder / "deploy.log"
