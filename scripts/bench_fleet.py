"""What an endpoint costs against plain Triton, and how long a lost part of a replica is felt.

    python scripts/bench_fleet.py REPOSITORY [--streams 32] [--rounds 7] [--tokens 128] [--only cost|felt] [--door NAME]

An endpoint of two replicas, and a gateway over the same two Tritons, each in a process of its own as a user starts it.
Asked in turn, ``rounds`` times, in an order that changes, with greedy streams of equal length:

    triton    KServe's generate_stream of the two Tritons themselves, half of the streams each
    fleet     the same request at the endpoint
    gateway   OpenAI's completions at the gateway over the two Tritons
    openai    the same at the endpoint

Every stream has a prompt of its own. ``ttft_p50_ms`` is of streams that all begin at the same moment,
``ttft_joining_p50_ms`` of short requests that come one by one while streams run (two fewer: each Triton has a place
left). The client is the same for all, and a process of the same machine. ``cpu_us_per_token`` is CPU time by process,
which hardly depends on what else the machine does; wall time does. ``idle_cpu_percent`` is of one core, with nobody
asking.

Then each part of a replica is killed under 16 streams. Prints one JSON object; figures are of this machine, compare
them by their ratios, which are of rounds next to each other: median, and the interval of a bootstrap over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
from serving_processes import cpu_seconds

from toolchain.running import Place
from toolchain.servers.triton.ports import free_ports

PROMPT = "Once upon a time there was"
JOINING = 8
"""Short requests that come while the streams run, one after the other."""
NAME, BLS = "bench", "tensorrt_llm_bls"
FELT_UNDER = 16
_READY_S = 120.0
_RESAMPLES = 10_000
_SETTLE_S, _IDLE_S = 0.3, 10.0
_LEFT_S = 1.5
"""Until the Tritons have noticed whose client has gone."""
_LONG = 1500
_TIMES = ("ttft_p50_ms", "ttft_joining_p50_ms")
_PAIRS = (("triton", "fleet"), ("gateway", "openai"))
_RETURNS = ("worker SIGKILL", "triton SIGKILL", "stub SIGKILL")
"""Kills after which what was killed must be there again."""


@dataclass(frozen=True)
class Stream:
    """What one client saw."""

    ttft_s: float
    gap_s: float
    """The longest between two pieces."""
    text: str


@dataclass(frozen=True)
class Target:
    """Who is asked, and how: the addresses in turn."""

    urls: tuple[str, ...]
    kserve: bool

    def body(self, tokens: int, prompt: str) -> dict[str, Any]:
        if self.kserve:
            return {"text_input": prompt, "max_tokens": tokens, "min_tokens": tokens, "stream": True}
        asked = {"model": NAME, "prompt": prompt, "max_tokens": tokens, "min_tokens": tokens}
        return {**asked, "temperature": 0, "stream": True}

    def text(self, event: Mapping[str, Any]) -> str:
        return str(event["text_output"] if self.kserve else event["choices"][0]["text"])


async def stream(
    session: aiohttp.ClientSession,
    target: Target,
    url: str,
    tokens: int,
    begun: Callable[[], object] = lambda: None,
    prompt: str = PROMPT,
) -> Stream:
    """One greedy answer of exactly ``tokens`` tokens. RuntimeError where it fails."""
    start = last = time.perf_counter()
    times, text = [], ""
    async for event in _events(session, url, target.body(tokens, prompt)):
        if "error" in event:
            raise RuntimeError(str(event["error"]))
        now = time.perf_counter()
        times.append(now - last)
        last = now
        text += target.text(event)
        begun()
    return Stream(times[0] if times else last - start, max(times[1:], default=0.0), text)


async def _events(session: aiohttp.ClientSession, url: str, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
    async with session.post(url, json=body) as answer:
        if answer.status != 200:
            raise RuntimeError(f"{answer.status} {(await answer.text())[:300]}")
        async for line in answer.content:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])


@contextmanager
def loop_and_session() -> Iterator[tuple[asyncio.Runner, aiohttp.ClientSession]]:
    """A client without a limit of connections, and the loop that it runs on."""

    async def opened() -> aiohttp.ClientSession:
        limits = aiohttp.ClientTimeout(total=300)
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=limits, read_bufsize=2**20)

    with asyncio.Runner() as runner:
        session = runner.run(opened())
        try:
            yield runner, session
        finally:
            runner.run(session.close())


def together(
    runner: asyncio.Runner,
    session: aiohttp.ClientSession,
    target: Target,
    streams: int,
    tokens: int,
    names: Mapping[int, str],
) -> dict[str, Any]:
    """Median time to the first token, tokens a second over all of them, and CPU time a token by process."""

    def asked(number: int, count: int, begun: Callable[[], object] = lambda: None) -> Coroutine[Any, Any, Stream]:
        url = target.urls[number % len(target.urls)]
        return stream(session, target, url, count, begun, f"{number}. {PROMPT}")

    async def all_of_them() -> list[Stream]:
        return await asyncio.gather(*(asked(number, tokens) for number in range(streams)))

    async def joining() -> list[Stream]:
        """Others of them; the streams are told to go on for long enough, and are left when the last has come."""
        running = [asyncio.Event() for _ in range(streams - 2)]
        works = [asyncio.create_task(asked(number, _LONG, one.set)) for number, one in enumerate(running)]
        for one in running:
            await one.wait()
        found = [await asked(streams + number, 2) for number in range(JOINING)]
        if any(one.done() for one in works):
            raise SystemExit("a stream ended while others were to join it")
        for one in works:
            one.cancel()
        await asyncio.gather(*works, return_exceptions=True)
        return found

    before, begun = cpu_seconds(names), time.perf_counter()
    found = runner.run(all_of_them())
    seconds = time.perf_counter() - begun
    time.sleep(_SETTLE_S)
    used = cpu_seconds(names) - before
    joined = runner.run(joining())
    time.sleep(_LEFT_S)
    return {
        "ttft_p50_ms": statistics.median(one.ttft_s for one in found) * 1000,
        "ttft_joining_p50_ms": statistics.median(one.ttft_s for one in joined) * 1000,
        "tokens_per_s": streams * tokens / seconds,
        "cpu_us_per_token": {part: cpu_s * 1e6 / streams / tokens for part, cpu_s in used.items()},
    }


def cost(
    targets: Mapping[str, Target], streams: int, rounds: int, tokens: int, names: Mapping[int, str]
) -> dict[str, Any]:
    """All targets in turn, and each pair's ratio and difference round by round. ``names``: see ``cpu_seconds``."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in targets}
    with loop_and_session() as (runner, session):
        for target in targets.values():
            together(runner, session, target, streams, tokens, names)
        for number in range(rounds):
            order = list(targets)
            for name in order[number % len(order) :] + order[: number % len(order)]:
                runs[name].append(together(runner, session, targets[name], streams, tokens, names))
                print(number, name, runs[name][-1], file=sys.stderr)
    found: dict[str, Any] = {name: _summary(some) for name, some in runs.items()}
    for plain, ours in _PAIRS:
        if not {plain, ours} <= runs.keys():
            continue
        pairs = list(zip(runs[plain], runs[ours], strict=True))
        found[f"{ours} against {plain}"] = {
            "tokens_per_s_ratio": interval([two["tokens_per_s"] / one["tokens_per_s"] for one, two in pairs]),
            **{
                f"{key.removesuffix('_ms')}_added_ms": interval([two[key] - one[key] for one, two in pairs])
                for key in _TIMES
            },
        }
    return found


