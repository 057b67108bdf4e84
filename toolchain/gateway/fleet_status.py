"""What ``GET /status`` says of an endpoint over several replicas: its nodes, their replicas, what it costs, what
happened. Shapes alone; ``fleet.front.view`` fills them in.
"""

from __future__ import annotations

from pydantic import BaseModel

from toolchain.gateway.kv import Blocks, Drafts


class FleetReplica(BaseModel):
    """One replica, as its node says."""

    name: str
    version: int | None
    state: str
    """starting, ready, down, draining, failed or ended."""
    why: str
    restarts: int
    """Of its worker."""
    running: int
    """Requests that it works on."""
    tokens_per_s: float
    """As this gateway counts them, over the last ten seconds."""
    kv_blocks: Blocks | None
    drafts: Drafts | None


class FleetNode(BaseModel):
    """One machine."""

    name: str
    provider: str
    device: str
    device_title: str
    """For people: ``RTX 4090``."""
    gpus: int
    room: int
    """How many replicas it can hold."""
    state: str
    """up or draining."""
    price_per_hour: str | None
    """US dollars for the whole of it; None where nobody knows."""
    replicas: list[FleetReplica]


class FleetEvent(BaseModel):
    """Something that happened."""

    time: float
    """Unix time."""
    kind: str
    node: str
    replica: str
    text: str


class LedgerHead(BaseModel):
    """The newest record of the endpoint's ledger: kept, it shows later whether anything was changed."""

    number: int
    hash: str


class FleetStatus(BaseModel):
    """An endpoint over several replicas."""

    reached: bool
    """Whether the nodes could be read just now; if not, this is how they were."""
    nodes: list[FleetNode]
    gpus: int
    """Of the nodes that run a replica."""
    ready: int
    """Replicas that take requests."""
    min: int | None
    max: int | None
    desired: int | None
    """How many are wanted just now."""
    version: int | None
    """That is wanted."""
    next_version: int | None
    """That is being rolled out."""
    tokens_per_s: float
    cost_per_hour: str
    """US dollars, of the nodes that run a replica."""
    unpriced: int
    """How many of those have no price."""
    max_price_per_hour: str | None
    events: list[FleetEvent]
    """The newest first."""
    ledger: LedgerHead | None

    @property
    def replicas(self) -> list[tuple[FleetNode, FleetReplica]]:
        """All of them, by node."""
        return [(node, replica) for node in self.nodes for replica in node.replicas]
