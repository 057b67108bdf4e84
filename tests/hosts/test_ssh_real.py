"""The same build through the real ssh client, a real SSH server in this process, and the real rsync."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.fakes import L4, Programs, make_job
from toolchain import hosts
from toolchain.hosts import ssh
from toolchain.progress import Silent

asyncssh = pytest.importorskip("asyncssh", reason="no SSH server: pip install asyncssh")
SSH, RSYNC = shutil.which("ssh"), shutil.which("rsync")
pytestmark = pytest.mark.skipif(not SSH or not RSYNC, reason="no ssh or rsync client")


class Server:
    """An SSH server on 127.0.0.1 whose logins run commands in ``home``."""

    def __init__(self, folder: Path, home: Path, environment: dict[str, str]) -> None:
        self.home, self.environment = home, {**environment, "HOME": str(home)}
        self.key, self.login = folder / "host_key", folder / "login_key"
        for path in (self.key, self.login):
            made = asyncssh.generate_private_key("ssh-ed25519")
            made.write_private_key(path)
            path.chmod(0o600)
            made.write_public_key(path.with_suffix(".pub"))
        self.connections: list[Any] = []
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self.port = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(20)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)
        self._loop.close()

    def drop(self) -> None:
        """Every connection is lost, as when a cable is pulled."""
        for connection in self.connections:
            self._loop.call_soon_threadsafe(connection.abort)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._listen())
        self._loop.run_forever()

    async def _listen(self) -> None:
        outer = self

        class Login(asyncssh.SSHServer):
            def connection_made(self, connection: Any) -> None:
                outer.connections.append(connection)

        self._listening = await asyncssh.create_server(
            Login,
            "127.0.0.1",
            0,
            server_host_keys=[str(self.key)],
            authorized_client_keys=str(self.login.with_suffix(".pub")),
            process_factory=self._command,
            encoding=None,
        )
        self.port = self._listening.get_port()
        self._ready.set()

    async def _end(self) -> None:
        self._listening.close()
        for connection in self.connections:
            connection.abort()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        await asyncio.wait([*others, asyncio.create_task(asyncio.sleep(0))], timeout=10)

    async def _command(self, asked: Any) -> None:
        pipe = asyncio.subprocess.PIPE
        shell = await asyncio.create_subprocess_shell(
            asked.command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=self.home, env=self.environment
        )
        with contextlib.suppress(asyncssh.Error, OSError):  # the connection was lost
            await asked.redirect(stdin=shell.stdin, stdout=shell.stdout, stderr=shell.stderr)
            code = await shell.wait()
            await asked.stdout.drain()
            await asked.stderr.drain()
            asked.exit(code)
        await asked.wait_closed()


@pytest.fixture
def gpu_box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[Server, Programs]]]:
    """``gpu_box()`` -> the server and its programs; ``known=False``: its key is in nobody's list."""
    servers: list[Server] = []
    monkeypatch.setattr(ssh, "WAITS_S", (0.1, 0.1))

    def make(known: bool = True) -> tuple[Server, Programs]:
        home, near = tmp_path / "home", tmp_path / "near"
        home.mkdir()
        near.mkdir()
        far = Programs(tmp_path / "far", "trtllm-build", "nvidia-smi")
        (far.folder / "rsync").symlink_to(str(RSYNC))
        environment = {"PATH": far.path, "PYTHONPATH": str(far.site), **_library_path()}
        server = Server(near, home, environment)
        servers.append(server)
        listed = near / "known_hosts"
        public = server.key.with_suffix(".pub").read_text()
        listed.write_text(f"[127.0.0.1]:{server.port} {public}" if known else "")
        (near / "config").write_text(
            f"Host gpu-box\n  HostName 127.0.0.1\n  Port {server.port}\n  User anyone\n  IdentityFile {server.login}\n"
            f"  IdentitiesOnly yes\n  UserKnownHostsFile {listed}\n  GlobalKnownHostsFile /dev/null\n"
        )
        wrapper = near / "ssh"  # ssh reads the config of the user's home by the password file, not by $HOME
        wrapper.write_text(f'#!/bin/sh\nexec {SSH} -F {near}/config "$@"\n')
        wrapper.chmod(0o755)
        monkeypatch.setenv("PATH", f"{near}:{os.environ['PATH']}")
        return server, far

    yield make
    for server in servers:
        server.close()


def _library_path() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"}


def test_a_build_through_the_real_protocol(gpu_box: Callable[..., Any], tmp_path: Path) -> None:
    server, far = gpu_box()
    job = make_job(tmp_path / "work", gpus=2)
    far.behave(gpus=[L4.replace("1,", "0,", 1), L4])
    host = hosts.load("ssh:gpu-box")
    assert host.lacks(job) == ()
    host.build(job, tmp_path / "build.log", Silent())
    assert sorted(file.name for file in job.out.iterdir()) == ["config.json", "rank0.engine", "rank1.engine"]
    assert list((server.home / ".cache/scalellm/builds").iterdir()) == []


def test_a_host_whose_key_is_not_known_is_never_spoken_to(gpu_box: Callable[..., Any], tmp_path: Path) -> None:
    server, _ = gpu_box(known=False)
    (line,) = hosts.load("ssh:gpu-box").lacks(make_job(tmp_path / "work"))
    assert "Host key verification failed" in line
    assert "compare the key that it shows" in line
    assert list(server.home.iterdir()) == []


def test_a_cable_that_is_pulled_costs_nothing(gpu_box: Callable[..., Any], tmp_path: Path) -> None:
    server, far = gpu_box()
    far.behave(says=["begun", "[TRT-LLM] [I] Build TensorRT engine Unnamed Network 0", "ended"], sleep_s=2)
    pulled: list[str] = []

    class Puller(Silent):
        def task(self, label: str, total: int, unit: str) -> Any:
            return self

        def describe(self, text: str) -> None:
            if not pulled:
                pulled.append(text)
                server.drop()

        def advance(self, amount: int) -> None:
            pass

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    job = make_job(tmp_path / "work")
    hosts.load("ssh:gpu-box").build(job, tmp_path / "build.log", Puller())
    assert pulled
    assert len(far.calls("trtllm-build")) == 1
    assert (tmp_path / "build.log").read_text().count("begun") == 1
    assert (job.out / "rank0.engine").is_file()
