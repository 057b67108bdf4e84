"""One record of a ledger, its canonical text, and its hash.

A record is one JSON object: keys in the order of their code points, no white space, ASCII only (other characters as
``\\uXXXX``), numbers as integers, amounts of money as decimal strings. Its hash is the SHA-256 of that text, in lower
case hexadecimals, and the text names the hash of the record before it: so the last hash vouches for all of them, and
anyone can check it with ``sha256sum``. Two kinds:

    {"created_ms", "currency", "endpoint", "format", "kind": "genesis", "number": 1, "previous": "000..."}
    {"begin_ms", "continued", "device", "earned", "end_ms", "gpu_ms", "gpus", "kind": "usage", "node", "node_ms",
     "number", "previous", "price_per_hour", "provider", "replica", "requests", "tokens_in", "tokens_out"}

Times are milliseconds since 1970 (UTC). ``earned`` = node_ms x price_per_hour / 3 600 000, rounded half to even to
twelve decimals; ``gpu_ms`` is the time in which the replica was ready, times its GPUs: a third of one for one of three
services. Money is Decimal everywhere, never a binary fraction.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Context, Decimal, InvalidOperation
from typing import Any

FORMAT = 1
CURRENCY = "USD"
GENESIS, USAGE = "genesis", "usage"
NOTHING = "0" * 64
"""What the first record names as the hash before it."""
_STEP = Decimal("1e-12")
_MS_PER_HOUR = Decimal(3_600_000)
_EXACT = Context(prec=60, rounding=ROUND_HALF_EVEN)
_GENESIS_KEYS = frozenset({"created_ms", "currency", "endpoint", "format", "kind", "number", "previous"})
_TEXTS = ("provider", "node", "device", "replica")
_COUNTS = ("gpus", "node_ms", "gpu_ms", "requests", "tokens_in", "tokens_out", "continued")


@dataclass(frozen=True)
class Usage:
    """What one replica did within one interval."""

    begin_ms: int
    end_ms: int
    provider: str
    """Who is paid."""
    node: str
    device: str
    replica: str
    gpus: int
    """Of the node; 0 on a CPU."""
    node_ms: int
    """The node's time that counts for this replica: replicas that are ready at once share it equally."""
    price_per_hour: Decimal
    """US dollars for the whole node."""
    gpu_ms: int = 0
    """GPU time of the replica, by its part of the node's GPUs, whoever else is ready."""
    requests: int = 0
    """Answers that began here."""
    tokens_in: int = 0
    """Of the prompts of those."""
    tokens_out: int = 0
    continued: int = 0
    """Answers that began elsewhere and went on here."""

    @property
    def earned(self) -> Decimal:
        exact = _EXACT.divide(_EXACT.multiply(Decimal(self.node_ms), self.price_per_hour), _MS_PER_HOUR)
        return _EXACT.quantize(exact, _STEP)

    def fields(self) -> dict[str, Any]:
        """As they stand in the record."""
        counts = {name: getattr(self, name) for name in (*_TEXTS, *_COUNTS)}
        money = {"price_per_hour": plain(self.price_per_hour), "earned": plain(self.earned)}
        times = {"begin_ms": self.begin_ms, "end_ms": self.end_ms}
        return {**counts, **money, **times}

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Usage:
        """From the fields of a record. Raises ValueError where they are not what this module writes."""
        try:
            usage = cls(
                begin_ms=found["begin_ms"],
                end_ms=found["end_ms"],
                price_per_hour=Decimal(found["price_per_hour"]),
                **{name: found[name] for name in (*_TEXTS, *_COUNTS)},
            )
        except (KeyError, TypeError, InvalidOperation) as error:
            raise ValueError(f"not a record of usage: {error!r}") from None
        usage.check()
        told, expected = {**found}, usage.fields()
        for name in ("kind", "number", "previous"):
            told.pop(name, None)
        if told != expected:
            wrong = sorted(name for name in told | expected if told.get(name) != expected.get(name))
            raise ValueError(f"its fields contradict each other: {', '.join(wrong)}")
        return usage

    def check(self) -> None:
        """Raises ValueError for what cannot be."""
        for name in _TEXTS:
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}: not a text")
        for name in (*_COUNTS, "begin_ms", "end_ms"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ValueError(f"{name}: not a whole number from 0 on: {value!r}")
        if self.end_ms < self.begin_ms:
            raise ValueError("it ends before it begins")
        if self.gpu_ms and not self.gpus:
            raise ValueError("gpu_ms: of a node without a GPU")
        if not self.price_per_hour.is_finite() or self.price_per_hour < 0:
            raise ValueError(f"price_per_hour: not a price: {self.price_per_hour}")


@dataclass(frozen=True)
class Head:
    """The newest record: whoever keeps this can tell later whether anything up to it was changed or cut off."""

    number: int
    hash: str

    def __str__(self) -> str:
        return f"{self.number}:{self.hash}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """``NUMBER:HASH``. Raises ValueError."""
        number, colon, found = text.strip().partition(":")
        if not (colon and number.isascii() and number.isdigit() and int(number) and is_hash(found)):
            raise ValueError(f"not a head, which is NUMBER:HASH: {text!r}")
        return cls(int(number), found)


def is_hash(text: object) -> bool:
    return isinstance(text, str) and len(text) == 64 and set(text) <= set("0123456789abcdef")


def genesis(endpoint: str, created_ms: int) -> dict[str, Any]:
    """The fields of the first record, but for its number and what is before it."""
    return {"kind": GENESIS, "endpoint": endpoint, "created_ms": created_ms, "format": FORMAT, "currency": CURRENCY}


def body_of(fields: Mapping[str, Any], number: int, previous: str) -> str:
    """The canonical text of a record."""
    return canonical({**fields, "number": number, "previous": previous})


def canonical(found: Mapping[str, Any]) -> str:
    return json.dumps(found, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def hash_of(body: str) -> str:
    """Also of a text that is no record any more."""
    return hashlib.sha256(body.encode(errors="surrogatepass")).hexdigest()


def parse(body: str) -> dict[str, Any]:
    """The fields of a canonical text. Raises ValueError for what this module does not write."""
    found = json.loads(body)
    if not isinstance(found, dict) or canonical(found) != body:
        raise ValueError("not the canonical text of a record")
    if type(found.get("number")) is not int or not is_hash(found.get("previous")):
        raise ValueError("it does not say its number and what is before it")
    if found.get("kind") == GENESIS:
        if found.keys() != _GENESIS_KEYS or found["format"] != FORMAT or not isinstance(found["endpoint"], str):
            raise ValueError(f"not a first record of format {FORMAT}")
    elif found.get("kind") == USAGE:
        Usage.of(found)
    else:
        raise ValueError(f"a record of an unknown kind: {found.get('kind')!r}")
    return found


def plain(amount: Decimal) -> str:
    """Without an exponent and without zeros at the end: ``0.44``, ``0``."""
    text = f"{amount:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("", "-0") else text
