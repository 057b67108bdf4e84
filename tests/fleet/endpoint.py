"""An endpoint of real Tritons and workers with a gateway in front of it. For the tests of the fleet."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import ROOT, unused_ports
from tests.e2e.served import Served
from tests.gateway.behind_gateway import Gateway, settings_for
from toolchain import runner
from toolchain.errors import ToolError
from toolchain.fleet.front.front import engines
from toolchain.fleet.front.meter import Meter
from toolchain.fleet.front.texts import Parameters, Texts
from toolchain.fleet.hosts import servers
from toolchain.fleet.plane import Plane
from toolchain.fleet.worker.membership import TOKENIZER
from toolchain.fleet.worker.worker import Spec
from toolchain.gateway.logs import Log
from toolchain.gateway.run import Listen, background
from toolchain.ledger.book import FILE, Ledger
from toolchain.repository import Repository
from toolchain.servers.triton.locate import find_server
from toolchain.servers.triton.ports import free_ports
from toolchain.servers.triton.supervisor import Supervisor, status_file_of

ENDPOINT = "parrot"


class Replica:
    """A Triton without a supervisor at work, and its worker."""

    def __init__(self, repository: Path, work: Path, discovery: Path) -> None:
        work.mkdir()
        self.work, self.ports = work, free_ports()
        self._repository = repository
        self.triton = self._supervisor()
        url = f"http://127.0.0.1:{self.ports.http}"
        self.spec = Spec(
            ENDPOINT,
            str(discovery),
            url,
            str(repository),
            5.0,
            state=str(work / "state.json"),
            replica=work.name,
            metrics_url=f"http://127.0.0.1:{self.ports.metrics}/metrics",
            status_file=str(status_file_of(work / "triton.log", self.ports.http)),
        )
        self.worker: runner.Process | None = None

    def _supervisor(self) -> Supervisor:
        server = find_server("bundled", environ=os.environ)
        return Supervisor(server, self._repository, self.ports, log=self.work / "triton.log", exit_timeout_s=3)

    def start(self) -> None:
        self.triton.start()
        self.start_worker()

    def restart_triton(self) -> None:
        self.triton.kill()
        self.triton = self._supervisor()
        self.triton.start()

    def start_worker(self) -> None:
        self.spec.write(self.work / "spec.json")
        argv = [sys.executable, "-m", "toolchain.fleet.worker", str(self.work / "spec.json")]
        self.worker = runner.start(argv, log=self.work / "worker.log", cwd=ROOT)

    @property
    def told(self) -> dict[str, Any]:
        """What its worker says of itself."""
        file = Path(self.spec.state)
        return json.loads(file.read_text()) if file.exists() else {"state": ""}

    @property
    def state(self) -> str:
        return str(self.told["state"])

    def stub(self) -> int:
        """The process of the engine's Triton model."""
        children = psutil.Process(self.triton.pid).children(recursive=True)
        return next(one.pid for one in children if "/tensorrt_llm/1/model.py" in " ".join(one.cmdline()))

    def kill(self) -> None:
        if self.worker is not None:
            self.worker.kill()
        self.triton.kill()


class Endpoint:
    """Two replicas, a gateway, and what it counts."""

    def __init__(self, replicas: list[Replica], gateway: Gateway, meter: Meter) -> None:
        self.replicas, self.gateway, self.meter = replicas, gateway, meter

    def seen(self) -> list[str]:
        """The workers that take requests, as the gateway sees them."""
        try:
            with urllib.request.urlopen(f"{self.gateway.root}/ready") as answer:
                return list(json.load(answer)["engines"])
        except urllib.error.HTTPError:
            return []

    def workers(self) -> int:
        """How many take requests, as the gateway sees it."""
        return len([one for one in self.replicas if one.state == "ready"])


def as_served(running: Endpoint) -> Served:
    """The endpoint, asked as one Triton."""
    listen = running.gateway.listen
    assert listen.grpc_port is not None
    return Served(listen.port, listen.grpc_port, Path())


def one_triton(running: Endpoint) -> Served:
    """The Triton of its first replica."""
    ports = running.replicas[0].ports
    return Served(ports.http, ports.grpc, Path())


@contextmanager
def endpoint(
    repository: Path, tokenizer: Path, work: Path, count: int = 2, adapters: tuple[str, ...] = ()
) -> Iterator[Endpoint]:
    plane = Plane(work / "discovery", ENDPOINT)
    plane.folder.mkdir(parents=True)
    with ExitStack() as stack:
        replicas = [Replica(repository, work / f"r{number}", plane.folder) for number in range(count)]
        for replica in replicas:
            stack.callback(replica.kill)
            replica.start()
        texts = Texts(repository / TOKENIZER, Parameters.of(Repository.open(repository).parameters))
        port, predict_port, grpc_port = unused_ports(3)
        settings = settings_for(tokenizer, kserve=repository / "tensorrt_llm_bls" / "config.pbtxt")
        model = replace(settings.model, adapters=adapters)
        settings = replace(settings, model=model, timeouts=replace(settings.timeouts, patience_s=30))
        stream = io.StringIO()
        listen = Listen(port=port, predict_port=predict_port, grpc_port=grpc_port)
        meter = Meter(Ledger.open(work / FILE, ENDPOINT))
        stack.callback(meter.close)
        front = engines(plane, texts, 200, meter)
        bound = stack.enter_context(background(settings, listen, log=Log(stream), engines=front))
        found = Endpoint(replicas, Gateway(bound, settings, stream), meter)
        until(lambda: found.workers() == count, 60)
        until(lambda: len(found.seen()) == count, 60)
        yield found


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Returns when it holds; AssertionError after the time is up."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def need_servers() -> None:
    """Skips the test where the programs of an endpoint over hosts are not installed."""
    for program in ("etcd", "nats-server"):
        try:
            servers.find(program)
        except ToolError as error:
            pytest.skip(f"{error.message}: {error.hint.splitlines()[0]}")


def signal_worker(replica: Replica, number: signal.Signals) -> None:
    assert replica.worker is not None
    os.kill(replica.worker.pid, number)
