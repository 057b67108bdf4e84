"""A gateway on its ports: bound, announced, drained at the end. In the foreground, or in a thread beside a server."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from toolchain.errors import ArtifactError, EndpointError, RecipeError
from toolchain.gateway import keys, loop
from toolchain.gateway.app import openai_app, predict_app, shared_app
from toolchain.gateway.logs import Log, libraries_into
from toolchain.gateway.protocol import HEAD_BYTES, PLAIN, Patient
from toolchain.gateway.service import MakeEngines, Service
from toolchain.gateway.settings import Settings

if TYPE_CHECKING:
    from toolchain.gateway.kserve_grpc import Door

_DRAIN_S = 30
_KEEP_ALIVE_S = 30


@dataclass(frozen=True)
class Listen:
    """Where a gateway listens."""

    host: str = "127.0.0.1"
    port: int = 8080
    predict_port: int | None = 2345
    """None: no ``/predict``. The same as ``port``: both at one port, where ``/ready`` is FEDML's."""
    cert: Path | None = None
    """PEM, with the chain; ``key`` is its private key. Both or none."""
    key: Path | None = None
    insecure_open: bool = False
    """Allows an address beyond this machine without any API key."""
    grpc_port: int | None = None
    """KServe over gRPC, where the settings have it; None: not."""

    @property
    def urls(self) -> dict[str, str]:
        """By door: ``{"OpenAI": "http://127.0.0.1:8080/v1", "/predict": ...}``."""
        scheme = "https" if self.cert else "http"
        host = f"[{self.host}]" if ":" in self.host else self.host
        found = {"OpenAI": f"{scheme}://{host}:{self.port}/v1"}
        if self.predict_port is not None:
            found["/predict"] = f"{scheme}://{host}:{self.predict_port}/predict"
        if self.grpc_port is not None:
            found |= {"KServe": f"{scheme}://{host}:{self.port}/v2", "KServe gRPC": f"{host}:{self.grpc_port}"}
        return found


def check(settings: Settings, listen: Listen) -> None:
    """Refuses what would be unsafe or cannot work, before anything is bound. Raises ScalellmError."""
    if (listen.cert is None) != (listen.key is None):
        raise RecipeError("TLS needs both a certificate and its key", hint="--tls-cert FILE --tls-key FILE")
    if listen.cert is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(listen.cert, listen.key)
        except (OSError, ssl.SSLError) as error:
            raise ArtifactError(f"{listen.cert}: not a certificate with its key: {error}") from error
    known = keys.read(settings.keys) if settings.keys else []
    if known or listen.insecure_open or _is_loopback(listen.host):
        return
    raise RecipeError(
        f"{listen.host} can be reached from other machines, and there is no API key: anyone could use this model",
        hint=f"scalellm gateway keys add NAME --keys {settings.keys or 'FILE'}   # or, if it is meant: --insecure-open",
    )


def serve(
    settings: Settings,
    listen: Listen,
    *,
    on_ready: Callable[[Listen], None],
    log: Log | None = None,
    engines: MakeEngines | None = None,
) -> None:
    """Serves until SIGINT or SIGTERM, then lets requests in flight finish; a second signal ends that.

    ``on_ready`` is called when the ports are open, which says nothing of the Tritons. Raises ScalellmError.
    """
    check(settings, listen)

    def ready(listen: Listen) -> None:
        freeze()
        on_ready(listen)

    with _bound(listen) as sockets:
        loop.run(_Gateway(settings, listen, log or Log(), engines).run(sockets, ready, signals=True))


