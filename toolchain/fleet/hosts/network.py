"""The head's side of an endpoint over many hosts: its servers, who may come, and who must go.

One folder of the head's machine holds all of it, readable by its owner alone: the certificate authority, the head's own
certificates and password, etcd's data, the tokens, and the list of nodes. ``Guests`` works on it from any process of
that machine; ``serving`` runs the servers. Nothing here starts a replica.
"""

from __future__ import annotations

import fcntl
import hmac
import json
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from toolchain import runner
from toolchain.errors import ArtifactError, RejectedError
from toolchain.fleet.hosts import renewal, servers
from toolchain.fleet.hosts.etcd import Etcd, EtcdBoard, guard, let_in, put_out
from toolchain.fleet.hosts.tokens import Token, Tokens
from toolchain.fleet.plane import NAMESPACE, Network, Plane
from toolchain.fleet.trust import HEAD, SERVER, Authority, Certificates, Identity, write_private
from toolchain.progress import Progress


@dataclass(frozen=True)
class Addresses:
    """What the head listens on: one address of its own, under which nodes reach it, and four ports."""

    host: str
    door: int
    etcd: int
    nats: int
    answers: int
    names: tuple[str, ...] = ()
    """Further names and addresses of it, for its certificate."""


DYNAMO = tuple(f"v1/{kind}/{NAMESPACE}/" for kind in ("instances", "mdc"))
"""Where Dynamo keeps workers and their models in etcd (seen with 1.6.1). An etcd is one endpoint's alone."""
NATS_MAY = {"subscribe": {"allow": ["*.>", "$SRV.>"]}, "publish": {"allow": ["_INBOX.>"]}}
"""What a node may do: be asked, and answer. Dynamo names subjects by leases, not by nodes."""


