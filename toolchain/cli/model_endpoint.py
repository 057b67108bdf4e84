"""A model that is known by name, as an endpoint over several replicas: ``model deploy`` without ``--local``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.cli import deploying
from toolchain.errors import RecipeError

if TYPE_CHECKING:
    from toolchain.console import Screen
    from toolchain.fleet.deployment import Deployment as Endpoint
    from toolchain.gateway.run import Listen
    from toolchain.registry import Card


def endpoint_of(card: Card, file: Path | None, replicas: int, host: str, port: int, grpc_port: int) -> Endpoint:
    """What a model's endpoint is to be. Raises RecipeError for a file in which the model does not occur."""
    from toolchain.fleet.deployment import Deployment, Ports, Replicas, load_deployment

    if file is None:
        ports = Ports(openai=port, predict=port, grpc=grpc_port)
        counts = Replicas(min=replicas, max=replicas)
        return Deployment(
            endpoint=endpoint_name(card.name), recipes=(card.name,), replicas=counts, host=host, ports=ports
        )
    asked = load_deployment(file)
    if card.name not in asked.recipes:
        raise RecipeError(
            f"{file}: recipes: {card.name} is none of them ({', '.join(asked.recipes)})",
            hint=f"recipes: [{card.name}]   # in {file}",
        )
    return asked


def endpoint_name(model: str) -> str:
    """A model's name as an endpoint's, which has fewer letters."""
    name = re.sub(r"[^a-z0-9-]+", "-", model.lower()).strip("-")[:63]
    return name if name[:1].isalpha() else f"m-{name}"[:63]


def replicate(
    screen: Screen,
    card: Card,
    record: Any,
    asked: Endpoint,
    *,
    keys: Path | None,
    insecure_open: bool,
    allow_unverified: bool,
    **_others: Any,
) -> int:
    """The endpoint until it is told to stop. -> the exit code."""
    import os

    from toolchain.admission import Asked, admit
    from toolchain.registry.deployment import Deployment, log_file

    deploying.require_libraries()
    admission = admit(card.repository, Asked(card.spoken, card.recipe, None, allow_unverified, True))
    for note in admission.notes:
        screen.note(f"note: {note}")
    if admission.unverified:
        screen.note(f"NOT VERIFIED: {admission.unverified}")
    work = card.work or card.home / "work"
    repositories = [
        card.repository if recipe == card.name else deploying.built(screen, recipe, work) for recipe in asked.recipes
    ]

    def on_open(listen: Listen) -> None:
        urls, log = listen.urls, str(log_file(card))
        kserve = (urls["OpenAI"].removesuffix("/v1"),)
        record(Deployment(os.getpid(), True, urls.get("/predict", ""), urls["OpenAI"], kserve, log))

    deploying.run(
        screen,
        asked,
        repositories,
        card.home,
        keys=keys,
        insecure_open=insecure_open,
        allow_unverified=allow_unverified,
        on_open=on_open,
    )
    return 0
