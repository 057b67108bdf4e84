"""The board in etcd, for an endpoint over many hosts; and who may do what there.

It speaks the JSON that etcd itself serves beside gRPC (https://etcd.io/docs/v3.4/dev-guide/api_grpc_gateway/, read
2026-11-22): some short requests a second need no library, and those on PyPI either know no user and password (etcd3gw
2.7) or bring generated gRPC code of their own. That door wants a user and a password, and refuses a certificate that
names somebody (measured with 3.4.23); gRPC, which Dynamo speaks, takes a certificate's name for the user.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import math
import ssl
import threading
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

from toolchain.errors import EndpointError, RejectedError

_UNAUTHENTICATED = 16  # https://grpc.github.io/grpc/core/md_doc_statuscodes.html
_OLD = "revision of auth store is old"
_READ, _READWRITE = "READ", "READWRITE"
ROOT = "root"
"""The user that etcd demands before it checks anybody."""


class AnswerError(Exception):
    """etcd's refusal: its gRPC code and its words."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class Etcd:
    """One etcd, asked by one user. May be used by several threads."""

    def __init__(
        self, url: str, context: ssl.SSLContext, *, user: str = "", password: str = "", timeout_s: float = 5.0
    ) -> None:
        self.url = url
        self._user, self._password, self._token = user, password, ""
        parts = urlsplit(url)
        self._connection = http.client.HTTPSConnection(
            parts.hostname or "", parts.port, context=context, timeout=timeout_s
        )
        self._lock = threading.Lock()

    def call(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """``path`` is what follows /v3/. Raises EndpointError where etcd cannot be reached or refuses."""
        try:
            return self.ask(path, body)
        except AnswerError as error:
            who = f" ({self._user})" if self._user else ""
            raise EndpointError(f"{self.url} refuses {path}{who}: {error}") from None

    def ask(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """As ``call``; a refusal of etcd raises AnswerError."""
        with self._lock:
            try:
                if self._user and not self._token:
                    self._log_in()
                try:
                    return self._post(path, body)
                except AnswerError as error:
                    if not self._user or (error.code != _UNAUTHENTICATED and _OLD not in str(error)):
                        raise
                self._log_in()  # it forgets who asked when it starts again, after some minutes, and with a new user
                return self._post(path, body)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self._connection.close()
                raise EndpointError(f"{self.url} cannot be reached: {error}") from error

    def _log_in(self) -> None:
        self._token = ""
        self._token = self._post("auth/authenticate", {"name": self._user, "password": self._password})["token"]

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", **({"Authorization": self._token} if self._token else {})}
        raw = json.dumps(body).encode()
        fresh = self._connection.sock is None
        try:
            self._connection.request("POST", f"/v3/{path}", raw, headers)
            answer = self._connection.getresponse()
        except (OSError, http.client.HTTPException):
            self._connection.close()
            if fresh:
                raise
            self._connection.request("POST", f"/v3/{path}", raw, headers)  # the kept connection had ended
            answer = self._connection.getresponse()
        found: dict[str, Any] = json.loads(answer.read())
        if answer.status != http.HTTPStatus.OK:
            raise AnswerError(
                int(found.get("code", 0)), str(found.get("message") or found.get("error") or answer.reason)
            )
        return found

    def close(self) -> None:
        with self._lock:
            self._connection.close()


class EtcdBoard:
    """Satisfies ``board.Board``: an endpoint's board under a prefix of its own."""

    def __init__(self, etcd: Etcd, endpoint: str) -> None:
        self._etcd, self._root = etcd, board_root(endpoint)

    def put(self, key: str, value: Mapping[str, Any], *, ttl_s: float | None = None) -> None:
        """A value with a ttl has a lease of its own, and a new one each time; the lease before it runs out unused."""
        lease = {}
        if ttl_s is not None:
            lease = {"lease": self._etcd.call("lease/grant", {"TTL": math.ceil(ttl_s)})["ID"]}
        raw = json.dumps(dict(value), separators=(",", ":"))
        self._etcd.call("kv/put", {"key": _b64(self._root + key), "value": _b64(raw), **lease})

    def read(self, prefix: str) -> dict[str, dict[str, Any]]:
        found = self._etcd.call("kv/range", _range(self._root + prefix))
        try:
            values = {
                _text(one["key"]).removeprefix(self._root): json.loads(_text(one["value"])) for one in _all(found)
            }
        except (ValueError, KeyError) as error:
            raise EndpointError(f"{self._etcd.url}: not a board's value under {self._root}{prefix}: {error}") from error
        return dict(sorted(values.items()))

    def remove(self, key: str) -> None:
        self._etcd.call("kv/deleterange", {"key": _b64(self._root + key)})

    def close(self) -> None:
        self._etcd.close()


def board_root(endpoint: str) -> str:
    """What an endpoint's keys begin with."""
    return f"scalellm/{endpoint}/"


def guard(etcd: Etcd, head: str, password: str) -> None:
    """A new etcd checks users from now on: ``root`` and the head, who may do everything, with one password. One that
    checks them already is left as it is. Raises EndpointError.
    """
    try:
        if etcd.ask("auth/user/list", {}).get("users"):
            return
    except AnswerError:  # it checks already
        return
    with contextlib.suppress(AnswerError):
        etcd.ask("auth/role/add", {"name": ROOT})
    for user in (ROOT, head):
        etcd.call("auth/user/add", {"name": user, "password": password})
        etcd.call("auth/user/grant", {"user": user, "role": ROOT})
    etcd.call("auth/enable", {})


def let_in(etcd: Etcd, node: str, password: str, endpoint: str, dynamo: Iterable[str]) -> None:
    """A user for a node. On the board it may write what it says of itself, and read what is wanted; under ``dynamo``,
    the prefixes of Dynamo's keys, it may do everything: Dynamo names its keys by leases, not by nodes.
    Raises RejectedError where the name is taken, EndpointError.
    """
    root = board_root(endpoint)
    try:
        etcd.ask("auth/user/add", {"name": node, "password": password})
    except AnswerError as error:
        raise RejectedError(f"a node named {node} is there already", hint="scalellm deploy join --name NAME") from error
    with contextlib.suppress(AnswerError):  # of a node that was there before
        etcd.ask("auth/role/delete", {"role": node})
    etcd.call("auth/role/add", {"name": node})
    ranges = [(_READ, _range(root + "spec")), (_READ, _range(f"{root}assigned/{node}"))]
    ranges.append((_READWRITE, {"key": _b64(f"{root}nodes/{node}")}))
    ranges.append((_READ, _range("v1/")))  # who registers asks first who has
    ranges.extend((_READWRITE, _range(prefix)) for prefix in dynamo)
    for kind, what in ranges:
        etcd.call("auth/role/grant", {"name": node, "perm": {"permType": kind, **what}})
    etcd.call("auth/user/grant", {"user": node, "role": node})


def put_out(etcd: Etcd, node: str, endpoint: str, dynamo: Iterable[str], instances: Iterable[str]) -> None:
    """The node's user, what it said of itself, and its workers' registrations (``instances``, as Dynamo numbers them)
    go. Raises EndpointError.
    """
    for path, body in (("auth/user/delete", {"name": node}), ("auth/role/delete", {"role": node})):
        try:
            etcd.ask(path, body)
        except AnswerError:  # it is gone already
            continue
    EtcdBoard(etcd, endpoint).remove(f"nodes/{node}")
    wanted = frozenset(instances)
    for prefix in dynamo:
        for one in _all(etcd.call("kv/range", {**_range(prefix), "keys_only": True})):
            if _text(one["key"]).rpartition("/")[2] in wanted:
                etcd.call("kv/deleterange", {"key": one["key"]})


def _range(prefix: str) -> dict[str, str]:
    """Every key that begins with ``prefix``: up to the prefix with its last byte one higher, as etcd wants it."""
    raw = prefix.encode()
    return {"key": _b64(prefix), "range_end": base64.b64encode(raw[:-1] + bytes([raw[-1] + 1])).decode()}


def _all(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    values: list[dict[str, Any]] = found.get("kvs", [])
    return values


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _text(raw: str) -> str:
    return base64.b64decode(raw).decode()
