"""DEPLOYMENT.yaml: one endpoint, what runs behind it, and how it ends. Strict, as a recipe is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from toolchain.errors import RecipeError
from toolchain.problems import MarkedYaml, Port, Section, Text, read_text

EndpointName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,62}$")]
"""It is a part of Dynamo's addresses, in which dots separate."""
Seconds = Annotated[float, Field(ge=0, le=86400)]


class Replicas(Section):
    """How many replicas there are to be. This release starts ``min`` of them and keeps that number."""

    min: Annotated[int, Field(ge=1, le=64)] = 1
    max: Annotated[int, Field(ge=1, le=64)] | None = None


class Ports(Section):
    """Where clients ask."""

    openai: Port = 8080
    """KServe over HTTP too, under ``/v2``."""
    predict: Port | Literal[False] = 2345
    """FEDML's ``/predict``; false for none."""
    grpc: Port | Literal[False] = 8001
    """KServe over gRPC; false for none."""


class Deployment(Section):
    """A checked DEPLOYMENT.yaml."""

    endpoint: EndpointName
    """What clients call the model, too."""
    recipes: Annotated[tuple[Text, ...], Field(min_length=1, max_length=64, strict=False)]
    """Names or files; replicas take them in turn. All must be of one model."""
    replicas: Replicas = Replicas()
    drain_seconds: Seconds = 30.0
    """How long requests at work may take after a replica was told to end."""
    max_queue: Annotated[int, Field(ge=0, le=100_000)] = 64
    """Requests that wait for a place; more get 429."""
    host: Text = "127.0.0.1"
    ports: Ports = Ports()
    conformance: bool = False
    """Ask each replica the conformance suite before it takes requests."""
    max_price_per_hour: Annotated[float, Field(gt=0)] | None = None
    """US dollars, of all replicas; for releases that rent machines."""

    @property
    def count(self) -> int:
        """Replicas to start."""
        return self.replicas.min

    @property
    def notes(self) -> Iterator[str]:
        """What the file asks for and this release does not do."""
        if self.replicas.max is not None and self.replicas.max != self.replicas.min:
            yield f"replicas.max: this release does not scale; it keeps {self.replicas.min}"
        if self.max_price_per_hour is not None:
            yield "max_price_per_hour: this release rents no machines"


def load_deployment(path: Path) -> Deployment:
    """Raises RecipeError with every problem of the file at once, each with its line."""
    tree = MarkedYaml(str(path), noun="deployment", needs="endpoint and recipes", example="endpoint: my-llama")
    data = tree.read(read_text(path, "deployment"))
    found = None
    if data is not None:
        found = tree.validate(data, Deployment)
        for where, message in _contradictions(data):
            tree.complain(where, message)
    if tree.problems or found is None:
        raise tree.error("Its keys, with an example: scalellm deploy --help")
    return found


def _contradictions(data: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    replicas, ports = _section(data, "replicas"), _section(data, "ports")
    least, most = replicas.get("min", 1), replicas.get("max")
    if isinstance(least, int) and isinstance(most, int) and most < least:
        yield ("replicas", "max"), f"{most} is less than min, {least}"
    if "openai" in ports and ports["openai"] == ports.get("predict", 2345):
        yield ("ports", "predict"), "the same port as openai"
    if (grpc := ports.get("grpc", 8001)) in (ports.get("openai", 8080), ports.get("predict", 2345)) and grpc:
        yield ("ports", "grpc"), "the same port as openai or predict"


def _section(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = data.get(key)
    return found if isinstance(found, dict) else {}


def must_be_local(local: bool) -> None:
    """Raises RecipeError where other machines are asked for."""
    if not local:
        raise RecipeError(
            "this release deploys to this machine alone: renting machines, `deploy join`, scaling and rolling updates "
            "are not in it",
            hint="scalellm deploy DEPLOYMENT.yaml --local",
        )
