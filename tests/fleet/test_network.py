"""The head's servers, users and door, with a real etcd and a real NATS: who gets in, who does not, who may do what."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import ssl
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.conftest import unused_ports
from tests.fleet.endpoint import need_servers, until
from toolchain.errors import ArtifactError, EndpointError, RejectedError, ScalellmError, ToolError
from toolchain.fleet.hosts import servers
from toolchain.fleet.hosts.door import MOST_BYTES, Tries, opened
from toolchain.fleet.hosts.joining import Membership, join, own_name
from toolchain.fleet.hosts.network import Addresses, Guests, serving
from toolchain.fleet.hosts.servers import Kept
from toolchain.fleet.hosts.tokens import Token
from toolchain.fleet.plane import Network, Plane
from toolchain.fleet.trust import Authority, Identity, check_node_name
from toolchain.progress import Silent

HOST, ENDPOINT = "127.0.0.1", "parrot"


class Head:
    """Servers and a door, on ports of their own."""

    def __init__(self, guests: Guests, kept: dict[str, Kept]) -> None:
        self.guests, self.kept = guests, kept

    def join(self, name: str, folder: Path) -> Membership:
        return join(self.guests.token(lives_s=60), name, folder)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    pytest.importorskip("cryptography", reason="the extra fleet is not installed")
    need_servers()
    guests = Guests(tmp_path_factory.mktemp("network"), ENDPOINT, Addresses(HOST, *unused_ports(4)))
    with serving(guests, Silent()) as kept, opened(guests, Silent()):
        yield Head(guests, kept)


@pytest.fixture(scope="module")
def node(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Membership:
    return head.join("n1", tmp_path_factory.mktemp("n1"))


def test_a_node_says_how_it_is_and_reads_what_is_wanted_and_nothing_else(head: Head, node: Membership) -> None:
    ours, theirs = head.guests.board(), node.board()
    theirs.put("nodes/n1", {"state": "up", "text": "日本 😀"}, ttl_s=30)
    assert ours.read("nodes/") == {"nodes/n1": {"state": "up", "text": "日本 😀"}}
    ours.put("spec", {"current": 1})
    ours.put("assigned/n1", {"replicas": []})
    assert theirs.read("spec") == {"spec": {"current": 1}}
    assert theirs.read("assigned/n1") == {"assigned/n1": {"replicas": []}}
    for key in ("nodes/n2", "nodes/n11", "spec", "assigned/n1", "asks/x"):
        with pytest.raises(EndpointError, match="permission denied"):
            theirs.put(key, {"state": "mine"})
        with pytest.raises(EndpointError, match="permission denied"):
            theirs.remove(key)
    for prefix in ("", "nodes/", "assigned/", "answers/"):
        with pytest.raises(EndpointError, match="permission denied"):
            theirs.read(prefix)
    ours.remove("assigned/n1")
    ours.remove("assigned/n1")
    assert ours.read("assigned/") == {}


def test_a_value_that_is_not_put_again_in_time_is_gone(head: Head) -> None:
    board = head.guests.board()
    board.put("answers/a", {"one": 1}, ttl_s=0.5)  # etcd's shortest lease is two seconds
    board.put("answers/b", {"two": 2})
    assert set(board.read("answers/")) == {"answers/a", "answers/b"}
    for _ in range(4):
        board.put("answers/c", {"kept": True}, ttl_s=3)
        time.sleep(1)
    until(lambda: "answers/a" not in board.read("answers/"), 20)
    assert set(board.read("answers/")) >= {"answers/b", "answers/c"}


def test_etcd_lets_nobody_in_without_a_certificate_nor_by_a_wrong_password(head: Head, node: Membership) -> None:
    port = head.guests.addresses.etcd
    bare = ssl.create_default_context(cafile=str(node.identity.authority))
    with pytest.raises(OSError):  # noqa: PT011  the kind depends on who notices first
        ask(f"https://{HOST}:{port}", bare, "/v3/kv/range", {"key": "AA==", "range_end": "AA=="})
    mine = node.identity.client_context(nameless=True)
    status, raw = ask(f"https://{HOST}:{port}", mine, "/v3/kv/range", {"key": "AA==", "range_end": "AA=="})
    assert status != 200, raw  # a certificate alone is not enough here
    status, raw = ask(f"https://{HOST}:{port}", mine, "/v3/auth/authenticate", {"name": "root", "password": "x"})
    assert status != 200, raw
    with socket.create_connection((HOST, port), timeout=5) as plain:
        plain.sendall(b"POST /v3/kv/range HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 200 " not in plain.recv(100)


def test_nats_lets_a_node_be_asked_and_answer_and_nothing_else(head: Head, node: Membership) -> None:
    with nats(head, node.identity, node.node, node.password) as one:
        one.sendall(b"SUB scalellm_parrot.generate-1 1\r\nSUB _INBOX.x 2\r\nPING\r\n")
        assert said(one) == "PONG"
        one.sendall(b"PUB scalellm_parrot.generate-1 1\r\nx\r\nPING\r\n")
        assert "Permissions Violation for Publish" in said(one)
    mine = head.guests.plane.network
    assert mine is not None
    with nats(head, mine.identity, mine.user, mine.password) as one:
        one.sendall(b"SUB > 1\r\nPUB scalellm_parrot.generate-1 1\r\nx\r\nPING\r\n")
        assert said(one).startswith("MSG scalellm_parrot.generate-1")
    with nats(head, node.identity, "head", node.password) as one:
        one.sendall(b"PING\r\n")
        assert "Authorization Violation" in said(one)
    stranger = Identity(node.folder / "stranger")
    Authority(node.folder / "other", ENDPOINT).issue(stranger, "n1")
    (node.folder / "stranger" / "ca.pem").write_bytes(head.guests.authority.pem)
    assert answered(head, stranger, node) != "PONG"
    assert answered(head, node.identity, node) == "PONG"


def test_who_is_put_out_is_out(head: Head, tmp_path: Path) -> None:
    gone = head.join("gone", tmp_path / "gone")
    board = gone.board()
    board.put("nodes/gone", {"state": "up"})
    with nats(head, gone.identity, gone.node, gone.password) as one:
        head.guests.put_out("gone")
        with pytest.raises(EndpointError):
            board.put("nodes/gone", {"state": "up"})
        one.settimeout(10)
        assert "Authorization" in said(one) or said(one) == ""
    assert "nodes/gone" not in head.guests.board().read("nodes/")
    assert "gone" not in head.guests.nodes()
    with pytest.raises(RejectedError, match="no node gone"):
        head.guests.put_out("gone")
    assert head.join("gone", tmp_path / "again").board().read("spec") is not None  # with a new token


def test_servers_that_die_come_back_with_what_they_knew(head: Head, node: Membership) -> None:
    ours, theirs = head.guests.board(), node.board()
    ours.put("assigned/n1", {"replicas": [{"name": "r1"}]})
    assert theirs.read("assigned/n1")
    for name, kept in head.kept.items():
        before = kept.pid
        os.kill(before, signal.SIGKILL)
        until(lambda kept=kept, before=before: kept.pid not in (0, before), 20)
        assert name in ("etcd", "nats")

    def reached() -> bool:
        try:
            return theirs.read("assigned/n1") == {"assigned/n1": {"replicas": [{"name": "r1"}]}}
        except EndpointError:
            return False

    until(reached, 20)

    until(lambda: answered(head, node.identity, node) == "PONG", 20)


def test_a_token_lets_one_machine_in_once(head: Head, tmp_path: Path) -> None:
    token = head.guests.token(lives_s=60)
    with pytest.raises(RejectedError, match="is there already"):
        join(token, "n1", tmp_path / "n1")  # the token is not spent on it
    first = join(token, "n2", tmp_path / "n2")
    assert stat.S_IMODE((tmp_path / "n2").stat().st_mode) == 0o700
    assert join(token, "whatever", tmp_path / "n2") == first  # it has joined already
    with pytest.raises(RejectedError, match="not good"):
        join(token, "n3", tmp_path / "n3")
    assert Membership.of(tmp_path / "n3") is None
    with pytest.raises(RejectedError, match="not good"):
        join(Token(token.door, token.endpoint, token.authority, token.name, "guess"), "n3", tmp_path / "n3")
    with pytest.raises(RejectedError, match="not a node's name"):
        join(head.guests.token(lives_s=60), "head", tmp_path / "n3")


def test_a_joining_machine_trusts_nobody_but_the_tokens_endpoint(head: Head, tmp_path: Path) -> None:
    token = head.guests.token(lives_s=60)
    other = Authority(tmp_path / "other", ENDPOINT).fingerprint
    with pytest.raises(RejectedError, match="is not the endpoint of this token"):
        join(Token(token.door, token.endpoint, other, token.name, token.secret), "n4", tmp_path / "n4")
    with pytest.raises(EndpointError, match="cannot be reached"):
        join(Token(f"https://{HOST}:{unused_ports(1)[0]}", "p", other, "n", "s"), "n4", tmp_path / "n4")
    with pytest.raises(RejectedError, match="no https"):
        join(Token("http://127.0.0.1:1", "p", other, "n", "s"), "n4", tmp_path / "n4")


def test_the_door_takes_little_and_says_little(head: Head, node: Membership) -> None:
    url, context = head.guests.token(lives_s=60).door, node.identity.client_context()
    bodies: list[Any] = [None, [], "x", {"node": "n9"}, {"node": 1, "token": "t", "secret": "s", "request": "r"}]
    for body in (*bodies, {"node": "n9", "token": "t", "secret": "s", "request": "r" * MOST_BYTES}):
        status, raw = ask(url, context, "/join", body)
        assert status in (403, 429), raw
        assert b"Traceback" not in raw
    tries = Tries(most=3, in_s=10)
    assert [tries.take("a", now) for now in (0, 1, 2, 3)] == [True, True, True, False]
    assert tries.take("b", 3)
    assert tries.take("a", 10.5)
    assert not tries.take("a", 10.6)


def test_everything_secret_is_its_owners_alone(head: Head, node: Membership) -> None:
    assert stat.S_IMODE(head.guests.folder.stat().st_mode) == 0o700
    for folder in (head.guests.folder, node.folder):
        for file in folder.rglob("*"):
            if (
                file.name in ("password", "tokens.json", "node.json", "nodes.json", "network.json", "nats-users.conf")
                or "key" in file.name
            ):
                assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    opened_again = Guests.open(head.guests.folder, ENDPOINT)
    assert opened_again.addresses == head.guests.addresses
    with pytest.raises(ArtifactError) as found:
        Guests.open(node.folder, ENDPOINT)
    assert "network:" in found.value.hint


def test_a_plane_is_what_its_folder_says(node: Membership, tmp_path: Path) -> None:
    assert Plane.open(tmp_path, ENDPOINT) == Plane(tmp_path, ENDPOINT)
    found = Plane.open(node.discovery, ENDPOINT)
    assert found.network == Network(node.etcd, node.nats, node.identity, node.node, node.password)
    environment = found.environment()
    assert environment["ETCD_ENDPOINTS"].startswith("https://")
    assert environment["NATS_SERVER"].startswith("tls://")
    assert environment["DYN_TCP_RESPONSE_STREAM_HOST"] == "127.0.0.1"
    assert node.password not in json.dumps(environment)
    assert "BEGIN" not in json.dumps(environment)  # keys are not for the programs that a worker starts
    (node.discovery.parent / "broken").mkdir()
    (node.discovery.parent / "broken" / "network.json").write_text("{}")
    with pytest.raises(ArtifactError):
        Plane.open(node.discovery.parent / "broken", ENDPOINT)


def test_what_is_missing_is_told_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_args, **_kw: None)
    with pytest.raises(ToolError) as found:
        servers.find("etcd")
    assert "apt-get install etcd-server nats-server" in found.value.hint


def test_a_port_that_is_taken_is_told(tmp_path: Path, head: Head) -> None:
    taken = head.guests.addresses
    guests = Guests(tmp_path / "second", ENDPOINT, Addresses(HOST, taken.door, taken.etcd, taken.nats, taken.answers))
    with pytest.raises(ScalellmError), serving(guests, Silent()):
        pass
    guests.prepare()
    with pytest.raises(EndpointError, match="door"), opened(guests, Silent()):
        pass


def test_this_machines_name_can_be_a_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gpu-7", "GPU_7.example.org", "127-0-0-1", "x" * 80, "日本"):
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        assert check_node_name(own_name())


def ask(url: str, context: ssl.SSLContext, path: str, body: Any) -> tuple[int, bytes]:
    parts = urlsplit(url)
    connection = http.client.HTTPSConnection(parts.hostname or "", parts.port, context=context, timeout=10)
    try:
        connection.request("POST", path, json.dumps(body).encode())
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@contextlib.contextmanager
def nats(head: Head, identity: Identity, user: str, password: str) -> Iterator[ssl.SSLSocket]:
    """A connection by NATS's own protocol: its greeting is plain, then TLS, then lines."""
    with socket.create_connection((HOST, head.guests.addresses.nats), timeout=10) as raw:
        greeting = json.loads(line(raw).removeprefix("INFO "))
        assert greeting["tls_required"]
        with identity.client_context().wrap_socket(raw, server_hostname=HOST) as connection:
            told = {"verbose": False, "pedantic": False, "tls_required": True, "user": user, "pass": password}
            connection.sendall(f"CONNECT {json.dumps(told)}\r\n".encode())
            yield connection


def answered(head: Head, identity: Identity, node: Membership) -> str:
    """What NATS says to the node's user with this certificate; nothing where it hangs up."""
    try:
        with nats(head, identity, node.node, node.password) as one:
            one.sendall(b"PING\r\n")
            return said(one)
    except OSError:
        return ""


def said(connection: socket.socket) -> str:
    """The server's next word that is not about itself."""
    while (text := line(connection)).startswith(("INFO", "PING")):
        continue
    return text


def line(connection: socket.socket) -> str:
    found = b""
    while not found.endswith(b"\r\n"):
        piece = connection.recv(1)
        if not piece:
            break
        found += piece
    return found.decode().strip()
