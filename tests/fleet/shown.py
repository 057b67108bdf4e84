"""An endpoint that is only told of: nodes on a board, events, a ledger, and a gateway before them. No engine runs."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.conftest import unused_ports
from tests.gateway.behind_gateway import Gateway
from toolchain.fleet.board import FolderBoard
from toolchain.fleet.front.meter import Meter
from toolchain.fleet.front.view import EVENTS, View
from toolchain.gateway.engines import AnswerFlow, Relayed
from toolchain.gateway.failures import unavailable
from toolchain.gateway.fleet_status import FleetStatus
from toolchain.gateway.logs import Log
from toolchain.gateway.run import Listen, background
from toolchain.gateway.settings import Model, Settings
from toolchain.gateway.triton import Triton
from toolchain.ledger.book import FILE, Ledger

ENGINE = """\
# HELP nv_trt_llm_kv_cache_block_metrics TRT LLM KV cache block metrics
# TYPE nv_trt_llm_kv_cache_block_metrics gauge
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used",model="tensorrt_llm",version="1"} 3
"""


class Shown:
    """What an endpoint's nodes tell, by the folder in which they do."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.board = FolderBoard(folder / "board")
        self.meter = Meter(Ledger.open(folder / FILE, "parrot"))
        self.view = View(self.board, self.meter, folder / EVENTS)
        self.board.put(
            "spec", {"current": 1, "next": None, "min": 2, "max": 6, "desired": 4, "max_price_per_hour": 3.0}
        )

    def node(self, name: str, *replicas: Mapping[str, Any], **other: Any) -> None:
        """What this node says from now on."""
        facts = {"provider": "anna", "device": "rtx4090", "gpus": 1, "room": 2, "price_per_hour": 0.44, "state": "up"}
        self.board.put(f"nodes/{name}", {"node": name, "replicas": list(replicas), **facts, **other})

    def gone(self, name: str) -> None:
        self.board.remove(f"nodes/{name}")

    def happened(self, kind: str, text: str, ago_s: float = 0, node: str = "", replica: str = "") -> None:
        event = {"time": time.time() - ago_s, "kind": kind, "node": node, "replica": replica, "text": text}
        with (self._folder / EVENTS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(event) + "\n")

    def tick(self) -> None:
        self.meter.tick(self.board.read("nodes/"))

    def close(self) -> None:
        self.meter.close()


def replica(name: str, state: str = "ready", used: int = 120, **other: Any) -> dict[str, Any]:
    figures = {"running": 3, "requests": 70, "tokens": 9000, "metrics": ENGINE}
    blocks = {"kv_blocks": {"used": used, "total": 625}, "drafts": {"drafted": 10, "accepted": 7}}
    shape = {"version": 1, "why": "", "restarts": 0, "pids": {}, "ports": {}}
    return {"name": name, "state": state, **shape, "figures": {**figures, **blocks}, **other}


@dataclass
class ShownEngines:
    """Satisfies ``gateway.engines.Engines``: it shows replicas, and answers nothing."""

    view: View

    queue: int | None = None
    tritons: tuple[Triton, ...] = ()
    room: int = 24
    ready: bool = True
    model: Model | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def queued(self, _asked: Sequence[Mapping[str, Any]]) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    @property
    def states(self) -> dict[str, str]:
        return {}

    async def start(self, _inputs: Mapping[str, Any]) -> AnswerFlow:
        raise unavailable("no replica of this endpoint generates")

    async def metrics(self) -> Sequence[Relayed]:
        return await self.view.metrics()

    async def fleet(self) -> FleetStatus | None:
        return await self.view.status()


@contextmanager
def showing(shown: Shown, settings: Settings, *, ready: bool = True) -> Iterator[Gateway]:
    """A gateway in front of it."""
    port, predict_port = unused_ports(2)
    stream = io.StringIO()
    listen = Listen(port=port, predict_port=predict_port)
    engines = ShownEngines(shown.view, ready=ready)
    with background(settings, listen, log=Log(stream), engines=lambda _settings, _on_retry: engines) as bound:
        yield Gateway(bound, settings, stream)
