"""Hosts that are network namespaces of this machine: a head, and nodes that reach it, one of them through a NAT.

    head ── 10.87.0.1 ──┐
    a    ── 10.87.0.11 ─┤
    b    ── 10.87.0.12 ─┼─ a bridge ── 10.87.0.254: the test itself, the client
    nat  ── 10.87.0.50 ─┘
     └── c, 192.168.87.2: what comes from outside and was not asked for is dropped

Needs root, iproute2 and iptables.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import ROOT
from toolchain import runner

HEAD_ADDRESS, CLIENT_ADDRESS, NAT_ADDRESS = "10.87.0.1", "10.87.0.254", "10.87.0.50"
PUBLIC = {"head": HEAD_ADDRESS, "a": "10.87.0.11", "b": "10.87.0.12", "nat": NAT_ADDRESS}
_INSIDE, _INSIDE_GATE = "192.168.87.2", "192.168.87.1"
_SBIN = "/usr/sbin:/sbin"


def why_not() -> str:
    """Why hosts cannot be simulated here; empty where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    path = f"{os.environ.get('PATH', '')}:{_SBIN}"
    if lacking := [one for one in ("ip", "iptables") if shutil.which(one, path=path) is None]:
        return f"not installed: {', '.join(lacking)} (apt-get install iproute2 iptables)"
    name = f"try{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False, env=_env())
    if made.returncode:
        return f"this machine makes no network namespaces: {made.stderr.strip()}"
    inside = ["ip", "netns", "exec", name, "iptables", "-t", "nat", "-A", "POSTROUTING", "-j", "MASQUERADE"]
    natted = subprocess.run(inside, capture_output=True, text=True, check=False, env=_env())
    _ip("netns", "del", name)
    return f"its kernel has no NAT: {natted.stderr.strip()}" if natted.returncode else ""


def require() -> None:
    """Skips the test, saying why, where hosts cannot be simulated."""
    if reason := why_not():
        pytest.skip(reason)
    for program, package in (("etcd", "etcd-server"), ("nats-server", "nats-server")):
        if shutil.which(program, path=f"{os.environ.get('PATH', '')}:{_SBIN}") is None:
            pytest.skip(f"{program} is not installed (apt-get install {package})")


class Host:
    """One namespace. Programs are started in it and found in it."""

    def __init__(self, name: str, space: str) -> None:
        self.name, self.space = name, space

    def wrap(self, argv: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", self.space, *argv]

    def start(self, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> runner.Process:
        return runner.start(self.wrap(argv), log=log, cwd=ROOT, env=_env(env))

    def run(self, *argv: str) -> str:
        return _run(self.wrap(argv))

    def pids(self) -> list[int]:
        return [int(one) for one in _ip("netns", "pids", self.space).split()]

    def listening(self) -> list[str]:
        """The addresses, with ports, at which anybody could be asked, but for loopback."""
        found = [line.split()[3] for line in self.run("ss", "-Hltn").splitlines()]
        return [one for one in found if not one.startswith(("127.", "[::1]", "[::ffff:127."))]

    def cut(self) -> None:
        """Its cable: nothing arrives any more and nobody is told."""
        self.run("ip", "link", "set", "eth0", "down")

    def mend(self) -> None:
        self.run("ip", "link", "set", "eth0", "up")
        gate = _INSIDE_GATE if self.name == "c" else ""
        if gate:
            self.run("ip", "route", "replace", "default", "via", gate)

    def lose(self) -> None:
        """Power off: its cable first, so that nobody hears of its end."""
        self.cut()
        self.kill()

    def kill(self) -> None:
        """Everything that runs in it."""
        for pid in self.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


@contextmanager
def hosts() -> Iterator[dict[str, Host]]:
    """``head``, ``a``, ``b`` and ``c``, until the end of the block."""
    prefix = f"sl{os.getpid()}-"
    spaces = {name: f"{prefix}{name}" for name in ("net", *PUBLIC, "c")}
    outside = f"sl{os.getpid()}"
    try:
        for space in spaces.values():
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
        net = spaces["net"]
        _ip("-n", net, "link", "add", "br0", "type", "bridge")
        _ip("-n", net, "link", "set", "br0", "up")
        for name, address in PUBLIC.items():
            _cable(spaces[name], "eth0", f"{address}/24", net, f"to-{name}")
            _ip("-n", net, "link", "set", f"to-{name}", "master", "br0")
        _ip("link", "add", outside, "type", "veth", "peer", "name", "to-client", "netns", net)
        _ip("addr", "add", f"{CLIENT_ADDRESS}/24", "dev", outside)
        _ip("link", "set", outside, "up")
        _ip("-n", net, "link", "set", "to-client", "master", "br0", "up")
        _behind_nat(spaces["nat"], spaces["c"])
        yield {name: Host(name, spaces[name]) for name in ("head", "a", "b", "c")}
    finally:
        for name, space in spaces.items():
            Host(name, space).kill()
            subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True, env=_env())
        subprocess.run(["ip", "link", "del", outside], check=False, capture_output=True, env=_env())


def _behind_nat(nat: str, inside: str) -> None:
    _cable(inside, "eth0", f"{_INSIDE}/24", nat, "eth1")
    _ip("-n", nat, "addr", "add", f"{_INSIDE_GATE}/24", "dev", "eth1")
    _ip("-n", inside, "route", "add", "default", "via", _INSIDE_GATE)
    door = Host("nat", nat)
    door.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    door.run("iptables", "-t", "nat", "-A", "POSTROUTING", "-o", "eth0", "-j", "MASQUERADE")
    known = ("-i", "eth0", "-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED", "-j", "ACCEPT")
    for chain in ("FORWARD", "INPUT"):
        door.run("iptables", "-A", chain, *known)
        door.run("iptables", "-A", chain, "-i", "eth0", "-j", "DROP")


def _cable(space: str, name: str, address: str, other: str, other_name: str) -> None:
    _ip("-n", space, "link", "add", name, "type", "veth", "peer", "name", other_name, "netns", other)
    _ip("-n", space, "addr", "add", address, "dev", name)
    _ip("-n", space, "link", "set", name, "up")
    _ip("-n", other, "link", "set", other_name, "up")


def _ip(*words: str) -> str:
    return _run(["ip", *words])


def _run(argv: Sequence[str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env=_env())
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr.strip()}"
    return done.stdout


def _env(more: Mapping[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:{_SBIN}", **(more or {})}
