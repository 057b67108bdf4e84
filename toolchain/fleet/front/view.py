"""The endpoint as a reader sees it: what its nodes say on the board, with what the gateway has counted itself.

One way for one machine and for many: the gateway never asks a replica's Triton. The figures of engines are the nodes'
word; tokens a second are the gateway's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from toolchain.device import find_device
from toolchain.errors import EndpointError
from toolchain.fleet.board import Board
from toolchain.fleet.control.pricing import priced
from toolchain.fleet.control.seats import Machine, Offers, offers_of
from toolchain.fleet.front.meter import NODES, READY, Meter, place_of
from toolchain.fleet.worker.bulletin import MOST_CHARACTERS
from toolchain.gateway.engines import Relayed
from toolchain.gateway.fleet_status import FleetEvent, FleetNode, FleetReplica, FleetStatus, LedgerHead
from toolchain.gateway.kv import Blocks, Drafts
from toolchain.ledger.record import plain

SPEC = "spec"
EVENTS = "events.jsonl"
_EVENTS = 40
_FRESH_S = 0.4
"""However many ask, the board is read once in that time."""
_TAIL_BYTES = 32 * 1024
_OVER = frozenset({"failed", "ended"})
_OF_ALL = {
    "replicas_ready": "Replicas that take requests.",
    "replicas_wanted": "Replicas that are wanted.",
    "nodes": "Nodes that say that they are there.",
    "gpus": "GPUs of the nodes that run a replica.",
    "cost_usd_per_hour": "US dollars, of the nodes that run a replica and have a price.",
    "unpriced_nodes": "Nodes that run a replica and have no price.",
}
_GAUGES = {
    "ready": "Whether it takes requests.",
    "running": "Requests that it works on.",
    "tokens_per_second": "Tokens that came from it, over the last ten seconds.",
    "kv_blocks_used": "Blocks of its KV cache in use.",
    "kv_blocks": "Blocks of its KV cache.",
}
_COUNTERS = {
    "requests_total": "Requests that it took.",
    "tokens_total": "Tokens that it generated.",
    "restarts_total": "Restarts of its worker.",
    "drafted_tokens_total": "Tokens that were drafted.",
    "accepted_tokens_total": "Those that the model kept.",
}


class View:
    """Reads the board when it is asked to."""

    def __init__(self, board: Board, meter: Meter, events: Path | None = None) -> None:
        """``events``: the file to which the head appends what happens."""
        self._board, self._meter, self._events = board, meter, events
        self._read_s, self._reached = float("-inf"), False
        self._nodes: dict[str, dict[str, Any]] = {}
        self._spec: dict[str, Any] = {}

    async def status(self) -> FleetStatus:
        """As it is just now; as it was where the board cannot be reached."""
        return await asyncio.to_thread(self._status)

    async def metrics(self) -> list[Relayed]:
        """What there is of nodes and replicas, each one's own figures, and its engine's metrics, for Prometheus."""
        status = await self.status()
        rates, endpoint = self._meter.rates(), self._spec.get("endpoint")
        return [
            Relayed({"endpoint": endpoint} if endpoint else {}, _text_of_all(status)),
            *self._each(rates),
        ]

    def _each(self, rates: Mapping[str, float]) -> list[Relayed]:
        return [
            Relayed({"node": name, "replica": str(one["name"])}, _text(one, rates))
            for name, said in self._nodes.items()
            for one in said["replicas"]
        ]

    def _read(self) -> None:
        if time.monotonic() - self._read_s < _FRESH_S:
            return
        try:
            self._spec = self._board.read(SPEC).get(SPEC, {})
            found = priced(self._board.read(NODES), self._spec.get("prices", {}))
            self._nodes = {key.removeprefix(NODES): said for key, said in found.items() if _makes_sense(key, said)}
            self._reached = True
        except EndpointError:
            self._reached = False
        self._read_s = time.monotonic()

    def _status(self) -> FleetStatus:
        self._read()
        spec, rates, head = self._spec, self._meter.rates(), self._meter.head
        offers = _offers(spec)
        nodes = [_node(name, said, rates, offers) for name, said in self._nodes.items()]
        used = [node for node in nodes if any(one.state not in _OVER for one in node.replicas)]
        cost = sum((Decimal(node.price_per_hour or 0) for node in used), Decimal(0))
        budget = spec.get("max_price_per_hour")
        return FleetStatus(
            reached=self._reached,
            nodes=nodes,
            gpus=sum(node.gpus for node in used),
            ready=sum(one.state == READY for node in nodes for one in node.replicas),
            min=spec.get("min"),
            max=spec.get("max"),
            desired=spec.get("desired"),
            version=spec.get("current"),
            next_version=spec.get("next"),
            tokens_per_s=round(sum(rates.values()), 1),
            cost_per_hour=plain(cost),
            unpriced=sum(node.price_per_hour is None for node in used),
            max_price_per_hour=None if budget is None else plain(Decimal(str(budget))),
            events=list(_newest(self._events)) if self._events else [],
            ledger=LedgerHead(number=head.number, hash=head.hash) if head else None,
        )


def _makes_sense(name: str, said: Mapping[str, Any]) -> bool:
    """Whether it can be shown: a node may put there whatever it likes."""
    try:
        place_of(name, said)
        _node(name, said, {})
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        return False
    return True


def _offers(spec: Mapping[str, Any]) -> Offers:
    """Of the version that is wanted."""
    return next((offers_of(one) for one in spec.get("versions", ()) if one["version"] == spec["current"]), ())


def _node(name: str, said: Mapping[str, Any], rates: Mapping[str, float], offers: Offers = ()) -> FleetNode:
    price, known = said.get("price_per_hour"), find_device(said["device"])
    return FleetNode(
        name=name,
        provider=said["provider"],
        device=said["device"],
        device_title=known.title if known else said["device"],
        gpus=said["gpus"],
        room=Machine.read(said).room(offers),
        state=said["state"],
        price_per_hour=None if price is None else plain(Decimal(str(price))),
        replicas=[_replica(one, rates) for one in said["replicas"]],
    )


def _replica(said: Mapping[str, Any], rates: Mapping[str, float]) -> FleetReplica:
    figures = said.get("figures") or {}
    blocks, drafts = figures.get("kv_blocks"), figures.get("drafts")
    return FleetReplica(
        name=said["name"],
        version=said.get("version"),
        state=said["state"],
        why=said.get("why", ""),
        restarts=said.get("restarts", 0),
        running=figures.get("running", 0),
        tokens_per_s=round(rates.get(said["name"], 0.0), 1),
        kv_blocks=Blocks(**blocks) if blocks else None,
        drafts=Drafts(**drafts) if drafts else None,
    )


def _newest(file: Path) -> Iterator[FleetEvent]:
    """The last events of the file, the newest first; a line that a kill has torn is left out."""
    try:
        with file.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - _TAIL_BYTES))
            lines = stream.read().splitlines()
    except FileNotFoundError:
        return
    for line in lines[: -_EVENTS - 1 : -1]:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            told = json.loads(line)
            names = {name: str(told.get(name) or "") for name in ("node", "replica", "text")}
            yield FleetEvent(time=float(told["time"]), kind=str(told["kind"]), **names)


def _text(said: Mapping[str, Any], rates: Mapping[str, float]) -> str:
    """One replica's figures in Prometheus' format, then the lines that its engine's server gave."""
    figures = said.get("figures") or {}
    blocks, drafts = figures.get("kv_blocks") or {}, figures.get("drafts") or {}
    values = {
        "ready": int(said["state"] == READY),
        "running": figures.get("running"),
        "tokens_per_second": round(rates.get(said["name"], 0.0), 1),
        "kv_blocks_used": blocks.get("used"),
        "kv_blocks": blocks.get("total"),
        "requests_total": figures.get("requests"),
        "tokens_total": figures.get("tokens"),
        "restarts_total": said.get("restarts", 0),
        "drafted_tokens_total": drafts.get("drafted"),
        "accepted_tokens_total": drafts.get("accepted"),
    }
    own = _families("scalellm_replica", "gauge", _GAUGES, values)
    own += _families("scalellm_replica", "counter", _COUNTERS, values)
    engine = str(figures.get("metrics", ""))
    return own + engine if len(engine) <= MOST_CHARACTERS else own


def _text_of_all(status: FleetStatus) -> str:
    """The endpoint's figures in Prometheus' format."""
    values = {
        "replicas_ready": status.ready,
        "replicas_wanted": status.desired,
        "nodes": len(status.nodes),
        "gpus": status.gpus,
        "cost_usd_per_hour": float(status.cost_per_hour),
        "unpriced_nodes": status.unpriced,
    }
    return _families("scalellm_fleet", "gauge", _OF_ALL, values)


def _families(prefix: str, kind: str, helps: Mapping[str, str], values: Mapping[str, Any]) -> str:
    """One sample for each value that is a number."""
    lines = []
    for name, help_text in helps.items():
        if isinstance(values[name], (int, float)):
            full = f"{prefix}_{name}"
            lines += [f"# HELP {full} {help_text}", f"# TYPE {full} {kind}", f"{full} {values[name]}"]
    return "\n".join(lines) + "\n"
