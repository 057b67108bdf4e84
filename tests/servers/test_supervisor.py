"""A real Triton under the supervisor: started, proven, broken in every way that serving can break, replaced, ended."""

from __future__ import annotations

import os
import socket
import sys
import threading
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
from toolchain.errors import EndpointError
from toolchain.servers.triton.command import Command, Ports, Settings
from toolchain.servers.triton.health import Policy
from toolchain.servers.triton.locate import find_server
from toolchain.servers.triton.ports import free_ports
from toolchain.servers.triton.supervisor import ServingInfo, Supervisor

QUICK = Policy(period_s=0.2, deadline_s=0.5, timeouts=2, tick_s=0.1, backoff_s=0.1)


def make_supervisor(repository: Path, ports: Ports | None = None, **options) -> Supervisor:
    log = repository.parent / "triton.log"
    server = find_server("bundled", environ=os.environ)
    options = {"policy": QUICK, "exit_timeout_s": 5, "start_timeout_s": 60, **options}
    return Supervisor(server, repository, ports or free_ports(), log=log, **options)


@contextmanager
def watched(supervisor: Supervisor) -> Iterator[tuple[ServingInfo, list[BaseException]]]:
    """Started, with ``watch`` in a thread; killed at the end. The list gets what ``watch`` raises."""
    raised: list[BaseException] = []

    def watch() -> None:
        try:
            supervisor.watch()
        except EndpointError as error:
            raised.append(error)

    thread = threading.Thread(target=watch)
    try:
        info = supervisor.start()
        thread.start()
        yield info, raised
    finally:
        supervisor.ask_to_stop()
        if thread.is_alive():
            thread.join()
        supervisor.kill()


def endpoint_of(info: ServingInfo) -> Endpoint:
    return Endpoint(info.http_url, info.grpc_url)


def text_of(info: ServingInfo) -> str:
    return "".join(chunk.text for chunk in endpoint_of(info).generate("count", max_tokens=3))


def generates(info: ServingInfo) -> bool:
    try:
        return text_of(info) == " t0 t1 t2"
    except EndpointError:
        return False


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return write_repository(tmp_path / "repository")


def test_a_started_server_answers_and_a_stopped_one_leaves_nothing(repository: Path) -> None:
    with make_supervisor(repository) as supervisor:
        assert shared_memory_of(os.getpid())
        assert supervisor.pid == server_of(repository).pid
        assert os.getpgid(stub_of(repository).pid) == supervisor.pid
        listening = {
            c.laddr.ip.removeprefix("::ffff:") for c in server_of(repository).net_connections() if c.status == "LISTEN"
        }
    assert listening == {"127.0.0.1"}
    assert processes_of(repository) == []
    assert shared_memory_of(os.getpid()) == []


def test_an_exception_in_the_block_leaves_nothing_either(repository: Path) -> None:
    with pytest.raises(SystemExit), make_supervisor(repository):
        raise SystemExit(3)
    assert processes_of(repository) == []
    assert shared_memory_of(os.getpid()) == []


@pytest.mark.parametrize("which", ["http", "grpc", "metrics"])
def test_a_busy_port_is_refused_by_naming_who_has_it(repository: Path, which: str) -> None:
    ports = free_ports()
    with socket.create_server(("127.0.0.1", ports.named()[which])), pytest.raises(EndpointError) as caught:
        make_supervisor(repository, ports).start()
    assert f"{which} port {ports.named()[which]} is taken by pid {os.getpid()} (" in caught.value.message
    assert Path(sys.executable).name in caught.value.message
    assert processes_of(repository) == []


class _LosesALock:
    """A server whose first start ends as Triton does when a lock of its Python backend is lost; then the real one."""

    version, kind = "2.51.0", "bundled"

    def __init__(self) -> None:
        self.starts = 0
        self._real = find_server("bundled", environ=os.environ)

    def command(self, settings: Settings) -> Command:
        self.starts += 1
        if self.starts > 1:
            return self._real.command(settings)
        words = "terminate called after throwing an instance of 'boost::interprocess::lock_exception'"
        return Command(("sh", "-c", 'echo "$1"; kill -ABRT $$', "tritonserver", words), dict(os.environ))


def test_a_triton_that_loses_a_lock_while_it_loads_is_started_once_more(repository: Path) -> None:
    server = _LosesALock()
    log = repository.parent / "triton.log"
    with Supervisor(server, repository, free_ports(), log=log, policy=QUICK, exit_timeout_s=5) as supervisor:
        assert supervisor.pid
    assert server.starts == 2
    assert "lock_exception" in log.with_name("triton.log.1").read_text()


