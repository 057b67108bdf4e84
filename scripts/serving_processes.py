"""A service in processes of its own, as a user starts it, and what they hold and take: for other scripts.

``scalellm serve --gateway`` on an engine, on free ports of 127.0.0.1, with the engine's status file beside it. It
knows nothing of requests.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from toolchain import workspace
from toolchain.engine import Engine
from toolchain.servers.triton.ports import free_ports
from toolchain.stages.package import package

START_S = 120.0
STOP_S = 90.0


@dataclass(frozen=True)
class Service:
    """A running one."""

    process: subprocess.Popen[bytes]
    openai: str
    """``http://127.0.0.1:PORT``, without ``/v1``."""
    predict: str
    status_file: Path
    logs: Path
    """The folder of ``gateway.log`` and ``triton.log``."""

    @property
    def status(self) -> dict[str, Any]:
        """What the engine says of itself: ``active``, ``running``, ``waiting``, ``kv_usage_percent``..."""
        return dict(json.loads(self.status_file.read_text()))

    @property
    def requests(self) -> list[dict[str, Any]]:
        """The lines of the gateway's log."""
        return [json.loads(line) for line in (self.logs / "gateway.log").read_text().splitlines()]

    def roles(self) -> dict[str, psutil.Process]:
        """Its processes by what they do."""
        found = {}
        with suppress(psutil.NoSuchProcess):
            for one in [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    if role := _role(one.cmdline()):
                        found[role] = one
        return found


def cpu_seconds(names: Mapping[int, str]) -> Counter[str]:
    """CPU time so far of this process and of all that it started, by role; ``names``: process -> its role, where its
    command line does not tell. Unlike wall time it hardly depends on what else the machine does.
    """
    found: Counter[str] = Counter()
    for one in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            times = one.cpu_times()
            found[names.get(one.pid) or _role(one.cmdline()) or "guards"] += times.user + times.system
    return found


def _role(words: list[str]) -> str | None:
    """Of a command line; None for what only guards."""
    line = " ".join(words)
    if not words:
        return None
    if "triton_python_backend_stub" in words[0]:
        folder = next((word for word in words if word.endswith("/model.py")), line)
        return f"stub {Path(folder).parent.parent.name}"
    if "engine_process.py" in line:
        return "engine"
    if words[0].endswith("tritonserver"):
        return "triton"
    if "toolchain.fleet.worker" in words:
        return "worker"
    return "gateway" if "toolchain.cli" in line and "serve" in words else None


@contextmanager
def service(engine: Path) -> Iterator[Service]:
    """Packages the engine, serves it with a gateway until the block ends, and stops it as Ctrl-C would."""
    with tempfile.TemporaryDirectory(prefix="scalellm-") as folder:
        root = Path(folder)
        with workspace.draft(root / "repository", "repository", {}) as draft:
            package(Engine.open(engine), draft.path, parameters={"status_file": str(root / "status.json")})
            draft.commit(versions={}, recipe="")
        triton, front = free_ports(), free_ports()
        argv = [sys.executable, "-m", "toolchain.cli", "serve", "--repository", root / "repository", "--gateway"]
        argv += [f"--{name}-port={port}" for name, port in triton.named().items()]
        argv += [f"--gateway-port={front.http}", f"--predict-port={front.grpc}", "--work", root, "--server", "bundled"]
        with (root / "serve.log").open("wb") as log:
            process = subprocess.Popen([str(word) for word in argv], stdout=log, stderr=subprocess.STDOUT)
        url = "http://127.0.0.1"
        found = Service(process, f"{url}:{front.http}", f"{url}:{front.grpc}/predict", root / "status.json", root)
        try:
            wait_for(lambda: process.poll() is not None or code_of(f"{found.openai}/ready") == 200, START_S)
            if process.poll() is not None:
                raise SystemExit((root / "serve.log").read_text())
            yield found
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_S)
            finally:
                process.kill()


def wait_for(condition: Callable[[], object], timeout_s: float, every_s: float = 0.1) -> bool:
    """Whether it became true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every_s)
    return True


def code_of(url: str) -> int:
    """The HTTP status of a GET; 0 when nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