class Guests:
    """Who is let in. Usable by any process of the head's machine."""

    def __init__(self, folder: Path, endpoint: str, addresses: Addresses) -> None:
        self.folder, self.endpoint, self.addresses = folder, endpoint, addresses
        self.tokens = Tokens(folder / "tokens.json")

    @classmethod
    def open(cls, folder: Path, endpoint: str) -> Guests:
        """Of an endpoint that runs, or did. Raises ArtifactError."""
        try:
            told = json.loads((folder / "addresses.json").read_text(encoding="utf-8"))
            return cls(folder, endpoint, Addresses(**{**told, "names": tuple(told["names"])}))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"no endpoint {endpoint} of this machine is open to other machines ({error})",
                hint="name its address in DEPLOYMENT.yaml:  network: {host: ADDRESS}",
            ) from error

    def prepare(self) -> None:
        """Everything that is kept between two runs, where it is not there yet. Raises ToolError."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        told = {name: getattr(self.addresses, name) for name in Addresses.__dataclass_fields__}
        write_private(self.folder / "addresses.json", json.dumps(told).encode())
        hosts = (self.addresses.host, "127.0.0.1", "localhost", *self.addresses.names)
        self.authority.issue(self.server, SERVER, hosts=hosts)
        self.authority.issue(self.head, HEAD, hosts=hosts)  # the front takes workers' answers
        if not self._password_file.exists():
            write_private(self._password_file, secrets.token_urlsafe(32).encode())
        self._tell_nats(self._nodes())

    @cached_property
    def authority(self) -> Authority:
        return Authority(self.folder / "authority", self.endpoint)

    @property
    def server(self) -> Identity:
        """Of etcd, NATS and the door."""
        return Identity(self.folder / "server")

    @property
    def head(self) -> Identity:
        """Of the head as a client, and of the front."""
        return Identity(self.folder / "head")

    @property
    def urls(self) -> dict[str, str]:
        """What a node dials."""
        host = self.addresses.host
        return {"etcd": f"https://{host}:{self.addresses.etcd}", "nats": f"tls://{host}:{self.addresses.nats}"}

    @property
    def plane(self) -> Plane:
        """The front's."""
        answers = (self.addresses.host, self.addresses.answers)
        network = Network(**self.urls, identity=self.head, user=HEAD, password=self._password, answers=answers)
        return Plane(self.folder, self.endpoint, network)

    def etcd(self, *, known: bool = True) -> Etcd:
        """As the head; not ``known``: before etcd checks who asks."""
        user, password = (HEAD, self._password) if known else ("", "")
        return Etcd(self.urls["etcd"], self.head.client_context(nameless=True), user=user, password=password)

    def guard(self) -> None:
        """A new etcd is told whom it may trust. Raises EndpointError."""
        guard(self.etcd(known=False), HEAD, self._password)

    def board(self) -> EtcdBoard:
        return EtcdBoard(self.etcd(), self.endpoint)

    def token(self, *, lives_s: float, uses: int = 1) -> Token:
        """A new one, good for ``uses`` machines."""
        name, secret = self.tokens.add(lives_s=lives_s, uses=uses)
        door = f"https://{self.addresses.host}:{self.addresses.door}"
        return Token(door, self.endpoint, self.authority.fingerprint, name, secret)

    def nodes(self) -> list[str]:
        """Who has been let in and not been put out."""
        return sorted(self._nodes())

    def let_in(self, node: str, request: bytes) -> dict[str, Any]:
        """What a node is given for its request for a certificate. Raises RejectedError, EndpointError."""
        certificates, password = self.authority.sign(request, node), secrets.token_urlsafe(32)
        with self._listed() as nodes:
            if node in nodes:
                raise RejectedError(f"a node named {node} is there already", hint="scalellm deploy join --name NAME")
            let_in(self.etcd(), node, password, self.endpoint, DYNAMO)
            nodes[node] = {"since": round(time.time()), "password": password}
            self._tell_nats(nodes)
        return {"node": node, **_told(certificates), "password": password, **self.urls}

    def renew(self, node: str, password: str, certificate: bytes, request: bytes) -> dict[str, Any]:
        """A new certificate for a node that shows its present one. Raises RejectedError."""
        with self._listed() as nodes:
            known = nodes.get(node, {"password": ""})["password"]
            if not known or not hmac.compare_digest(known.encode(), password.encode(errors="replace")):
                raise RejectedError(f"{node} is no node of this endpoint, or no more")
            renewal.check(self.authority, node, certificate, request)
            return {"node": node, **_told(self.authority.sign(request, node))}

    def put_out(self, node: str) -> None:
        """It is known no more, and what it runs is asked no more. Raises RejectedError, EndpointError."""
        with self._listed() as nodes:
            if nodes.pop(node, None) is None:
                raise RejectedError(
                    f"no node {node} has joined", hint=f"there are: {', '.join(sorted(nodes)) or 'none'}"
                )
            etcd = self.etcd()
            said = EtcdBoard(etcd, self.endpoint).read(f"nodes/{node}").get(f"nodes/{node}", {})
            put_out(etcd, node, self.endpoint, DYNAMO, _instances(said))
            self._tell_nats(nodes)

    def _nodes(self) -> dict[str, Any]:
        file = self.folder / "nodes.json"
        try:
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            return found
        except ValueError as error:
            raise ArtifactError(f"{file}: not a list of nodes: {error}") from error

    @contextmanager
    def _listed(self) -> Iterator[dict[str, Any]]:
        """The list of nodes, kept as it is left unless an error is raised."""
        with (self.folder / "nodes.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            nodes = self._nodes()
            yield nodes
            write_private(self.folder / "nodes.json", json.dumps(nodes).encode())

    def _tell_nats(self, nodes: Mapping[str, Mapping[str, Any]]) -> None:
        """Writes its users, and tells the server, where it runs."""
        users: list[dict[str, Any]] = [{"user": HEAD, "password": self._password}]
        for node, one in nodes.items():
            users.append({"user": node, "password": one["password"], "permissions": NATS_MAY})
        servers.write_nats_users(self.folder, users)
        if (pid := self.folder / servers.NATS_PID).exists():
            runner.run([servers.find("nats-server"), "--signal", f"reload={pid}"], check=False, timeout_s=10)

    @property
    def _password(self) -> str:
        return self._password_file.read_text(encoding="ascii")

    @property
    def _password_file(self) -> Path:
        return self.folder / "password"


def _told(certificates: Certificates) -> dict[str, str]:
    return {"certificate": certificates.named.decode("ascii"), "nameless": certificates.nameless.decode("ascii")}


def _instances(said: dict[str, Any]) -> list[str]:
    return [str(one["instance"]) for one in said.get("replicas", []) if one.get("instance")]


@contextmanager
def serving(guests: Guests, progress: Progress) -> Iterator[dict[str, servers.Kept]]:
    """etcd and NATS, for the length of a ``with`` block. Raises ToolError, EndpointError."""
    for program in ("etcd", "nats-server"):
        servers.find(program)
    guests.prepare()
    at, folder = guests.addresses, guests.folder
    found = {
        "etcd": servers.etcd(folder / "etcd", (at.host, at.etcd), guests.server, progress),
        "nats": servers.nats(folder, (at.host, at.nats), guests.server, progress),
    }
    try:
        for one in found.values():
            one.start()
        guests.guard()
        yield found
    finally:
        for one in reversed(found.values()):
            one.stop()