def test_a_model_that_raises_is_named_with_its_exception(tmp_path: Path) -> None:
    repository = write_repository(
        tmp_path / "repository", initialize="raise FileNotFoundError('no engine in /models/llama')"
    )
    with pytest.raises(EndpointError) as caught:
        make_supervisor(repository).start()
    assert caught.value.message == (
        "Triton did not start: model tensorrt_llm_bls does not load: FileNotFoundError: no engine in /models/llama"
    )
    assert str(tmp_path / "triton.log") in caught.value.hint
    assert processes_of(repository) == []


def test_a_model_that_fails_is_reported_before_slow_ones_have_loaded(tmp_path: Path) -> None:
    repository = write_repository(tmp_path / "repository", initialize="import no_such_engine")
    write_repository(repository, name="slow", initialize="time.sleep(300)")
    with pytest.raises(EndpointError, match="needs the Python module no_such_engine"):
        make_supervisor(repository, start_timeout_s=200).start()
    assert processes_of(repository) == []


def test_a_start_that_hangs_ends_at_its_deadline_and_names_the_model(tmp_path: Path) -> None:
    repository = write_repository(tmp_path / "repository", initialize="time.sleep(300)")
    with pytest.raises(EndpointError, match=r"not ready after 2 s \(still loading: tensorrt_llm_bls\)"):
        make_supervisor(repository, start_timeout_s=2).start()
    assert processes_of(repository) == []


def test_loaded_is_not_ready_when_the_model_does_not_generate(tmp_path: Path) -> None:
    repository = write_repository(tmp_path / "repository", initialize="self.hung = True")
    with pytest.raises(EndpointError, match="not ready after 2 s"):
        make_supervisor(repository, start_timeout_s=2).start()


def test_a_stop_request_during_the_start_is_obeyed(tmp_path: Path) -> None:
    repository = write_repository(tmp_path / "repository", initialize="self.hung = True")
    supervisor = make_supervisor(repository)
    timer = threading.Timer(1.5, supervisor.ask_to_stop)
    timer.start()
    with pytest.raises(EndpointError, match="stopped before"):
        supervisor.start()
    assert processes_of(repository) == []


def test_a_dead_stub_under_load_leads_to_a_new_server_on_the_same_ports(repository: Path) -> None:
    with watched(make_supervisor(repository)) as (info, _):
        stream = endpoint_of(info).generate("slowly", max_tokens=10_000)
        assert next(stream).text == " t0"
        stub_of(repository).kill()
        with pytest.raises(EndpointError, match=r"closed the connection|process died"):  # and does not hang for ever
            list(stream)
        wait_for(lambda: generates(info))
        assert server_of(repository).pid != info.pid
        assert len(shared_memory_of(os.getpid())) == 1
    assert processes_of(repository) == []


def test_a_dead_server_is_replaced_and_its_busy_stub_is_not_orphaned(repository: Path) -> None:
    with watched(make_supervisor(repository)) as (info, _):
        stream = endpoint_of(info).generate("slowly", max_tokens=10_000, protocol="grpc")
        next(stream)
        stub = stub_of(repository)
        server_of(repository).kill()
        with pytest.raises(EndpointError, match="no server answers at"):
            list(stream)
        wait_for(lambda: generates(info))
        assert not stub.is_running()


def test_a_hung_engine_is_found_by_its_missing_token(repository: Path) -> None:
    with watched(make_supervisor(repository)) as (info, _):
        endpoint = endpoint_of(info)
        with pytest.raises(EndpointError):
            list(endpoint.generate("hang", max_tokens=1))
        wait_for(lambda: generates(info))
        assert server_of(repository).pid != info.pid


def test_a_server_that_keeps_failing_is_given_up_with_the_cause(repository: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    model = repository / "tensorrt_llm_bls" / "1" / "model.py"
    initialize = f"if Path({str(broken)!r}).exists(): raise OSError('the engine file is gone')"
    model.write_text(model.read_text().replace("INITIALIZE = ''", f"INITIALIZE = {initialize!r}"))
    supervisor = make_supervisor(repository, policy=Policy(tick_s=0.1, backoff_s=0.05, max_restarts=2))
    with watched(supervisor) as (_, raised):
        broken.touch()
        server_of(repository).kill()
        wait_for(lambda: raised)
    assert "failed 3 times" in str(raised[0])
    assert "OSError: the engine file is gone" in str(raised[0])
    assert processes_of(repository) == []
