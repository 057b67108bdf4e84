"""Dynamo's runtime: where it finds its peers, what it binds, how long it waits."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import ToolError

NAMESPACE = "scalellm"
MIGRATIONS = 3
"""How often one request may be continued on another worker."""
STREAM_TIMEOUT_S = 2
"""A worker that says nothing for so long has lost its requests; workers say at least every ``HEARTBEAT_S`` that they
live. Whole seconds, as Dynamo takes them.
"""
HEARTBEAT_S = 0.5
_LOG = "error"
"""Dynamo tells each request on standard error all the same: who has a terminal there sends it elsewhere."""


@dataclass(frozen=True)
class Plane:
    """One endpoint's discovery: a folder that its processes on this machine share."""

    folder: Path
    endpoint: str

    @property
    def path(self) -> str:
        """The address of its workers, as Dynamo writes it."""
        return f"{NAMESPACE}.{self.endpoint}.generate"

    def environment(self) -> dict[str, str]:
        """What Dynamo reads when a runtime begins. Everything is bound to this machine."""
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
        }

    def runtime(self) -> Any:
        """A ``DistributedRuntime`` on the running event loop; the environment of this process is set for it."""
        os.environ.update(self.environment())  # read when Dynamo is imported
        require()
        from dynamo.runtime import DistributedRuntime

        return DistributedRuntime(asyncio.get_running_loop(), "file", "tcp")


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
