"""API keys: a file of their hashes, and who may come in how often.

    [{"name": "alice", "sha256": "...", "created": "...", "requests_per_minute": 60, "concurrent": 8}]

A key is 256 random bits, so one round of SHA-256 protects it: there is nothing to guess. The file is read again when it
changes, so that a removed key stops working at once. What it holds opens nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from toolchain import workspace
from toolchain.errors import ArtifactError, RecipeError
from toolchain.gateway.failures import ApiError, too_many

_PREFIX = "sk-scalellm-"


@dataclass(frozen=True)
class Key:
    """What is known of a key. Limits of None are none."""

    name: str
    sha256: str
    created: str
    requests_per_minute: float | None = None
    concurrent: int | None = None


def add(file: Path, name: str, *, requests_per_minute: float | None = None, concurrent: int | None = None) -> str:
    """A new key, which only its owner will know from now on. Raises RecipeError where the name is taken."""
    keys = read(file)
    if any(key.name == name for key in keys):
        raise RecipeError(f"{file}: there is a key named {name!r}", hint=f"scalellm gateway keys remove {name}")
    secret = _PREFIX + secrets.token_urlsafe(32)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    _write(file, [*keys, Key(name, _hash(secret), created, requests_per_minute, concurrent)])
    return secret


def remove(file: Path, name: str) -> None:
    """Raises RecipeError where there is no such key."""
    keys = read(file)
    left = [key for key in keys if key.name != name]
    if len(left) == len(keys):
        known = ", ".join(key.name for key in keys) or "none"
        raise RecipeError(f"{file}: there is no key named {name!r}", hint=f"known: {known}")
    _write(file, left)


def read(file: Path) -> list[Key]:
    """The keys of a file; none where there is no file. Raises ArtifactError for a file that is not one of keys."""
    try:
        return [Key(**one) for one in json.loads(file.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{file}: not a file of keys: {error}", hint="scalellm gateway keys add NAME") from error


class Doorkeeper:
    """Asks for a key where the file holds any. ``None`` as a file: for nobody's."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._seen: tuple[int, int] | None = None
        self._keys: list[Key] = []
        self._buckets: dict[str, _Bucket] = {}
        self._inside: dict[str, int] = {}
        self._look()

    def admit(self, authorization: str | None, *, counted: bool = True) -> Key | None:
        """The key in an ``Authorization`` header; None where none is asked for. Raises ApiError: 401, or 429.

        Not ``counted``: a look at the endpoint, which takes nothing of what the key may ask in a minute.
        """
        self._look()
        if not self._keys:
            return None
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise _unauthorized("there is no API key in this request: send the header 'Authorization: Bearer KEY'")
        given, found = _hash(secret.strip()), None
        for key in self._keys:  # all of them: the time must not tell which one was nearly right
            if hmac.compare_digest(key.sha256.encode(), given.encode()):
                found = key
        if found is None:
            raise _unauthorized("this API key is not known here")
        if counted:
            self._count(found)
        return found

    def enter(self, key: Key | None) -> None:
        """One more request of this key at work. Raises ApiError (429)."""
        if key is None:
            return
        inside = self._inside.get(key.name, 0)
        if key.concurrent is not None and inside >= key.concurrent:
            raise too_many(f"this API key may have {key.concurrent} requests at work at a time", retry_after_s=1)
        self._inside[key.name] = inside + 1

    def leave(self, key: Key | None) -> None:
        """One less."""
        if key is not None:
            self._inside[key.name] -= 1

    def _count(self, key: Key) -> None:
        if key.requests_per_minute is None:
            return
        bucket = self._buckets.setdefault(key.name, _Bucket(key.requests_per_minute))
        wait_s = bucket.take()
        if wait_s > 0:
            raise too_many(f"this API key may send {key.requests_per_minute:g} requests a minute", retry_after_s=wait_s)

    def _look(self) -> None:
        """Read the file again if it has changed; a file that became unreadable closes the door, not opens it."""
        if self._file is None:
            return
        try:
            stat = self._file.stat()
            now = (stat.st_mtime_ns, stat.st_ino)
        except OSError:
            if self._seen is not None:
                raise _unauthorized("the file of API keys cannot be read") from None
            return
        if now != self._seen:
            keys = _readable(self._file)
            if not keys and self._keys:  # the last key was removed: that must not open the door for everyone
                keys = [Key("", "", "")]
            self._seen, self._keys = now, keys
            self._buckets.clear()


class _Bucket:
    """Tokens for requests: a minute's worth at most, refilled all the time."""

    def __init__(self, per_minute: float) -> None:
        self._rate, self._most = per_minute / 60, max(1.0, per_minute)
        self._left, self._at = self._most, time.monotonic()

    def take(self) -> float:
        """0 when there was one, else the seconds until there will be."""
        now = time.monotonic()
        self._left = min(self._most, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1:
            return (1 - self._left) / self._rate
        self._left -= 1
        return 0


def _readable(file: Path) -> list[Key]:
    try:
        return read(file)
    except ArtifactError:
        raise _unauthorized("the file of API keys cannot be read") from None


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key")


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _write(file: Path, keys: list[Key]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    workspace.write_durably(temporary, (json.dumps([asdict(key) for key in keys], indent=2) + "\n").encode())
    temporary.chmod(0o600)
    temporary.replace(file)
