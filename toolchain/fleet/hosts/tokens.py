"""Tokens with which machines join an endpoint: made on the head's machine, kept there as hashes, good for some time.

A token carries the address of the head's door, the endpoint's name, and the fingerprint of its certificate authority,
so that who joins trusts nobody else. It does not know what a node may do.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import ArtifactError, RejectedError
from toolchain.fleet.trust import write_private

_PREFIX = "scalellm-join-"
_SECRET_BYTES = 32
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_MOST_S = 30 * 86400


@dataclass(frozen=True)
class Token:
    """What a person carries from the head to a machine that is to join."""

    door: str
    """https://HOST:PORT"""
    endpoint: str
    authority: str
    """The fingerprint of the endpoint's certificate authority."""
    name: str
    secret: str

    def __str__(self) -> str:
        told = json.dumps([self.door, self.endpoint, self.authority, self.name, self.secret], separators=(",", ":"))
        return _PREFIX + base64.urlsafe_b64encode(told.encode()).decode().rstrip("=")

    @classmethod
    def read(cls, text: str) -> Token:
        """Raises RejectedError; what it says never repeats the token."""
        body = text.strip().removeprefix(_PREFIX)
        try:
            told = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
            found = cls(*told)
        except (binascii.Error, ValueError, TypeError):
            found = None
        if found is None or not text.strip().startswith(_PREFIX) or not all(isinstance(one, str) for one in told):
            raise RejectedError("this is not a token of `scalellm deploy token`", hint="paste the whole line")
        return found


class Tokens:
    """The tokens of one endpoint that are good, in a file. Several processes may use it at once."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def add(self, *, lives_s: float, uses: int = 1) -> tuple[str, str]:
        """A new one's name and secret; the secret is written nowhere."""
        name, secret = secrets.token_hex(4), secrets.token_urlsafe(_SECRET_BYTES)
        with self._opened() as known:
            known[name] = {"sha256": _hash(secret), "expires": time.time() + lives_s, "uses": uses}
        return name, secret

    @contextmanager
    def spending(self, name: str, secret: str) -> Iterator[None]:
        """Uses it once, if the block raises nothing. Raises RejectedError, the same one whatever was wrong."""
        with self._opened() as known:
            found = known.get(name, {"sha256": "", "uses": 0})
            same = hmac.compare_digest(found["sha256"].encode(), _hash(secret).encode())
            if not same or found["uses"] < 1:
                raise RejectedError(
                    "this token is not good: it was used, it has expired, or it is of another endpoint",
                    hint="on the head's machine: scalellm deploy token ENDPOINT",
                )
            found["uses"] -= 1
            if not found["uses"]:
                del known[name]
            yield

    @contextmanager
    def _opened(self) -> Iterator[dict[str, dict[str, Any]]]:
        """The tokens that have not expired; what was changed is written, unless an error is raised."""
        self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._file.with_suffix(".lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                found = json.loads(self._file.read_text(encoding="ascii")) if self._file.exists() else {}
                known = {name: one for name, one in found.items() if one["expires"] > time.time()}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ArtifactError(f"{self._file}: not a list of tokens: {error}", hint="remove it") from error
            yield known
            write_private(self._file, json.dumps(known).encode())


def seconds_of(text: str) -> float:
    """``30m``, ``1h``, ``2d`` -> seconds, at most 30 days. Raises RejectedError."""
    found = re.fullmatch(r"(\d{1,9})([smhd])", text.strip())
    seconds = int(found[1]) * _UNIT_S[found[2]] if found else 0
    if not 0 < seconds <= _MOST_S:
        raise RejectedError(f"{text!r} is not a time such as 30m, 1h or 2d, at most 30d")
    return float(seconds)


def _hash(secret: str) -> str:
    """A plain hash is enough: the secret is random, 256 bits of it, not a person's word."""
    return hashlib.sha256(secret.encode(errors="replace")).hexdigest()
