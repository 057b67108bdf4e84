"""How a machine becomes a node of an endpoint: its side of the head's door, and what it keeps of it.

It dials out alone. It trusts the authority whose fingerprint its token carries, and nobody else. What it has been given
stays in a folder of its own, so that it need not ask again when it starts again.
"""

from __future__ import annotations

import datetime
import http.client
import json
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from toolchain.errors import ArtifactError, EndpointError, RejectedError
from toolchain.fleet.hosts import renewal
from toolchain.fleet.hosts.etcd import Etcd, EtcdBoard
from toolchain.fleet.hosts.tokens import Token
from toolchain.fleet.plane import Network
from toolchain.fleet.trust import (
    Certificates,
    Identity,
    check_node_name,
    fingerprint,
    make_request,
    trusting,
    write_private,
)

_MOST_BYTES = 64 * 1024
_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Membership:
    """A node's place in an endpoint, kept in ``folder``."""

    folder: Path
    endpoint: str
    node: str
    etcd: str
    nats: str
    password: str
    """For the board and NATS."""

    @property
    def identity(self) -> Identity:
        return Identity(self.folder / "identity")

    @property
    def discovery(self) -> Path:
        """What the node's workers are told."""
        return self.folder / "discovery"

    def board(self, context: ssl.SSLContext | None = None) -> EtcdBoard:
        """``context``: of its identity, for a caller who puts a renewed one into it. Raises ArtifactError."""
        context = context or self.identity.client_context(nameless=True)
        return EtcdBoard(Etcd(self.etcd, context, user=self.node, password=self.password), self.endpoint)

    def keep(self) -> None:
        told = {name: getattr(self, name) for name in _KEPT}
        Network(self.etcd, self.nats, self.identity, self.node, self.password).write(self.discovery)
        write_private(self.folder / _FILE, json.dumps(told).encode())

    @classmethod
    def of(cls, folder: Path) -> Membership | None:
        """None where this machine has not joined. Raises ArtifactError."""
        file = folder / _FILE
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            return cls(folder, **{name: str(told[name]) for name in _KEPT})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{file}: cannot be understood: {error}", hint=f"rm -r {folder}") from error


_FILE = "node.json"
_KEPT = ("endpoint", "node", "etcd", "nats", "password")


def join(token: Token, node: str, folder: Path) -> Membership:
    """Asks the head's door. A machine that has joined this endpoint already keeps its place, and the token is not used;
    its certificate is renewed where it soon runs out. Raises RejectedError, EndpointError, ArtifactError.
    """
    known = Membership.of(folder)
    if known is not None and known.identity.whole and _authority_of(known) == token.authority:
        try:
            renew(known, token.door)
        except EndpointError:
            if renewal.left(known.identity) <= datetime.timedelta():
                raise
        return known
    check_node_name(node)
    door = urlsplit(token.door)
    if door.scheme != "https" or not door.hostname:
        raise RejectedError(f"the token's door, {token.door}, is no https:// address")
    blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # what comes is only believed when its hash is the token's
    blind.check_hostname, blind.verify_mode = False, ssl.CERT_NONE
    authority = _ask(token.door, blind, "GET", "/authority").decode("ascii", "replace")
    if fingerprint(authority) != token.authority:
        raise RejectedError(
            f"{token.door} is not the endpoint of this token: its certificate authority is another one",
            hint="ask for a new token; if it says this again, somebody stands between you and the endpoint",
        )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    identity = Identity(folder / "identity")
    asked = {"node": node, "token": token.name, "secret": token.secret}
    body = {**asked, "request": make_request(identity, node).decode("ascii")}
    raw = _ask(token.door, trusting(authority), "POST", "/join", json.dumps(body).encode())
    with _understood(token.door):
        given: dict[str, Any] = json.loads(raw)
        found = Membership(folder, token.endpoint, *(str(given[name]) for name in _KEPT[1:]))
        identity.write(authority.encode("ascii"), _certificates(given))
    found.keep()
    return found


def renew(known: Membership, door: str, before: datetime.timedelta = renewal.BEFORE) -> bool:
    """Whether the node has a new certificate, of the same key: it asks for one when less than ``before`` is left of
    the present one. Raises RejectedError for a node that was put out, or came too late, EndpointError, ArtifactError.
    """
    identity = known.identity
    if renewal.left(identity) >= before:
        return False
    authority, present = (file.read_text(encoding="ascii") for file in (identity.authority, identity.certificate))
    request = make_request(identity, known.node, again=True).decode("ascii")
    asked = {"node": known.node, "password": known.password, "certificate": present, "request": request}
    try:
        raw = _ask(door, trusting(authority), "POST", "/renew", json.dumps(asked).encode())
    except RejectedError as error:
        revoke = f"scalellm deploy revoke {known.endpoint} {known.node}; scalellm deploy token {known.endpoint}"
        raise RejectedError(
            error.message, hint=f"here: rm -r {known.folder}\non the head's machine: {revoke}"
        ) from error
    with _understood(door):
        identity.write(authority.encode("ascii"), _certificates(json.loads(raw)))
    return True


def own_name() -> str:
    """This machine's name, as a node's."""
    name = re.sub(r"[^a-z0-9-]+", "-", socket.gethostname().partition(".")[0].lower()).strip("-")
    return name[:40] if name[:1].isalpha() else f"node-{name}"[:40].rstrip("-")


@contextmanager
def _understood(door: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        raise EndpointError(f"{door}: its answer cannot be understood: {error}") from error


def _certificates(given: Mapping[str, Any]) -> Certificates:
    return Certificates(*(str(given[name]).encode("ascii") for name in ("certificate", "nameless")))


def _authority_of(known: Membership) -> str:
    return fingerprint(known.identity.authority.read_text(encoding="ascii"))


def _ask(door: str, context: ssl.SSLContext, method: str, path: str, body: bytes | None = None) -> bytes:
    """The body of the door's answer. Raises RejectedError where it refuses, EndpointError."""
    parts = urlsplit(door)
    connection = http.client.HTTPSConnection(parts.hostname or "", parts.port, context=context, timeout=_TIMEOUT_S)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        answer = connection.getresponse()
        raw = answer.read(_MOST_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise EndpointError(
            f"{door} cannot be reached: {error}", hint="is the endpoint up, and does its firewall let this port in?"
        ) from error
    finally:
        connection.close()
    if answer.status == http.HTTPStatus.OK:
        return raw
    try:
        message = str(json.loads(raw)["message"])
    except (ValueError, KeyError, TypeError):
        message = answer.reason
    kind = RejectedError if answer.status < http.HTTPStatus.INTERNAL_SERVER_ERROR else EndpointError
    raise kind(f"{door} refuses: {message}")
