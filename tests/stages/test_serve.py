"""serve in the foreground, as the command line runs it, and in the background of a block."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.servers.generator_repository import (
    processes_of,
    server_of,
    shared_memory_of,
    stub_of,
    wait_for,
    write_repository,
)
from toolchain.endpoint import Endpoint
from toolchain.errors import ArtifactError, EndpointError
from toolchain.progress import Silent
from toolchain.servers.triton.ports import free_ports
from toolchain.stages.serve import background

SERVE = """
import os, sys
from pathlib import Path
from toolchain.progress import Silent
from toolchain.servers.triton.command import Ports
from toolchain.stages.serve import serve
sys.exit(serve(Path(sys.argv[1]), ports=Ports(*map(int, sys.argv[2:5])), progress=Silent(),
               exit_timeout_s=int(sys.argv[5]), on_ready=lambda info: print("ready", flush=True)))
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return write_repository(tmp_path / "repository")


def log_of(repository: Path) -> str:
    log = repository.parent / "triton.log"
    return log.read_text() if log.exists() else ""


@contextmanager
def serving_process(repository: Path, exit_timeout_s: int) -> Iterator[tuple[subprocess.Popen[str], Endpoint]]:
    """``stages.serve.serve`` in a process of its own, as the command line runs it."""
    ports = free_ports()
    argv = [sys.executable, "-c", SERVE, str(repository), *map(str, ports.named().values()), str(exit_timeout_s)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process, Endpoint(f"http://127.0.0.1:{ports.http}", f"127.0.0.1:{ports.grpc}")
        finally:
            process.kill()
    wait_for(lambda: processes_of(repository) == [])


def test_sigterm_lets_streams_finish_and_then_nothing_remains(repository: Path) -> None:
    with serving_process(repository, exit_timeout_s=30) as (process, endpoint):
        stream = endpoint.generate("slowly", max_tokens=60)
        first = next(stream)
        process.send_signal(signal.SIGTERM)
        chunks = [first, *stream]
        assert [chunk.text for chunk in chunks] == [f" t{i}" for i in range(60)] + [""]
        assert process.wait(30) == 0
        assert processes_of(repository) == []
        assert shared_memory_of(process.pid) == []


def test_a_signal_during_the_start_ends_it_quietly(tmp_path: Path) -> None:
    repository = write_repository(tmp_path / "repository", initialize="time.sleep(300)")
    ports = map(str, free_ports().named().values())
    with subprocess.Popen([sys.executable, "-c", SERVE, str(repository), *ports, "5"]) as process:
        wait_for(lambda: "loading: " in log_of(repository))
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert processes_of(repository) == []


def test_a_second_signal_ends_the_drain(repository: Path) -> None:
    with serving_process(repository, exit_timeout_s=1000) as (process, endpoint):
        stream = endpoint.generate("slowly", max_tokens=1_000_000)
        next(stream)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: "HTTP service connections" in log_of(repository))
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        with pytest.raises(EndpointError):
            list(stream)


def test_kill_9_of_the_supervisor_leaves_neither_server_nor_busy_stub(repository: Path) -> None:
    with serving_process(repository, exit_timeout_s=30) as (process, endpoint):
        stream = endpoint.generate("slowly", max_tokens=10_000)
        next(stream)
        assert shared_memory_of(process.pid)
        process.kill()
        wait_for(lambda: processes_of(repository) == [])
        wait_for(lambda: shared_memory_of(process.pid) == [])
        with pytest.raises(EndpointError):
            list(stream)


class Notes(Silent):
    """A ``Progress`` that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def test_the_background_server_is_supervised_too(repository: Path) -> None:
    notes = Notes()
    with background(repository, ports=free_ports(), progress=notes, exit_timeout_s=5) as info:
        stub_of(repository).kill()
        wait_for(lambda: any("replacing the server" in line for line in notes.lines))
        endpoint = Endpoint(info.http_url, info.grpc_url)
        wait_for(endpoint.ready)
        assert server_of(repository).pid != info.pid
        chunks = list(endpoint.generate("count", max_tokens=2, protocol="grpc"))
        assert [chunk.text for chunk in chunks] == [" t0", " t1", ""]
        assert "not healthy" in notes.lines[0]
    assert processes_of(repository) == []
    assert (repository.parent / "triton.log.1").exists(), "the log of the server that died is kept"


def test_a_folder_that_is_no_repository_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match=r"no \*/config\.pbtxt"),
        background(tmp_path, ports=free_ports(), progress=Silent()),
    ):
        pass
