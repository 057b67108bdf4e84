"""Promises about sampled memory: the process that listens and its children, and nobody else's server."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.fakes import Programs
from toolchain.measuring.memory import Watch, listener

_SERVER = """\
import socket, subprocess, sys, time
holds = "x = b'1' * (96 << 20); print('held', flush=True); import time; time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", holds])
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
sys.stdin.read()
child.kill()
"""


@pytest.fixture
def server() -> Iterator[tuple[int, int]]:
    """(pid, port) of a process that listens and has a child that holds 96 MiB."""
    program = subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert program.stdout
    assert program.stdin
    said = {program.stdout.readline().strip() for _ in range(2)}
    yield program.pid, int(next(iter(said - {"held"})))
    program.stdin.close()
    program.wait(10)


def test_the_memory_of_the_listener_and_its_children_is_sampled(server: tuple[int, int]) -> None:
    pid, port = server
    assert [listener(url) for url in (f"127.0.0.1:{port}", f"http://localhost:{port}/v1")] == [pid, pid]
    begin = time.perf_counter()
    with Watch([f"127.0.0.1:{port}"], every_s=0.02) as watch:
        time.sleep(0.3)
    samples = watch.samples(begin)
    assert len(samples) > 2
    assert [one.at_s for one in samples] == sorted(one.at_s for one in samples)
    assert all(one.rss_bytes and 96 << 20 < one.rss_bytes < 300 << 20 for one in samples)
    assert watch.watched is not None
    assert len(watch.watched.processes) == 2
    assert watch.samples(time.perf_counter()) == ()


def test_servers_elsewhere_are_not_looked_at(server: tuple[int, int]) -> None:
    with Watch([f"127.0.0.1:{server[1]}", "http://192.0.2.1:8000"], every_s=0.01) as watch:
        time.sleep(0.05)
    assert watch.watched is None
    assert watch.samples(0.0) == ()


def test_the_memory_of_gpus_is_in_the_samples(
    server: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvidia-smi as a program on the PATH; a machine with NVML is asked through that."""
    line = "0, NVIDIA GeForce RTX 4090, GPU-0, 8.9, 560.35.03, 24564, 20468"
    programs = Programs(tmp_path / "bin", "nvidia-smi", gpus=(line,))
    monkeypatch.setenv("PATH", programs.path)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with Watch([f"127.0.0.1:{server[1]}"], every_s=0.05) as watch:
        time.sleep(0.6)
    assert watch.watched is not None
    assert watch.watched.gpus == ("NVIDIA GeForce RTX 4090",)
    assert {one.gpu_bytes for one in watch.samples(0.0)} == {(4096 << 20,)}
