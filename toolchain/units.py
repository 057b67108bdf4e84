"""Sizes and durations as people write them. GiB is 2^30 bytes and GB is 10^9: the two are never mixed."""

from __future__ import annotations

import re

KIB = 2**10
MIB = 2**20
GIB = 2**30

_UNITS = {"": 1, "b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*$")


def parse_bytes(text: str | int) -> int:
    """``"8GiB"`` -> 8589934592, ``"8GB"`` -> 8000000000, ``"512"`` -> 512. Raises ValueError for anything else."""
    if isinstance(text, int):
        return text
    match = _SIZE.match(text)
    if not match or match[2].lower() not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write it as 8GiB, 512MiB or 26GB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def parse_seconds(text: str) -> float:
    """``"50ms"`` -> 0.05, ``"1s"`` or ``"1"`` -> 1.0. Raises ValueError for anything else, and for 0."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|)\s*", text)
    seconds = float(match[1]) / (1000 if match[2] == "ms" else 1) if match else 0.0
    if not seconds:
        raise ValueError(f"{text!r} is not a duration; write it as 50ms or 1.5s")
    return seconds


def format_bytes(count: int) -> str:
    """13340000000 -> ``"12.42 GiB"``; binary units throughout."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def format_count(count: int) -> str:
    """13015864320 -> ``"13.02 billion"``, 524288 -> ``"0.52 million"``."""
    return f"{count / 1e9:.2f} billion" if count >= 10**9 else f"{count / 1e6:.2f} million"


def format_seconds(seconds: float) -> str:
    """0.0421 -> ``"42 ms"``, 3.14159 -> ``"3.1 s"``, 127 -> ``"2 min 07 s"``."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def milliseconds(seconds: float) -> str:
    """A measured latency: 0.0421 -> ``"42.1 ms"``, 3.14159 -> ``"3.14 s"``."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"