@contextmanager
def background(
    settings: Settings, listen: Listen, *, log: Log | None = None, engines: MakeEngines | None = None
) -> Iterator[Listen]:
    """Serves in a thread for the length of a ``with`` block. Raises ScalellmError."""
    check(settings, listen)
    gateway, ready = _Gateway(settings, listen, log or Log(), engines), threading.Event()
    failures: list[BaseException] = []

    def work(sockets: list[socket.socket]) -> None:
        try:
            loop.run(gateway.run(sockets, lambda _listen: ready.set(), signals=False))
        except BaseException as error:
            failures.append(error)
        finally:
            ready.set()

    with _bound(listen) as sockets:
        thread = threading.Thread(target=work, args=(sockets,), name="gateway")
        thread.start()
        try:
            ready.wait()
            if failures:
                raise EndpointError(f"the gateway did not start: {failures[0]}") from failures[0]
            yield listen
        finally:
            gateway.ask_to_stop()
            thread.join()


def freeze() -> None:
    """For a process that is a gateway's own: what has been imported by now lives as long as it. Python need not look
    through that again and again, which holds up all answers for some hundredths of a second each time.
    """
    gc.collect()
    gc.freeze()


def _apps(service: Service, listen: Listen) -> list[FastAPI]:
    """An application for each socket."""
    if listen.predict_port == listen.port:
        return [shared_app(service)]
    return [openai_app(service)] if listen.predict_port is None else [openai_app(service), predict_app(service)]


class _Gateway:
    """The two applications on their sockets."""

    def __init__(self, settings: Settings, listen: Listen, log: Log, engines: MakeEngines | None) -> None:
        self._settings, self._listen, self._log, self._engines = settings, listen, log, engines
        self._servers: list[_Server | Door] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self, sockets: list[socket.socket], on_ready: Callable[[Listen], None], *, signals: bool) -> None:
        self._loop = asyncio.get_running_loop()
        if signals:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._loop.add_signal_handler(number, self._stop)
        with libraries_into(self._log):
            async with Service(self._settings, self._log, self._engines) as service:
                servers = [_Server(self._config(app)) for app in _apps(service, self._listen)]
                doors = [] if self._listen.grpc_port is None else [_grpc_door(service, self._listen)]
                self._servers = [*servers, *doors]
                tasks = [asyncio.create_task(server.serve([one])) for server, one in zip(servers, sockets, strict=True)]
                tasks += [asyncio.create_task(door.serve()) for door in doors]
                while not all(server.started for server in self._servers) and not any(task.done() for task in tasks):
                    await asyncio.sleep(0.01)
                if all(server.started for server in self._servers):
                    on_ready(self._listen)
                await asyncio.gather(*tasks)

    def ask_to_stop(self) -> None:
        """From another thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself
                self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        for server in self._servers:
            server.force_exit = server.should_exit
            server.should_exit = True

    def _config(self, app: object) -> uvicorn.Config:
        listen = self._listen
        return uvicorn.Config(
            app,  # type: ignore[arg-type]
            http=Patient,
            **PLAIN,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_DRAIN_S,
            h11_max_incomplete_event_size=HEAD_BYTES,
            ssl_certfile=listen.cert,
            ssl_keyfile=listen.key,
        )


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: two servers share one process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _grpc_door(service: Service, listen: Listen) -> Door:
    """Bound. Raises EndpointError."""
    from toolchain.gateway.kserve_grpc import Door

    assert listen.grpc_port is not None
    door = Door(service)
    pair = (listen.cert, listen.key) if listen.cert is not None and listen.key is not None else None
    door.bind(listen.host, listen.grpc_port, pair)
    return door


@contextmanager
def _bound(listen: Listen) -> Iterator[list[socket.socket]]:
    """The listening sockets, closed at the end. Raises EndpointError for a port that cannot be had."""
    sockets: list[socket.socket] = []
    try:
        for port in dict.fromkeys((listen.port, listen.predict_port)):
            if port is not None:
                sockets.append(_bind(listen.host, port))
        yield sockets
    finally:
        for one in sockets:
            one.close()


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named: asyncio turns Nagle's algorithm off for such sockets only, else tokens come 40 ms late.
    one = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind((host, port))
        one.listen(2048)
    except OSError as error:
        one.close()
        raise EndpointError(
            f"the gateway cannot listen on {host}:{port}: {error.strerror or error}",
            hint="stop what listens there, or choose another port: --port, --predict-port",
        ) from error
    return one


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
