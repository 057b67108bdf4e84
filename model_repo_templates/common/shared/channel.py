"""A private line between two models of one Triton server: an abstract Unix socket that only this user's processes use.

Why not Triton's calls between models (BLS): with several Python threads at work in the model, the stub of Triton 2.51
died of a segmentation fault in about one of ten runs of our tests, after which everything hung; over this line none did
in 2,400 requests under load. We did not find the cause.

Messages are tuples of plain values and numpy arrays. It knows nothing of what they mean.
"""

from __future__ import annotations

import os
import socket
import struct
from multiprocessing.connection import Connection
from pathlib import Path


def name_of(model: str) -> str:
    """The line's name for a model of this server. Both models are children of the same tritonserver; containers that
    share a network may have the same process ids, but not the same process namespace."""
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    return f"\0scalellm-{namespace}-{os.getppid()}-{model}"


def listen(name: str) -> socket.socket:
    """A listening socket; raises OSError when the name is taken."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(name)
    listener.listen()
    return listener


def accept(listener: socket.socket) -> Connection | None:
    """The next caller, or None for one of another user. Raises OSError when the listener was closed."""
    caller, _address = listener.accept()
    return _trusted(caller)


def connect(name: str) -> Connection:
    """A connection to the listener. Raises OSError when there is none, or it belongs to another user."""
    caller = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    caller.connect(name)
    connection = _trusted(caller)
    if connection is None:
        raise PermissionError("the engine's socket belongs to another user")
    return connection


def _trusted(peer: socket.socket) -> Connection | None:
    """What arrives is unpickled, so the other side must be this user."""
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _pid, user, _group = struct.unpack("3i", credentials)
    if user != os.getuid():
        peer.close()
        return None
    return Connection(peer.detach())
