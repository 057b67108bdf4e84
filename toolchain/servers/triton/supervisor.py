"""Keeps one Triton server serving: starts it, proves that it generates, replaces it when it stops doing so, ends it.

The server runs under a guard in its own process group (see ``runner``). Whatever ends this process or the server, the
whole group is killed and waited for, and its shared memory is removed: a Triton that dies leaves busy Python workers
behind for ever, and one whose worker died keeps its clients hanging while it calls itself ready.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from toolchain import runner
from toolchain.errors import EndpointError, ScalellmError
from toolchain.progress import Progress, Silent
from toolchain.servers.triton import causes, probe
from toolchain.servers.triton.command import DRAFT_MODEL, ENGINE_MODEL, Ports, Settings
from toolchain.servers.triton.health import Health, Policy
from toolchain.servers.triton.locate import Server
from toolchain.servers.triton.ports import check_ports

DEFAULT_MODEL = "tensorrt_llm_bls"
_POLL_S = 0.1
_KILL_MARGIN_S = 2.0
"""How much longer than its own exit timeout a server may take to end."""
_KEPT_LOGS = 3
_SAMPLE_BODY = '{"text_input": "The capital of France is", "max_tokens": 32, "stream": true}'


@dataclass(frozen=True)
class ServingInfo:
    """Where a server that has generated its first token can be reached."""

    http_url: str
    grpc_url: str
    """``host:port``, as gRPC clients want it."""
    metrics_url: str
    model: str
    server: str
    """Such as ``"Triton 2.51.0 (bundled)"``."""
    pid: int
    log: Path
    start_s: float
    """From the launch to the first generated token."""
    first_token_s: float
    """What that first token took, one-time work such as compiling kernels included."""
    sample: str
    """A curl command that shows the server at work."""
    service: str = ""
    """Such as ``"2 of 3"``; empty where there is only one."""
    unverified: str = ""
    """Why its answers are not to be trusted; empty where nothing speaks against them."""


class Supervisor:
    """One server and its replacements. ``start``, then ``watch`` (blocks) until ``ask_to_stop``, then ``stop``.

    As a context manager it starts on entry, and on exit stops (drains) or, after an exception, kills.
    """

    def __init__(
        self,
        server: Server,
        repository: Path,
        ports: Ports,
        *,
        log: Path,
        host: str = "127.0.0.1",
        model: str = DEFAULT_MODEL,
        exit_timeout_s: int = 30,
        start_timeout_s: float = 600.0,
        policy: Policy | None = None,
        progress: Progress | None = None,
        ranks: int = 1,
        service: str = "",
    ) -> None:
        self._server = server
        self._settings = Settings(
            repository=repository.resolve(),
            ports=ports,
            host=host,
            exit_timeout_s=exit_timeout_s,
            name=f"scalellm-{os.getpid()}-{secrets.token_hex(4)}",
            status_file=status_file_of(log, ports.http),
            ranks=ranks,
            engines=tuple(model for model in (ENGINE_MODEL, DRAFT_MODEL) if (repository / model).is_dir()),
        )
        self.service = service
        self._log = log
        self._model = model
        self._start_timeout_s = start_timeout_s
        self._policy = policy or Policy()
        self._progress = progress or Silent()
        self._address = (_reachable(host), ports.http)
        self._process: runner.Process | None = None
        self._stopping = threading.Event()
        self._restarts: deque[float] = deque()

    @property
    def pid(self) -> int:
        """The process id, which is also the group id, of the present server; 0 without one."""
        return self._process.pid if self._process else 0

    def start(self) -> ServingInfo:
        """Starts the server and waits for its first token. What goes wrong is an ``EndpointError`` with its cause.

        A Triton that ends itself over a lock of its Python backend, as it does by chance, gets a second try.
        """
        check_ports(self._settings.host, self._settings.ports)
        try:
            return self._launch()
        except EndpointError:
            if self._stopping.is_set() or not causes.lost_a_lock(self._log):
                raise
        self._progress.note(
            "Triton lost a lock of its own while it loaded (triton-inference-server issue 5949): once more"
        )
        return self._launch()

    def watch(self) -> None:
        """Returns after ``ask_to_stop``; until then replaces a server that died or no longer generates.

        More than ``policy.max_restarts`` replacements in ``policy.restart_window_s`` are an ``EndpointError``.
        """
        health = self._health()
        while not self._stopping.wait(self._policy.tick_s):
            reason = self._death() or health.trouble()
            if reason and not self._stopping.is_set():
                self._replace(reason)
                health = self._health()

    def ask_to_stop(self) -> None:
        """Makes ``watch`` return; safe in a signal handler and from any thread."""
        self._stopping.set()

    def stop(self) -> None:
        """Drains: no new requests, those in flight finish within the exit timeout; then everything is killed."""
        self._stopping.set()
        if self._process:
            self._process.terminate(self._settings.exit_timeout_s + _KILL_MARGIN_S)

    def hurry(self) -> None:
        """Ends a drain that goes on in another call; safe in a signal handler."""
        if self._process:
            self._process.hurry()

    def kill(self) -> None:
        """Ends everything at once."""
        self._stopping.set()
        if self._process:
            self._process.kill()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.stop()
        else:
            self.kill()

    def _launch(self) -> ServingInfo:
        command = self._server.command(self._settings)
        _rotate(self._log)
        if self._settings.status_file:
            self._settings.status_file.unlink(missing_ok=True)
        begun = time.monotonic()
        self._process = runner.start(
            command.argv,
            log=self._log,
            cwd=command.cwd,
            env=command.env,
            delete=command.delete,
            afterwards=command.afterwards,
        )
        try:
            first = self._wait_until_ready(self._process, begun + self._start_timeout_s)
        except BaseException:
            self._process.kill()
            raise
        return self._info(self._process.pid, time.monotonic() - begun, first.seconds)

    def _wait_until_ready(self, process: runner.Process, deadline: float) -> probe.Verdict:
        """The first generated token, or an ``EndpointError`` that says why there is none."""
        while not self._stopping.is_set():
            if process.poll() is not None or causes.failed_model(self._log):
                raise self._failure("Triton did not start", process)
            if time.monotonic() > deadline:
                raise self._late(process)
            if probe.is_ready(self._address, timeout_s=_KILL_MARGIN_S):
                verdict = self._one_token(max(1.0, deadline - time.monotonic()))
                if verdict and verdict.alive:
                    return verdict
                if verdict and verdict.state == "failed":
                    raise self._failure(f"{self._model} is loaded but does not generate: {verdict.detail}", process)
            self._stopping.wait(_POLL_S)
        raise EndpointError("stopped before it was ready")

    def _one_token(self, deadline_s: float) -> probe.Verdict | None:
        """Probes in a thread, so that a request to stop or the server's death is noticed meanwhile (then None).

        The thread of an abandoned probe ends when the server answers or dies, which both cases bring about.
        """
        pool = ThreadPoolExecutor(1)
        try:
            future = pool.submit(probe.one_token, self._address, self._model, deadline_s)
            while not self._stopping.is_set() and not self._death():
                with contextlib.suppress(FutureTimeout):
                    return future.result(_POLL_S)
            return None
        finally:
            pool.shutdown(wait=False)

    def _death(self) -> str | None:
        code = self._process.poll() if self._process else None
        if code is None:
            return None
        return "tritonserver " + (f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}")

    def _health(self) -> Health:
        return Health(self._policy, self.pid, self._one_token)

    def _replace(self, reason: str) -> None:
        """Kills what is left and launches anew until that works, the limit is reached or we must stop."""
        while not self._stopping.is_set():
            if self._process:
                self._process.kill()
            pause_s = self._pause_before_restart(reason)
            self._progress.note(f"triton{f' {self.service}' if self.service else ''}: replacing the server ({reason})")
            if self._stopping.wait(pause_s):
                return
            try:
                self.start()
                return
            except ScalellmError as error:
                reason = error.message

    def _pause_before_restart(self, reason: str) -> float:
        now = time.monotonic()
        while self._restarts and self._restarts[0] < now - self._policy.restart_window_s:
            self._restarts.popleft()
        count = len(self._restarts)
        if count >= self._policy.max_restarts:
            window = f"{self._policy.restart_window_s:g} s"
            raise EndpointError(
                f"Triton failed {count + 1} times in {window}; the last time: {reason}", hint=f"less {self._log}"
            )
        self._restarts.append(now)
        return self._policy.backoff_s * 2.0**count

    def _failure(self, what: str, process: runner.Process) -> EndpointError:
        """Kills the server and turns its log into an error."""
        process.kill()
        cause = causes.diagnose(self._log)
        if cause:
            return EndpointError(f"{what}: {cause.message}", hint=_lines(cause.hint, f"less {self._log}"))
        return EndpointError(f"{what}; its last words:\n{runner.tail(self._log, 15)}", hint=f"less {self._log}")

    def _late(self, process: runner.Process) -> EndpointError:
        loading = causes.still_loading(self._log)
        what = f"Triton was not ready after {self._start_timeout_s:g} s"
        if loading:
            what += f" (still loading: {', '.join(loading)})"
        return self._failure(what, process)

    def _info(self, pid: int, start_s: float, first_token_s: float) -> ServingInfo:
        host, ports = _reachable(self._settings.host), self._settings.ports
        shown = f"[{host}]" if ":" in host else host
        http_url = f"http://{shown}:{ports.http}"
        return ServingInfo(
            http_url=http_url,
            grpc_url=f"{shown}:{ports.grpc}",
            metrics_url=f"http://{shown}:{ports.metrics}/metrics",
            model=self._model,
            server=f"Triton {self._server.version} ({self._server.kind})",
            pid=pid,
            log=self._log,
            start_s=start_s,
            first_token_s=first_token_s,
            service=self.service,
            sample=f"curl -N {http_url}/v2/models/{self._model}/generate_stream -d '{_SAMPLE_BODY}'",
        )


def _reachable(host: str) -> str:
    """The address to connect to for an address to listen on: "every interface" is reached over loopback."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def status_file_of(log: Path, http_port: int) -> Path:
    """Where the engine of the server on that port writes what it does: beside the server's log."""
    return log.resolve().with_name(f"engine-{http_port}.json")


def _rotate(log: Path) -> None:
    """Moves LOG to LOG.1 and so on, so that each start has its own file and the last three are kept."""
    log.parent.mkdir(parents=True, exist_ok=True)
    names = [log, *(log.with_name(f"{log.name}.{number}") for number in range(1, _KEPT_LOGS))]
    for older, newer in zip(reversed(names[1:]), reversed(names[:-1]), strict=True):
        if newer.exists():
            newer.replace(older)


def _lines(*parts: str) -> str:
    return "\n".join(part for part in parts if part)
