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
MOST = 64
"""Replicas of one endpoint."""
Usd = Annotated[float, Field(ge=0)]


class Replicas(Section):
    """How many replicas there are to be, and how that follows the load."""

    min: Annotated[int, Field(ge=0, le=MOST)] = 1
    """0: none at all while nobody asks."""
    max: Annotated[int, Field(ge=1, le=MOST)] | None = None
    """None: ``min``, and at least 1."""
    target_tokens_in_flight: Annotated[int, Field(ge=1, le=10_000_000)] = 4096
    """Of prompts and answers at work, for each replica: beyond it there is one more, up to ``max``."""
    idle_seconds: Annotated[float, Field(ge=1, le=86400)] = 300.0
    """After so long in which fewer would have done, there are fewer."""
    max_unavailable: Annotated[int, Field(ge=0, le=MOST)] | None = None
    """How many fewer than ``min`` may take requests while a version is replaced. None: 0, or 1 where ``max`` is
    ``min``, for then one must end before its successor can begin.
    """
    start_seconds: Annotated[float, Field(ge=1, le=86400)] = 600.0
    """How long a replica may take to come, and a request waits for one where there is none."""

    @property
    def most(self) -> int:
        """``max``, also where it was left out."""
        return max(self.min, 1) if self.max is None else self.max


class Ports(Section):
    """Where clients ask."""

    openai: Port = 8080
    """KServe over HTTP too, under ``/v2``."""
    predict: Port | Literal[False] = 2345
    """FEDML's ``/predict``; false for none."""
    grpc: Port | Literal[False] = 8001
    """KServe over gRPC; false for none."""


class Network(Section):
    """For nodes on other machines: where they reach this one. Without it the endpoint is this machine's alone."""

    host: Text
    """An address of this machine, under which the others reach it; its firewall lets the four ports in."""
    names: Annotated[tuple[Text, ...], Field(max_length=16, strict=False)] = ()
    """Further names and addresses of it."""
    door: Port = 7600
    """At which machines with a token join."""
    etcd: Port = 7601
    nats: Port = 7602
    answers: Port = 7603
    """To which workers bring their answers."""


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
    network: Network | None = None
    registry: Text | None = None
    """A folder, or an address that fsspec opens, where nodes on other machines fetch their engines by content."""
    conformance: bool = False
    """Ask each replica the conformance suite before it takes requests."""
    prices: dict[Text, Usd] = Field(default_factory=dict)
    """US dollars per GPU and hour, per machine where there is no GPU, by device or by ``provider/device``; see
    ``control.pricing``.
    """
    max_price_per_hour: Annotated[float, Field(gt=0)] | None = None
    """US dollars, of all nodes that run a replica; a node whose price is not known runs none then."""

    @property
    def scaling(self) -> dict[str, Any]:
        """What the head needs to know of it, by the board's keys."""
        replicas = self.replicas
        return {
            "min": replicas.min,
            "max": replicas.most,
            "target_tokens_in_flight": replicas.target_tokens_in_flight,
            "idle_seconds": replicas.idle_seconds,
            "max_unavailable": replicas.max_unavailable,
            "start_seconds": replicas.start_seconds,
            "max_price_per_hour": self.max_price_per_hour,
            "prices": dict(self.prices),
            "max_queue": self.max_queue,
        }

    @property
    def standing(self) -> dict[str, Any]:
        """What stays as it is for as long as the endpoint runs."""
        return self.model_dump(mode="json", include={"host", "ports", "network"})


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
    if least and replicas.get("max_unavailable") == 0 and most in (None, least):
        yield (
            ("replicas", "max_unavailable"),
            f"0 with max {least} leaves no way to replace a version: neither one more nor one fewer may run",
        )
    if "openai" in ports and ports["openai"] == ports.get("predict", 2345):
        yield ("ports", "predict"), "the same port as openai"
    if (grpc := ports.get("grpc", 8001)) in (ports.get("openai", 8080), ports.get("predict", 2345)) and grpc:
        yield ("ports", "grpc"), "the same port as openai or predict"
    inner = _section(data, "network")
    used = [inner.get(name, Network.model_fields[name].default) for name in ("door", "etcd", "nats", "answers")]
    if inner and len(set(used)) < len(used):
        yield ("network",), "door, etcd, nats and answers need four different ports"


def _section(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = data.get(key)
    return found if isinstance(found, dict) else {}


def must_have_a_place(deployment: Deployment, local: bool) -> None:
    """Raises RecipeError where nothing says on which machines its replicas are to run."""
    if not local and deployment.network is None:
        raise RecipeError(
            "where are its replicas to run? On this machine: --local. On machines that join it: name the address of "
            "this one under which they reach it. This release rents no machines itself",
            hint="scalellm deploy DEPLOYMENT.yaml --local   # or in the file:  network: {host: ADDRESS}",
        )
