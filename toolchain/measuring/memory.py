"""The memory of servers on this machine while they are measured: RSS of their processes, and what is used of each GPU.

A server is found by the port that it listens on; its children count, its parent does not. RSS is summed over the
processes, so pages that several share count once for each: an upper bound, and the only figure that costs a server
nothing to ask (PSS walks its page tables). A server elsewhere is not looked at. It knows no load and no prompts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import psutil

from toolchain import gpu
from toolchain.measuring.report import MemorySample, Watched

EVERY_S = 0.5
_LOOK_AGAIN_S = 5.0
"""Between two looks at who the children are: that reads every process of the machine."""

_GPU_EVERY_S = 2.0
"""Without NVML's package this starts nvidia-smi; samples between have what was seen last."""


def listener(url: str) -> int | None:
    """The process that listens at ``host:port`` or ``http://host:port`` on this machine; None where there is none.

    Of several with one port (workers of a web server), the oldest.
    """
    parts = urlsplit(url if "://" in url else f"//{url}")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if not _is_here(parts.hostname or ""):
        return None
    with suppress(psutil.Error, OSError):
        found = {
            one.pid
            for one in psutil.net_connections("tcp")
            if one.pid and one.status == psutil.CONN_LISTEN and one.laddr.port == port
        }
        return min(found, key=_born) if found else None
    return None


def _is_here(host: str) -> bool:
    """Whether an address is one of this machine's; names but localhost are not asked for."""
    own = {entry.address.partition("%")[0] for entries in psutil.net_if_addrs().values() for entry in entries}
    return host == "localhost" or host in own


def _born(pid: int) -> float:
    with suppress(psutil.Error):
        return float(psutil.Process(pid).create_time())
    return float("inf")


class Watch:
    """Looks every ``every_s`` between its beginning and its end, and at both."""

    def __init__(self, urls: Sequence[str], every_s: float = EVERY_S) -> None:
        found = [pid for pid in map(listener, urls) if pid is not None]
        self._roots = list(dict.fromkeys(found)) if len(found) == len(urls) else []
        self._every_s = every_s
        self._seen: list[tuple[float, int | None, tuple[int, ...]]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._processes: list[psutil.Process] = []
        self._gpus = _used_gpus() if self._roots else ()

    @property
    def watched(self) -> Watched | None:
        """Who is looked at; None for servers that are not here."""
        if not self._roots:
            return None
        self._processes = self._processes or self._tree()
        names = sorted(_name(one) for one in self._processes)
        return Watched(processes=tuple(names), gpus=tuple(name for name, _ in self._gpus), every_s=self._every_s)

    def __enter__(self) -> Self:
        if self._roots:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def samples(self, zero: float) -> tuple[MemorySample, ...]:
        """What was seen from ``zero`` (``time.perf_counter()``) on."""
        return tuple(
            MemorySample(at_s=round(at - zero, 3), rss_bytes=rss, gpu_bytes=gpus)
            for at, rss, gpus in self._seen
            if at >= zero
        )

    def _look(self) -> None:
        looked, asked, used = -_LOOK_AGAIN_S, -_GPU_EVERY_S, tuple[int, ...]()
        ended = False
        while True:
            now = time.perf_counter()
            if now - looked >= _LOOK_AGAIN_S:
                self._processes, looked = self._tree(), now
            if self._gpus and now - asked >= _GPU_EVERY_S:
                used, asked = tuple(amount for _, amount in _used_gpus()), now
            self._seen.append((now, _rss_bytes(self._processes), used))
            if ended:  # the last look is at the end, so that the shortest run has one
                return
            ended = self._ended.wait(self._every_s)

    def _tree(self) -> list[psutil.Process]:
        found: dict[int, psutil.Process] = {}
        for root in self._roots:
            with suppress(psutil.Error):
                process = psutil.Process(root)
                found |= {one.pid: one for one in (process, *process.children(recursive=True))}
        return list(found.values())


def _rss_bytes(processes: Sequence[psutil.Process]) -> int | None:
    """None where none of them lives."""
    total, living = 0, False
    for one in processes:
        with suppress(psutil.Error):
            total, living = total + int(one.memory_info().rss), True
    return total if living else None


def _name(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return str(process.name())
    return "?"


def _used_gpus() -> tuple[tuple[str, int], ...]:
    """(name, bytes that are used) of each GPU that says it, whoever uses them."""
    return tuple(
        (one.name, one.total_bytes - one.free_bytes)
        for one in gpu.gpus()
        if one.total_bytes is not None and one.free_bytes is not None
    )
