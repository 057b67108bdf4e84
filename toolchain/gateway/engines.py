"""What a gateway needs of the engines behind it, whichever way leads there: ``pool.Pool`` asks Tritons over HTTP,
``fleet.front.front.Fleet`` asks the replicas of an endpoint over NVIDIA Dynamo. Events are those of
``tensorrt_llm_bls``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol, Self

from toolchain.gateway.fleet_status import FleetStatus
from toolchain.gateway.settings import Model
from toolchain.gateway.triton import Triton


@dataclass(frozen=True)
class Relayed:
    """Metrics of somebody else that ``/metrics`` passes on."""

    labels: Mapping[str, str]
    """Whose they are; each sample gets them."""
    text: str
    """In Prometheus' format."""


class AnswerFlow(Protocol):
    """One answer that has begun."""

    @property
    def outputs(self) -> frozenset[str]:
        """Which outputs the model has: with ``finish_reason`` an answer without one is cut."""

    def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        """Its events. Raises UpstreamError when it is cut, ApiError when the model fails at it."""

    def failed(self, error: Exception) -> None:
        """It was found to be cut: whoever gave it may have to be looked at."""

    def close(self) -> None:
        """Cancels what is still to come; does nothing the second time."""


class Engines(Protocol):
    """Use as ``async with``."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *_: object) -> None: ...

    @property
    def ready(self) -> bool:
        """Whether one of them generates."""

    @property
    def room(self) -> int:
        """How many requests they take at once."""

    @property
    def model(self) -> Model | None:
        """What is served just now, where that changes while the gateway runs; else None."""

    @property
    def queue(self) -> int | None:
        """How many more may wait, where that changes while the gateway runs; else None."""

    @property
    def tritons(self) -> Sequence[Triton]:
        """Those that it asks itself; none where an endpoint's workers do."""

    @property
    def states(self) -> dict[str, str]:
        """Each by its address -> why it is down; empty for one that is up."""

    def queued(self, asked: Sequence[Mapping[str, Any]]) -> AbstractAsyncContextManager[None]:
        """Is told of the inputs of requests for as long as they wait for a place."""

    async def start(self, inputs: Mapping[str, Any]) -> AnswerFlow:
        """An answer whose first token is there. Raises ApiError."""

    async def metrics(self) -> Sequence[Relayed]:
        """What ``/metrics`` passes on."""

    async def fleet(self) -> FleetStatus | None:
        """The replicas of an endpoint over several; None where it asks Tritons itself."""
