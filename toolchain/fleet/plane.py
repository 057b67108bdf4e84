"""Dynamo's runtime: where it finds its peers, what it binds, how long it waits."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import ArtifactError, ToolError
from toolchain.fleet.trust import Identity, write_private

NAMESPACE = "scalellm"
MIGRATIONS = 3
"""How often one request may be continued on another worker."""
STREAM_TIMEOUT_S = 2
"""A worker that says nothing for so long has lost its requests; workers say at least every ``HEARTBEAT_S`` that they
live. Whole seconds, as Dynamo takes them.
"""
HEARTBEAT_S = 0.5
LEASE_S = 10
"""A worker whose host is lost is forgotten after it, and one that cannot reach etcd for so long ends."""
_FRONT_LEASE_S = 3600
"""Nothing depends on the front's lease but its own runtime, which ends with it; and Dynamo 1.6.1 renews it late after
etcd has started again, because its watches go first (measured: 8 s).
"""
_LOG = "error"
"""Dynamo tells each request on standard error all the same: who has a terminal there sends it elsewhere."""
_NETWORK = "network.json"
_TEXTS = ("ETCD_AUTH_CA", "ETCD_AUTH_CLIENT_CERT", "ETCD_AUTH_CLIENT_KEY")
"""Dynamo wants these files' text, not their paths."""


@dataclass(frozen=True)
class Network:
    """Discovery and requests over many hosts: the servers of the endpoint's head, and who we are to them.

    A worker dials etcd and NATS, and brings its answers to the port ``answers`` of the front; it listens nowhere.
    The variables are those that the Rust sources of ai-dynamo-runtime 1.6.1 read (lib/runtime/src, read 2026-11-22).
    """

    etcd: str
    """https://HOST:PORT"""
    nats: str
    """tls://HOST:PORT"""
    identity: Identity
    user: str
    password: str
    """For NATS; etcd takes the certificate's name for the user."""
    answers: tuple[str, int] | None = None
    """The front's: an address of this machine, under which workers reach it, and a port; None for a worker."""

    def environment(self) -> dict[str, str]:
        """What Dynamo reads. A connection that is not encrypted, or to a server of another authority, is not made."""
        mine = self.identity
        found = {
            "ETCD_ENDPOINTS": self.etcd,
            "ETCD_LEASE_TTL": str(LEASE_S if self.answers is None else _FRONT_LEASE_S),
            "ETCD_KEEPALIVE_INTERVAL_SECONDS": "5",
            "ETCD_KEEPALIVE_TIMEOUT_SECONDS": "3",
            "NATS_SERVER": self.nats,
            "NATS_TLS_CA_CERT_PATH": str(mine.authority),
            "NATS_TLS_CLIENT_CERT_PATH": str(mine.certificate),
            "NATS_TLS_CLIENT_KEY_PATH": str(mine.key),
            "DYN_NATS_REQUEST_TIMEOUT_SECS": "2",
            "DYN_EVENT_PLANE": "nats",
            "DYN_TCP_TLS_CA_CERT_PATH": str(mine.authority),
            "DYN_TCP_TLS_CLIENT_CERT_PATH": str(mine.certificate),
            "DYN_TCP_TLS_CLIENT_KEY_PATH": str(mine.key),
        }
        if self.answers is not None:
            found |= {
                "DYN_TCP_RESPONSE_STREAM_HOST": self.answers[0],
                "DYN_TCP_RESPONSE_STREAM_PORT": str(self.answers[1]),
                "DYN_TCP_TLS_CERT_PATH": str(mine.certificate),
                "DYN_TCP_TLS_KEY_PATH": str(mine.key),
                "DYN_TCP_TLS_CLIENT_CA_CERT_PATH": str(mine.authority),
            }
        return found

    def secrets(self) -> dict[str, str]:
        """Read while a runtime begins, and taken from the environment then. Raises ArtifactError."""
        files = (self.identity.authority, self.identity.certificate, self.identity.key)
        try:
            found = {name: file.read_text(encoding="ascii") for name, file in zip(_TEXTS, files, strict=True)}
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{self.identity.folder}: not a usable identity: {error}") from error
        return {**found, "NATS_AUTH_USERNAME": self.user, "NATS_AUTH_PASSWORD": self.password}

    def write(self, folder: Path) -> None:
        """Beside it in ``folder``, for the processes that are told this folder."""
        told = {**vars(self), "identity": str(self.identity.folder)}
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(folder / _NETWORK, json.dumps(told).encode())

    @classmethod
    def read(cls, folder: Path) -> Network | None:
        """None where the folder itself is the discovery of one machine. Raises ArtifactError."""
        try:
            told = json.loads((folder / _NETWORK).read_text(encoding="utf-8"))
            answers = (str(told["answers"][0]), int(told["answers"][1])) if told["answers"] else None
            texts = {name: str(told[name]) for name in ("etcd", "nats", "user", "password")}
            return cls(**texts, identity=Identity(Path(told["identity"])), answers=answers)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise ArtifactError(f"{folder / _NETWORK}: cannot be understood: {error}") from error


@dataclass(frozen=True)
class Plane:
    """One endpoint's discovery: a folder that its processes on this machine share, or a network of hosts."""

    folder: Path
    endpoint: str
    network: Network | None = None

    @classmethod
    def open(cls, folder: Path, endpoint: str) -> Plane:
        """What the folder says that it is. Raises ArtifactError."""
        return cls(folder, endpoint, Network.read(folder))

    @property
    def path(self) -> str:
        """The address of its workers, as Dynamo writes it."""
        return f"{NAMESPACE}.{self.endpoint}.generate"

    def environment(self) -> dict[str, str]:
        """What Dynamo reads when a runtime begins. What is not said to be elsewhere is bound to this machine."""
        return {
            "DYN_FILE_KV": str(self.folder),
            "DYN_LOG": os.environ.get("DYN_LOG", _LOG),
            "DYN_LOGGING_JSONL": "0",
            "DYN_TCP_RPC_HOST": "127.0.0.1",
            "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1",
            "DYN_SELF_HOST_METADATA": "0",
            "DYN_HTTP_BACKEND_STREAM_TIMEOUT_SECS": str(STREAM_TIMEOUT_S),
            "DYN_TCP_CONNECT_TIMEOUT": "2",
            "DYN_TCP_REQUEST_TIMEOUT": "2",
            **(self.network.environment() if self.network is not None else {}),
        }

    def runtime(self) -> Any:
        """A ``DistributedRuntime`` on the running event loop; the environment of this process is set for it."""
        os.environ.update(self.environment())  # read when Dynamo is imported
        require()
        from dynamo.runtime import DistributedRuntime

        loop = asyncio.get_running_loop()
        if self.network is None:
            return DistributedRuntime(loop, "file", "tcp")
        secrets = self.network.secrets()
        os.environ.update(secrets)
        try:
            return DistributedRuntime(loop, "etcd", "nats")
        finally:
            for name in secrets:  # not for the programs that this process starts
                del os.environ[name]


def require() -> None:
    """Raises ToolError where Dynamo is not installed."""
    os.environ.setdefault("DYN_LOG", _LOG)  # read at its import
    try:
        import dynamo.llm
        import dynamo.runtime  # noqa: F401
    except ImportError as error:
        raise ToolError(
            f"an endpoint over several replicas needs {error.name}, which is not installed",
            hint="pip install 'scalellm-toolchain[fleet]'",
        ) from error
