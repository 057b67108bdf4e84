"""What an endpoint stands on: where its state is kept, and how its front and its workers find each other.

Folders of one machine; or etcd, NATS and a door, where machines of other networks join.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from toolchain.fleet.board import Board, FolderBoard
from toolchain.fleet.deployment import Deployment
from toolchain.fleet.plane import Plane
from toolchain.progress import Progress


@contextmanager
def ground(deployment: Deployment, folder: Path, progress: Progress) -> Iterator[tuple[Board, Plane]]:
    """For the length of a ``with`` block. Raises ScalellmError."""
    network = deployment.network
    if network is None:
        yield FolderBoard(folder / "board"), Plane(folder / "discovery", deployment.endpoint)
        return
    from toolchain.fleet.hosts import door
    from toolchain.fleet.hosts.network import Addresses, Guests, serving

    guests = Guests(folder / "network", deployment.endpoint, Addresses(**network.model_dump()))
    with serving(guests, progress), door.opened(guests, progress):
        board = guests.board()
        try:
            yield board, guests.plane
        finally:
            board.close()
