"""Several services of one repository: a server each, watched by itself, on ports ten apart."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.engine_folder import write_engine
from tests.servers.generator_repository import processes_of, wait_for, write_repository
from toolchain.endpoint import Endpoint
from toolchain.errors import EndpointError
from toolchain.progress import Silent
from toolchain.servers.triton.command import Ports
from toolchain.servers.triton.ports import check_ports, free_ports
from toolchain.stages.package import package
from toolchain.stages.serve import background, ports_of

SERVE = """
import sys
from pathlib import Path
from toolchain.progress import Silent
from toolchain.servers.triton.command import Ports
from toolchain.stages.serve import Policy, serve

class Notes(Silent):
    def note(self, text):
        print("note " + text, flush=True)

sys.exit(serve(Path(sys.argv[1]), ports=Ports(*map(int, sys.argv[2:5])), progress=Notes(), exit_timeout_s=30,
               policy=Policy(max_restarts=int(sys.argv[5])),
               on_ready=lambda info: print("ready", info.service, info.pid, info.http_url, info.log.name, flush=True)))
"""


def ports_for(services: int) -> Ports:
    """Ports of which all that ``services`` need are free."""
    for _attempt in range(50):
        ports = free_ports()
        try:
            for place in ports_of(ports, services):
                check_ports("127.0.0.1", place)
        except EndpointError:
            continue
        return ports
    raise AssertionError("no free ports")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """For two services, each of which takes about a second to start."""
    folder = write_repository(tmp_path / "repository")
    (folder / "repository.json").write_text(json.dumps({"services": 2}))
    return folder


class Serving:
    """The process that serves, and what it said when its two services were ready."""

    def __init__(self, process: subprocess.Popen[str], ports: Ports) -> None:
        self.process = process
        self.ready = [self.line().split() for _ in range(2)]
        self.pids = [int(words[4]) for words in self.ready]
        places = ports_of(ports, 2)
        self.endpoints = [Endpoint(f"http://127.0.0.1:{p.http}", f"127.0.0.1:{p.grpc}") for p in places]

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


@contextmanager
def serving(repository: Path, max_restarts: int = 5) -> Iterator[Serving]:
    ports = ports_for(2)
    argv = [sys.executable, "-c", SERVE, str(repository), *map(str, ports.named().values()), str(max_restarts)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Serving(process, ports)
        finally:
            process.kill()
    wait_for(lambda: processes_of(repository) == [])


def count(endpoint: Endpoint) -> str:
    return "".join(chunk.text for chunk in endpoint.generate("count", max_tokens=3))


def test_each_service_has_a_server_of_its_own_and_its_ports(repository: Path) -> None:
    with serving(repository) as found:
        assert [words[:4] for words in found.ready] == [["ready", "1", "of", "2"], ["ready", "2", "of", "2"]]
        assert found.pids[0] != found.pids[1]
        assert [words[6] for words in found.ready] == ["triton-1.log", "triton-2.log"]
        assert [count(endpoint) for endpoint in found.endpoints] == [" t0 t1 t2"] * 2


def test_a_crash_takes_one_service_and_it_is_replaced(repository: Path) -> None:
    with serving(repository) as found:
        stream = found.endpoints[1].generate("slowly", max_tokens=150)
        next(stream)
        os.killpg(found.pids[0], signal.SIGKILL)
        assert "note triton 1 of 2: replacing the server" in found.line()
        assert len([chunk for chunk in stream if chunk.text]) == 149, "the other service did not notice"
        wait_for(found.endpoints[0].ready)
        assert psutil.pid_exists(found.pids[1])
        assert [count(endpoint) for endpoint in found.endpoints] == [" t0 t1 t2"] * 2


def test_one_service_that_cannot_be_kept_is_given_up_and_the_other_goes_on(repository: Path) -> None:
    with serving(repository, max_restarts=0) as found:
        os.killpg(found.pids[0], signal.SIGKILL)
        assert "note triton: service 1 of 2 is given up: Triton failed 1 times" in found.line()
        assert count(found.endpoints[1]) == " t0 t1 t2"
        found.process.send_signal(signal.SIGTERM)
        assert found.process.wait(30) == 1, "the code says that something went wrong"


def test_sigterm_drains_every_service(repository: Path) -> None:
    with serving(repository) as found:
        streams = [endpoint.generate("slowly", max_tokens=40) for endpoint in found.endpoints]
        for stream in streams:
            next(stream)
        found.process.send_signal(signal.SIGTERM)
        assert [len([chunk for chunk in stream if chunk.text]) for stream in streams] == [39, 39]
        assert found.process.wait(30) == 0
        assert processes_of(repository) == []


def test_ports_are_ten_apart_and_never_shared() -> None:
    assert ports_of(Ports(), 3) == [Ports(), Ports(8010, 8011, 8012), Ports(8020, 8021, 8022)]
    with pytest.raises(EndpointError, match="port 8010 is needed twice, for grpc of service 1 and http of service 2"):
        ports_of(Ports(8000, 8010, 8002), 2)
    with pytest.raises(EndpointError, match="http of service 2 would be port 65540"):
        ports_of(Ports(http=65530), 2)


def test_ranks_of_an_engine_are_started_by_mpirun_in_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs that stand for mpirun and tritonserver: what they are given, and where."""
    package(write_engine(tmp_path / "engine", "1.2.1", tp=2), tmp_path / "repository")
    for name in ("mpirun", "tritonserver"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\necho "$PWD" "$@" > {tmp_path}/{name}.said\nls tensorrt_llm/1/engine >&2\nexit 3\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin:/usr/bin")
    monkeypatch.setenv("NVIDIA_TRITON_SERVER_VERSION", "26.04")
    with (
        pytest.raises(EndpointError, match="Triton did not start"),
        background(tmp_path / "repository", ports=free_ports(), progress=Silent()),
    ):
        pass
    said = (tmp_path / "mpirun.said").read_text().split()
    assert said[0] == str(tmp_path / "repository"), "where gpt_model_path, which is relative, is found"
    assert said[1:5] == ["--allow-run-as-root", "-n", "1", str(tmp_path / "bin" / "tritonserver")]
    assert said.count(":") == 1
    assert [word for word in said if word.startswith("--load-model")] == ["--load-model=*", "--load-model=tensorrt_llm"]
    assert {"config.json", "rank0.engine", "rank1.engine"} <= set((tmp_path / "triton.log").read_text().split())
