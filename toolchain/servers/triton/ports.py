"""Who listens on a TCP port of this machine, and ports that nobody uses. Linux only: it reads /proc."""

from __future__ import annotations

import errno
import socket
from contextlib import ExitStack
from pathlib import Path

from toolchain.errors import EndpointError
from toolchain.servers.triton.command import Ports

_LISTEN = "0A"  # TCP_LISTEN, linux/net/tcp_states.h


def free_ports(host: str = "127.0.0.1") -> Ports:
    """Three ports that nobody used a moment ago; held all at once while choosing, so that they differ."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(_socket_for(host)) for _ in range(3)]
        for one in sockets:
            one.bind((host, 0))
        return Ports(*(one.getsockname()[1] for one in sockets))


def check_ports(host: str, ports: Ports) -> None:
    """Refuses (``EndpointError``) a port that is taken, saying by whom; also one given twice, or not ours to bind."""
    named = ports.named()
    for name, port in named.items():
        twin = next((other for other, value in named.items() if value == port and other != name), None)
        if twin:
            raise EndpointError(f"port {port} is given twice, for {name} and {twin}", hint="give three different ports")
        _check_port(host, port, name)


def owner_of(port: int) -> str:
    """Who listens on a port: ``"pid 12 (python -m http.server)"``, or another user's process, or nobody that we see."""
    inodes = _listening_inodes(port)
    if not inodes:
        return "a process in another container or namespace"
    for folder in Path("/proc").glob("[0-9]*"):
        if inodes & _socket_inodes(folder):
            return f"pid {folder.name} ({_command_line(folder)})"
    return "another user's process"


def _check_port(host: str, port: int, name: str) -> None:
    with _socket_for(host) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            raise _refusal(host, port, name, error) from None


def _refusal(host: str, port: int, name: str, error: OSError) -> EndpointError:
    if error.errno == errno.EADDRINUSE:
        return EndpointError(
            f"{name} port {port} is taken by {owner_of(port)}", hint=f"stop it, or choose another port for {name}"
        )
    if error.errno == errno.EACCES:
        return EndpointError(f"{name} port {port} is reserved for root", hint="choose a port from 1024 on")
    if error.errno == errno.EADDRNOTAVAIL:
        return EndpointError(f"{host} is not an address of this machine", hint="use 127.0.0.1, or 0.0.0.0 for all")
    return EndpointError(f"cannot listen on {host}:{port} ({name}): {error.strerror}")


def _socket_for(host: str) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
    except socket.gaierror:
        raise EndpointError(f"{host} is not an address of this machine", hint="use 127.0.0.1") from None
    return socket.socket(family, socket.SOCK_STREAM)


def _listening_inodes(port: int) -> set[str]:
    """The inodes of listening sockets, from /proc/net/tcp{,6} (proc(5): field 2 is HEX:PORT, field 10 the inode)."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                found.add(fields[9])
    return found


def _socket_inodes(process: Path) -> set[str]:
    found = set()
    try:
        for descriptor in (process / "fd").iterdir():
            try:
                target = str(descriptor.readlink())
            except OSError:
                continue
            if target.startswith("socket:["):
                found.add(target[8:-1])
    except OSError:  # another user's, or gone
        pass
    return found


def _command_line(process: Path) -> str:
    try:
        words = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return "ended just now"
    text = " ".join(word.decode(errors="replace") for word in words).strip()
    return text if len(text) <= 120 else text[:117] + "..."