def _summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians of the rounds; of CPU time the mean, which the clock's ticks of 10 ms do not coarsen."""
    used = sum((Counter(run["cpu_us_per_token"]) for run in runs), Counter())
    parts = {part: round(us / len(runs), 1) for part, us in used.most_common()}
    return {
        **{key: statistics.median(run[key] for run in runs) for key in (*_TIMES, "tokens_per_s")},
        "cpu_us_per_token": {**parts, "all": round(sum(parts.values()), 1)},
    }


def idle(names: Mapping[int, str]) -> dict[str, float]:
    """CPU time by process while nobody asks, in percent of one core."""
    before = cpu_seconds(names)
    time.sleep(_IDLE_S)
    return {part: round(100 * cpu_s / _IDLE_S, 2) for part, cpu_s in (cpu_seconds(names) - before).most_common()}


def interval(values: Sequence[float]) -> dict[str, float]:
    """The median, and the 95 % interval of its percentile bootstrap."""
    sample = np.asarray(values)
    drawn = np.random.default_rng(0).choice(sample, (_RESAMPLES, len(sample)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return {"median": float(np.median(sample)), "low": float(low), "high": float(high)}


def felt(place: Place, target: Target, root: str, tokens: int, part: str, number: int) -> dict[str, Any]:
    """Kill one part of a replica under streams: what they saw, and when it is back. ``number`` 0 kills nothing: then
    ``as_alone`` says how many greedy answers the batch itself leaves as they are for one client alone.
    """

    async def play(session: aiohttp.ClientSession) -> dict[str, Any]:
        undisturbed = await stream(session, target, target.urls[0], tokens)
        first = asyncio.Event()
        asked = [
            asyncio.create_task(stream(session, target, target.urls[0], tokens, first.set)) for _ in range(FELT_UNDER)
        ]
        await first.wait()
        await asyncio.sleep(0.3)
        before, pid = workers(root), pid_of(place, part)
        at_work, killed, back_s = sum(not one.done() for one in asked), time.perf_counter(), None
        if number:
            os.kill(pid, number)
        if f"{part} {signal.Signals(number).name if number else ''}" in _RETURNS:
            back_s = await asyncio.to_thread(until_back, root, before) - killed
        ended = await asyncio.gather(*asked, return_exceptions=True)
        if number == signal.SIGSTOP:
            os.kill(pid, signal.SIGKILL)
            await asyncio.to_thread(until_back, root, before)
        found = [one for one in ended if isinstance(one, Stream)]
        return {
            "at_work": at_work,
            "failed": [str(one) for one in ended if isinstance(one, BaseException)],
            "as_alone": sum(one.text == undisturbed.text for one in found),
            "largest_gap_s": max((one.gap_s for one in found), default=None),
            "undisturbed_gap_s": undisturbed.gap_s,
            "back_s": back_s,
        }

    with loop_and_session() as (runner, session):
        return runner.run(play(session))


def workers(root: str) -> frozenset[str]:
    """Those that take requests, as the gateway knows them."""
    try:
        with urllib.request.urlopen(f"{root}/ready", timeout=5) as answer:
            return frozenset(json.load(answer)["engines"])
    except urllib.error.HTTPError:
        return frozenset()


def until_back(root: str, before: frozenset[str]) -> float:
    """When there are as many workers as before, after one of them was gone. What a worker writes of itself does not
    count: it may not have noticed yet.
    """
    until, gone = time.perf_counter() + _READY_S, False
    while time.perf_counter() < until:
        now = workers(root)
        gone = gone or not before <= now
        if gone and len(now) >= len(before):
            return time.perf_counter()
        time.sleep(0.02)
    raise SystemExit("the replica did not come back")


def pid_of(place: Place, part: str) -> int:
    """Of the first replica."""
    pids = (place.state() or {})["replicas"][0]["pids"]
    if part != "stub":
        return int(pids[part])
    children = psutil.Process(pids["triton"]).children(recursive=True)
    return next(one.pid for one in children if "/tensorrt_llm/1/model.py" in " ".join(one.cmdline()))


def serve(repository: Path, work: Path, ports: Sequence[int], replicas: int) -> None:
    """The endpoint, in this process, until it is told to end."""
    from toolchain.cli import deploying
    from toolchain.console import Screen
    from toolchain.fleet.deployment import Deployment, Ports, Replicas

    doors = Ports(openai=ports[0], predict=False, grpc=ports[1])
    counts = Replicas(min=replicas, max=replicas)
    asked = Deployment(
        endpoint=NAME, recipes=("given",), replicas=counts, drain_seconds=3.0, max_queue=256, ports=doors
    )
    deploying.run(Screen(), asked, [repository] * replicas, work, keys=None, insecure_open=False)


@contextmanager
def process(argv: Sequence[object], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Started; asked to end at the end of the block, and killed where it does not."""
    with log.open("wb") as stream_to:
        child = subprocess.Popen([str(word) for word in argv], stdout=stream_to, stderr=subprocess.STDOUT)
    try:
        yield child
    finally:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(60)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def until(condition: Callable[[], object], child: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while not condition():
        if child.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(log.read_text())
        time.sleep(0.2)


def answers(root: str) -> bool:
    try:
        return bool(workers(root))
    except OSError:
        return False


def main() -> None:
    """Both measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--long", type=int, default=600, help="Tokens of the streams under which a part is killed.")
    parser.add_argument("--only", choices=["cost", "felt"])
    parser.add_argument("--door", action="append", help="Only these, of triton, fleet, gateway and openai.")
    parser.add_argument("--serve", nargs=3, metavar=("WORK", "HTTP", "GRPC"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve(asked.repository, Path(asked.serve[0]), [int(port) for port in asked.serve[1:]], asked.replicas)
        return
    work, ports = Path(tempfile.mkdtemp(prefix="bench-fleet-")), free_ports()
    place, root = Place(work / "endpoints" / NAME), f"http://127.0.0.1:{ports.http}"
    found: dict[str, Any] = {"streams": asked.streams, "tokens": asked.tokens, "rounds": asked.rounds}
    own = [sys.executable, __file__, asked.repository.resolve(), "--replicas", asked.replicas]
    with ExitStack() as stack:
        log = work / "endpoint.log"
        endpoint = stack.enter_context(process([*own, "--serve", work, ports.http, ports.grpc], log))
        until(lambda: answers(root) and len(workers(root)) == asked.replicas, endpoint, log)
        if asked.only != "felt":
            found["cost"] = measured_cost(stack, work, place, root, endpoint.pid, asked)
            print(json.dumps(found["cost"], indent=2), file=sys.stderr)
        if asked.only != "cost":
            found["felt"] = measured_felt(place, root, asked.long)
    print(json.dumps(found, indent=2))


def measured_cost(
    stack: ExitStack, work: Path, place: Place, root: str, endpoint: int, asked: argparse.Namespace
) -> dict[str, Any]:
    """With a gateway over the endpoint's own Tritons beside it."""
    tritons = [f"http://127.0.0.1:{one['ports']['http']}" for one in (place.state() or {})["replicas"]]
    port, log = free_ports().http, work / "gateway.log"
    argv = [sys.executable, "-m", "toolchain.cli", "gateway", "--repository", asked.repository.resolve()]
    argv += ["--model-name", NAME, "--port", port, "--no-predict", "--max-queue", 256, "--work", work]
    argv += [word for url in tritons for word in ("--triton", url)]
    plain = stack.enter_context(process(argv, log))
    until(lambda: answers(f"http://127.0.0.1:{port}"), plain, log)
    path = f"/v2/models/{BLS}/generate_stream"
    targets = {
        "triton": Target(tuple(f"{url}{path}" for url in tritons), True),
        "fleet": Target((f"{root}{path}",), True),
        "gateway": Target((f"http://127.0.0.1:{port}/v1/completions",), False),
        "openai": Target((f"{root}/v1/completions",), False),
    }
    names = {os.getpid(): "client", endpoint: "front", plain.pid: "gateway"}
    doors = {name: target for name, target in targets.items() if name in (asked.door or targets)}
    return {**cost(doors, asked.streams, asked.rounds, asked.tokens, names), "idle_cpu_percent": idle(names)}


def measured_felt(place: Place, root: str, tokens: int) -> dict[str, Any]:
    """One part after the other, each after the replica is whole again."""
    target = Target((f"{root}/v1/completions",), False)
    parts = [("worker", 0), ("worker", signal.SIGKILL), ("triton", signal.SIGKILL), ("stub", signal.SIGKILL)]
    found = {}
    for part, number in [*parts, ("worker", signal.SIGSTOP)]:
        name = f"{part} {signal.Signals(number).name}" if number else "nothing killed"
        found[name] = felt(place, target, root, tokens, part, number)
        print(name, found[name], file=sys.stderr)
        time.sleep(1)
    return found


if __name__ == "__main__":
    main()
