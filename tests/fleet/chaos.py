"""An endpoint over hosts, streams through it, and what is done to it meanwhile. For the chaos test and its script."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import openai
import psutil

from tests.fleet.endpoint import until
from tests.fleet.head_process import ENDPOINT, PORTS
from tests.fleet.hosts import HEAD_ADDRESS, Host, hosts
from toolchain import runner

ROOM = {"a": 2, "b": 1, "c": 1}
REPLICAS = sum(ROOM.values())
STREAMS = 16
PROMPT = "Count with me:"
_WORKER, _TRITON, _STUB = "toolchain.fleet.worker", "bin/tritonserver", "/tensorrt_llm/1/model.py"


@dataclass
class Stream:
    """What one client got, and when."""

    text: str = ""
    finish: str = ""
    tokens: int = 0
    error: str = ""
    times: list[float] = field(default_factory=list)

    @property
    def answer(self) -> tuple[str, str, int]:
        return self.text, self.finish, self.tokens

    @property
    def gap_s(self) -> float:
        """The longest time without a token."""
        return max((two - one for one, two in zip(self.times, self.times[1:], strict=False)), default=0.0)


@dataclass
class Outcome:
    """What came of one strike."""

    streams: list[Stream]
    at_work: int
    """Streams that had not ended when it struck."""
    back_s: float
    """From the strike until as many workers take requests as before; 0 where it was not waited for."""

    @property
    def failed(self) -> list[str]:
        return [one.error for one in self.streams if one.error]

    @property
    def gap_s(self) -> float:
        return max(one.gap_s for one in self.streams)


class Fleet:
    """A running endpoint over ``head``, ``a``, ``b`` and ``c``."""

    def __init__(self, found: dict[str, Host], work: Path, repository: Path, tokenizer: Path) -> None:
        self.hosts, self.work = found, work
        self.head: runner.Process | None = None
        self.nodes: dict[str, runner.Process] = {}
        self.url = f"http://{HEAD_ADDRESS}:{PORTS['openai']}/v1"
        told = {"folder": str(work / "head"), "repository": str(repository), "tokenizer": str(tokenizer)}
        (work / "head").mkdir()
        (work / "head.json").write_text(json.dumps({**told, "host": HEAD_ADDRESS}), encoding="utf-8")
        self.client = openai.OpenAI(base_url=self.url, api_key="x", max_retries=0, timeout=120)

    def start_head(self) -> None:
        (self.work / "head" / "token").unlink(missing_ok=True)
        argv = [sys.executable, "-m", "tests.fleet.head_process", str(self.work / "head.json")]
        self.head = self.hosts["head"].start(argv, self.work / "head.log")
        until((self.work / "head" / "token").exists, 60)

    def join(self, name: str) -> None:
        token = (self.work / "head" / "token").read_text(encoding="ascii")
        words = ("deploy", "join", token, "--name", name, "--room", str(ROOM[name]), "--work", str(self.work / name))
        argv = [sys.executable, "-m", "toolchain.cli", *words]
        self.nodes[name] = self.hosts[name].start(argv, self.work / f"{name}.log")

    def seen(self) -> list[str]:
        """The workers that take requests, as the front sees them."""
        try:
            with urllib.request.urlopen(f"http://{HEAD_ADDRESS}:{PORTS['openai']}/ready", timeout=5) as answer:
                return sorted(json.load(answer)["engines"])
        except (urllib.error.HTTPError, OSError):
            return []

    def whole(self) -> bool:
        return len(self.seen()) == REPLICAS

    def process(self, host: str, mark: str) -> int:
        """A process of that host whose command line holds the mark."""
        for pid in self.hosts[host].pids():
            try:
                if mark in " ".join(psutil.Process(pid).cmdline()[:6]):
                    return pid
            except psutil.NoSuchProcess:
                continue
        raise AssertionError(f"nothing of {host} is {mark}")

    def stream(self, tokens: int, on_first: Callable[[], object] = lambda: None) -> Stream:
        """One long greedy answer; an error is kept, not raised."""
        found = Stream()
        try:
            events = self.client.completions.create(
                model=ENDPOINT,
                prompt=PROMPT,
                max_tokens=tokens,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"min_tokens": tokens},
            )
            for event in events:
                if not event.choices:
                    found.tokens = event.usage.completion_tokens if event.usage else 0
                    continue
                if not found.times:
                    on_first()
                found.times.append(time.monotonic())
                found.text += event.choices[0].text
                found.finish = event.choices[0].finish_reason or found.finish
        except Exception as error:
            found.error = f"{type(error).__name__}: {error}"
            if not found.times:
                on_first()
        return found

    def under_streams(self, strike: Callable[[], object], tokens: int, *, back: bool = True, late: int = 0) -> Outcome:
        """``STREAMS`` streams, the strike once all of them have begun, and ``late`` short ones after it; waits until
        the workers are back.
        """
        begun, before = threading.Semaphore(0), set(self.seen())
        with ThreadPoolExecutor(STREAMS + late) as pool:
            early = [pool.submit(self.stream, tokens, begun.release) for _ in range(STREAMS)]
            for _ in early:
                assert begun.acquire(timeout=60)
            at_work = sum(not one.done() for one in early)
            struck = time.monotonic()
            strike()
            after = []
            for _ in range(late):
                after.append(pool.submit(self.stream, 40))
                time.sleep(0.1)
            back_s = self._back_s(before, struck) if back else 0.0
            streams = [one.result(180) for one in [*early, *after]]
        return Outcome(streams, at_work, back_s)

    def _back_s(self, before: set[str], struck: float) -> float:
        """A killed worker is known until its lease runs out, and comes back under another name; one whose Triton was
        killed takes itself back, and comes back as it was.
        """
        away = False

        def back() -> bool:
            nonlocal away
            seen = set(self.seen())
            away = away or not before <= seen
            return bool(seen - before) or (away and before <= seen)

        until(back, 90)
        return time.monotonic() - struck

    def kill(self, host: str, mark: str) -> None:
        os.kill(self.process(host, mark), signal.SIGKILL)

    def kill_stub(self, host: str) -> None:
        self.kill(host, _STUB)

    def kill_triton(self, host: str) -> None:
        self.kill(host, _TRITON)

    def kill_worker(self, host: str) -> None:
        self.kill(host, _WORKER)


@contextmanager
def fleet(work: Path, repository: Path, tokenizer: Path) -> Iterator[Fleet]:
    """Until the end of the block. Needs what ``hosts.require`` asks for."""
    with hosts() as found:
        one = Fleet(found, work, repository, tokenizer)
        try:
            one.start_head()
            for name in ROOM:
                one.join(name)
            until(one.whole, 120)
            yield one
        finally:
            for process in [*one.nodes.values(), *([one.head] if one.head else [])]:
                process.kill()
