"""``GET /status``: what an endpoint does just now, for its page and for people with ``curl``. No text of any request.

Numbers of the gateway come from ``recent``; how full the KV cache is, from each engine: the metrics of TensorRT-LLM's
Triton backend, or the status file that our own engines write, where they run on this machine. Of a fleet, the nodes
say it.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from pydantic import BaseModel

from toolchain import __version__
from toolchain.gateway.fleet_status import FleetStatus
from toolchain.gateway.kv import Blocks, Drafts, blocks_of, drafts_of
from toolchain.gateway.recent import Series, Window
from toolchain.gateway.settings import EngineFacts
from toolchain.gateway.triton import Triton

if TYPE_CHECKING:
    from toolchain.gateway.service import Service

_FRESH_S = 0.5
"""However many pages are open, the Tritons are asked once in that time."""
_METRICS_S = 1.0
"""A Triton that says nothing of itself within this is shown without its cache."""

_Seen = tuple[Blocks | None, Drafts | None]
"""What an engine says of itself."""


class Replica(BaseModel):
    """One Triton, or one replica of a fleet."""

    name: str
    """Host and port, or node and replica."""
    ready: bool
    why_down: str | None
    in_flight: int
    """Requests of this gateway that it works on."""
    restarts: int
    """How often it came back after it had failed, since this gateway was started."""
    kv_blocks: Blocks | None
    drafts: Drafts | None
    """None without speculative decoding, and where the engine does not say it."""


class Status(BaseModel):
    """An endpoint, now and in its last minutes."""

    ready: bool
    model: str
    version: str
    """Of scalellm."""
    uptime_s: float
    """Of this gateway."""
    running: int
    """Requests at the engines."""
    waiting: int
    """Requests that wait for a place."""
    places: int
    """How many may run at once."""
    max_queue: int
    replicas: list[Replica]
    last_minute: Window
    last_five_minutes: Window
    series: Series
    max_seq_len: int | None
    engine: EngineFacts | None
    """None where the gateway was given a Triton's address alone."""
    fleet: FleetStatus | None
    """Of an endpoint over several nodes; None where the gateway asks Tritons itself."""


class Observer:
    """Asks the Tritons for those who ask for the status."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lock = asyncio.Lock()
        self._seen: list[_Seen] = []
        self._fleet: FleetStatus | None = None
        self._seen_s = float("-inf")

    async def look(self) -> Status:
        """The present status."""
        service = self._service
        async with self._lock:
            if time.monotonic() - self._seen_s > _FRESH_S:
                self._seen = await asyncio.gather(*(_see(triton) for triton in service.pool.tritons))
                self._fleet = await service.pool.fleet()
                self._seen_s = time.monotonic()
        settings, recent, admission = service.settings, service.recent, service.admission
        pairs, fleet = zip(service.pool.tritons, self._seen, strict=True), self._fleet
        return Status(
            ready=service.pool.ready,
            model=service.model.name,
            version=__version__,
            uptime_s=round(recent.uptime_s, 1),
            running=admission.running,
            waiting=admission.waiting,
            places=settings.limits.max_running or service.pool.room,
            max_queue=service.max_queue,
            replicas=_of_fleet(fleet) if fleet else [_replica(triton, seen) for triton, seen in pairs],
            last_minute=recent.window(60),
            last_five_minutes=recent.window(300),
            series=recent.series(),
            max_seq_len=service.model.max_seq_len,
            engine=service.model.engine,
            fleet=fleet,
        )


def _of_fleet(fleet: FleetStatus) -> list[Replica]:
    return [
        Replica(
            name=f"{node.name}/{one.name}",
            ready=one.state == "ready",
            why_down=None if one.state == "ready" else one.why or one.state,
            in_flight=one.running,
            restarts=one.restarts,
            kv_blocks=one.kv_blocks if one.state == "ready" else None,
            drafts=one.drafts,
        )
        for node, one in fleet.replicas
    ]


def _replica(triton: Triton, seen: _Seen) -> Replica:
    blocks, drafts = seen if triton.up else (None, None)
    return Replica(
        name=triton.upstream.http_url.partition("://")[2],
        ready=triton.up,
        why_down=None if triton.up else triton.why_down,
        in_flight=triton.in_flight,
        restarts=triton.restarts,
        kv_blocks=blocks,
        drafts=drafts,
    )


async def _see(triton: Triton) -> _Seen:
    if not triton.up:
        return None, None
    drafts = drafts_of(triton.upstream.status_file)
    try:
        async with asyncio.timeout(_METRICS_S):
            return blocks_of(await triton.metrics(), triton.upstream.status_file), drafts
    except TimeoutError:
        return None, drafts
