"""etcd and NATS for one endpoint: started with TLS, kept running, ended with the endpoint. Programs of the system.

Every connection needs a certificate of the endpoint's own authority, and a user. Who the users are is ``network``'s
concern.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from toolchain import runner
from toolchain.errors import EndpointError, ToolError
from toolchain.fleet.trust import Identity, write_private
from toolchain.progress import Progress

_PACKAGES = {"etcd": "etcd-server", "nats-server": "nats-server"}
"""Debian's packages of the programs."""
_PLACES = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"
_START_S = 30.0
_POLL_S = 0.1
_STOP_S = 10.0
_BACKOFF_S = 1.0
NATS_PID = "nats.pid"
_NATS_USERS = "nats-users.conf"
_MOST_MESSAGE_BYTES = 8 * 2**20
"""A request with a prompt of 131 072 tokens, written out, takes about one."""


def find(program: str) -> str:
    """The program's path. Raises ToolError with the line that installs it."""
    found = shutil.which(program, path=f"{os.environ.get('PATH', '')}:{_PLACES}")
    if found is None:
        package = _PACKAGES[program]
        raise ToolError(
            f"an endpoint over many hosts needs {program}, which is not installed",
            hint=f"apt-get install {' '.join(_PACKAGES.values())}\n"
            f"systemctl disable --now {package.removesuffix('-server')}   # the endpoint starts its own",
        )
    return found


class Kept:
    """A server that is started again whenever it ends."""

    def __init__(self, argv: Sequence[str], *, folder: Path, listens: tuple[str, int], progress: Progress) -> None:
        self.name = Path(argv[0]).name
        self._argv, self._folder, self._progress = argv, folder, progress
        self._listens = listens
        self._process: runner.Process | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"keep {self.name}", daemon=True)

    @property
    def pid(self) -> int:
        """0 while it does not run."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else 0

    @property
    def log(self) -> Path:
        return self._folder / f"{self.name}.log"

    def start(self) -> None:
        """Until it takes connections. Raises ToolError, EndpointError."""
        self._process = self._begin()
        until = time.monotonic() + _START_S
        while not self._answers():
            code = self._process.poll()
            if code is not None or time.monotonic() > until:
                self._process.kill()
                why = f"ended with code {code}" if code is not None else f"took no connection within {_START_S:g} s"
                raise EndpointError(f"{self.name} {why}\n{runner.tail(self.log, 5)}", hint=f"its log: {self.log}")
            time.sleep(_POLL_S)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._process is not None:
            self._process.terminate(_STOP_S)

    def _begin(self) -> runner.Process:
        return runner.start(self._argv, log=self.log, cwd=self._folder)

    def _keep(self) -> None:
        while not self._stopping.wait(_POLL_S):
            if self._process is None or self._process.poll() is None:
                continue
            self._progress.note(f"{self.name} ended; it is started again")
            try:
                self._process = self._begin()
            except ToolError as error:
                self._progress.note(error.message)
            self._stopping.wait(_BACKOFF_S)

    def _answers(self) -> bool:
        """Whether it takes a connection. NATS says a line before TLS begins, so that a plain connection is asked."""
        try:
            with socket.create_connection(self._listens, timeout=1):
                return True
        except OSError:
            return False


def etcd(folder: Path, listens: tuple[str, int], identity: Identity, progress: Progress) -> Kept:
    """One etcd with its data in ``folder``. Its door for other etcds is a socket in that folder."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    url = f"https://{listens[0]}:{listens[1]}"
    argv = [
        find("etcd"),
        *("--name", "head", "--data-dir", "data"),
        *("--listen-client-urls", url, "--advertise-client-urls", url),
        *("--listen-peer-urls", "unix://peer:0", "--initial-advertise-peer-urls", "unix://peer:0"),
        *("--initial-cluster", "head=unix://peer:0"),
        *("--cert-file", str(identity.certificate), "--key-file", str(identity.key)),
        *("--client-cert-auth", "--trusted-ca-file", str(identity.authority)),
        *("--bcrypt-cost", "4"),  # its passwords are 256 random bits
        *("--auto-compaction-mode", "periodic", "--auto-compaction-retention", "5m"),
        *("--logger", "zap", "--log-level", "warn"),
    ]
    return Kept(argv, folder=folder, listens=listens, progress=progress)


def nats(folder: Path, listens: tuple[str, int], identity: Identity, progress: Progress) -> Kept:
    """One NATS server; its users stand in a file that ``write_nats_users`` writes, before it is started too."""
    settings = {
        "host": listens[0],
        "port": listens[1],
        "server_name": "head",
        "pid_file": str(folder / NATS_PID),
        "max_payload": _MOST_MESSAGE_BYTES,
        "ping_interval": "5s",
        "ping_max": 2,
        "tls": {
            "cert_file": str(identity.certificate),
            "key_file": str(identity.key),
            "ca_file": str(identity.authority),
            "verify": True,
            "timeout": 5,
        },
    }
    text = "\n".join(f"{name}: {json.dumps(value)}" for name, value in settings.items())
    write_private(folder / "nats.conf", f"{text}\ninclude {_NATS_USERS}\n".encode())
    argv = [find("nats-server"), "--config", str(folder / "nats.conf")]
    return Kept(argv, folder=folder, listens=listens, progress=progress)


def write_nats_users(folder: Path, users: Iterable[Mapping[str, Any]]) -> None:
    """Who may do what: user, password, permissions (https://docs.nats.io/running-a-nats-service/configuration/
    securing_nats/authorization, read 2026-11-22). A running server reads it again on SIGHUP, and ends the connections
    of who is no longer in it. (It could take the user from the certificate, but then a reload ends every connection:
    measured with 2.9.10.)
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    text = json.dumps({"users": [dict(one) for one in users]})
    write_private(folder / _NATS_USERS, f"authorization: {text}\n".encode())
