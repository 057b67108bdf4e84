"""What is deployed of a model on this machine: ``HOME/models/NAME`` is a ``running.Place``. It starts nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from toolchain.errors import ArtifactError
from toolchain.registry.card import Card
from toolchain.running import Place


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
    found = Place(card.folder).state()
    if found is None:
        return None
    try:
        return Deployment(**{**found, "triton": tuple(found.get("triton", ()))})
    except TypeError:  # of another release
        return Deployment(found["pid"])


@contextmanager
def hold(card: Card) -> Iterator[Callable[[Deployment], None]]:
    """Be the one process that deploys a model, for the length of a block; what it yields records where it answers.

    Raises ArtifactError while another process is that.
    """
    with Place(card.folder).hold(lambda: busy(card)) as record:
        yield lambda deployment: record(asdict(deployment))


def busy(card: Card) -> ArtifactError:
    """The refusal to change a model that is deployed."""
    found = deployed(card)
    return ArtifactError(
        f"{card.name} is deployed (pid {found.pid if found else 'unknown'})",
        hint=f"scalellm model undeploy {card.name}",
    )


def stop(card: Card, timeout_s: float = 120.0) -> bool:
    """Ask a deployment to finish, and wait for it. -> whether there was one. Raises EndpointError when it does not."""
    return Place(card.folder).end(timeout_s)


def log_file(card: Card) -> Path:
    """Where a detached deployment writes."""
    return card.folder / "deploy.log"
