"""Many streams at once through the gateway and a real Triton for minutes, many of them cut off: what is left after it?

    python scripts/soak.py --engine scalellm-work/tiny/engine --minutes 5 --streams 64 --json soak.json

It starts the service itself, on free ports of 127.0.0.1, and sends nothing anywhere else. Each of the streams asks,
reads its answer (chat, completion or ``/predict``; some with log probabilities) or goes away at a random moment (before
the first byte, or after a few pieces), and asks again. Ends with 1 where something is lost (an answer without its end,
with other than the tokens that it counts, or other than greedy decoding's length), where a status is not 200, or where
something is left: blocks in the KV cache, places in the queue, open sockets, growing memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
import psutil
from serving_processes import Service, service, wait_for

SUBJECTS = ("France", "a graphics card", "the sea", "Zürich", "日本", "a library", "the moon", "bread")
CUT = 0.4
"""Of the streams."""
PATIENCE_S = 120.0
"""For one answer."""
GROWTH = 0.05
"""Of a process's memory, from the second quarter of the run to the last: more than this and than GROWTH_BYTES leaks."""
GROWTH_BYTES = 8 * 2**20
JUDGED_S = 120.0
"""Shorter runs are all warm-up: their memory is reported and not judged."""
MEMORY = "memory of the "


@dataclass
class Tally:
    """What the streams saw."""

    ended: int = 0
    cut: int = 0
    tokens: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)

    def fault(self, text: str) -> None:
        self.faults.append(text)


@dataclass(frozen=True)
class Ask:
    """One request, and after how many events its client goes away (0: before the first; None: not at all)."""

    url: str
    body: dict[str, Any]
    leaves_after: int | None

    @classmethod
    def random(cls, chance: random.Random, doors: Service, model: str) -> Ask:
        text = f"Tell me about {chance.choice(SUBJECTS)}, number {chance.randint(1, 50)}."
        leaves = chance.choice((0, 1, 2, 5, 12)) if chance.random() < CUT else None
        tokens = chance.randint(4, 160) if leaves is None else chance.randint(500, 1500)  # not done before it leaves
        body: dict[str, Any] = {"max_tokens": tokens, "temperature": 0, "stream": True}
        way = chance.choice(("chat", "completion", "predict"))
        if way == "predict":
            return cls(doors.predict, {**body, "text": text}, leaves)
        body |= {"model": model, "min_tokens": tokens, "stream_options": {"include_usage": True}}
        logprobs = chance.random() < 0.3
        if way == "chat":
            body |= {"messages": [{"role": "user", "content": text}]} | ({"logprobs": True} if logprobs else {})
            return cls(f"{doors.openai}/v1/chat/completions", body, leaves)
        body |= {"prompt": text} | ({"logprobs": 1} if logprobs else {})
        return cls(f"{doors.openai}/v1/completions", body, leaves)


async def one_stream(session: aiohttp.ClientSession, ask: Ask, tally: Tally) -> None:
    """Ask once; read to the end, or leave."""
    begun = time.perf_counter()
    if ask.leaves_after == 0:
        tally.cut += 1
        with suppress(TimeoutError):
            async with asyncio.timeout(random.uniform(0.0, 0.3)):
                async with session.post(ask.url, json=ask.body) as response:
                    tally.statuses[response.status] += 1
        return
    async with session.post(ask.url, json=ask.body) as response:
        tally.statuses[response.status] += 1
        if response.status != 200:
            tally.fault(f"{response.status}: {(await response.text())[:300]}")
            return
        events: list[str] = []
        async for line in response.content:
            if line.startswith(b"data: "):
                events.append(line[6:].decode().strip())
                if len(events) == 1:
                    tally.first_ms.append(1000 * (time.perf_counter() - begun))
                if ask.leaves_after is not None and len(events) >= ask.leaves_after:
                    tally.cut += 1
                    return
    tally.ended += 1
    if fault := lacking(ask.body, events, tally):
        tally.fault(fault)


def lacking(body: dict[str, Any], events: list[str], tally: Tally) -> str | None:
    """What a whole stream lacks, in words."""
    if not events or events[-1] != "[DONE]":
        return f"a stream without its end: {events[-1:]}"
    found = [json.loads(event) for event in events[:-1]]
    if errors := [event["error"] for event in found if "error" in event]:
        return f"a stream that failed: {errors[0]}"
    if "text" in body:
        return None if all("generated_text" in event for event in found) else f"another answer of /predict: {found}"
    used = [event["usage"] for event in found if event.get("usage")]
    choices = [choice for event in found for choice in event["choices"]]
    reasons = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
    if reasons != ["length"] or len(used) != 1 or used[0]["completion_tokens"] != body["max_tokens"]:
        return f"{body['max_tokens']} tokens were asked for, and there came {used}, {reasons}"
    tally.tokens += used[0]["completion_tokens"]
    logs = [choice["logprobs"] for choice in choices if choice.get("logprobs")]
    given = sum(len(one.get("content") or one.get("tokens") or ()) for one in logs)
    if body.get("logprobs") and given != body["max_tokens"]:
        return f"{body['max_tokens']} tokens, and the log probabilities of {given}"
    return None


async def load(doors: Service, given: argparse.Namespace, until_s: float) -> Tally:
    """All streams until the time is up; those that began are read to their end."""
    tally = Tally()
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        async with session.get(f"{doors.openai}/v1/models") as answer:
            model = (await answer.json())["data"][0]["id"]

        async def keep_asking(number: int) -> None:
            chance = random.Random(given.seed * 1000 + number)
            while time.monotonic() < until_s:
                try:
                    await one_stream(session, Ask.random(chance, doors, model), tally)
                except (aiohttp.ClientError, OSError) as error:
                    tally.fault(f"{type(error).__name__}: {error}")
                    await asyncio.sleep(0.1)

        watcher = asyncio.create_task(tell(tally, until_s))
        await asyncio.gather(*(keep_asking(number) for number in range(given.streams)))
        watcher.cancel()
    return tally


async def fill(doors: Service, engine: Path) -> None:
    """Sequences as long and as many as the engine takes, so that each page of its cache has been written to: memory
    that is asked for later is not the cache's.
    """
    limits = json.loads((engine / "engine.json").read_text())["limits"]
    tokens, prompt = limits["max_seq_len"] - 100, "Tell me all that you know, and begin with number"
    body = {"max_tokens": tokens, "min_tokens": tokens, "temperature": 0}

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        async with session.get(f"{doors.openai}/v1/models") as answer:
            body["model"] = (await answer.json())["data"][0]["id"]

        async def ask(number: int) -> None:
            asked = {**body, "prompt": f"{prompt} {number}."}
            async with session.post(f"{doors.openai}/v1/completions", json=asked) as answer:
                await answer.read()

        await asyncio.gather(*(ask(number) for number in range(2 * limits["max_batch_size"])))


async def tell(tally: Tally, until_s: float) -> None:
    """A line now and then, for who waits."""
    while True:
        await asyncio.sleep(15)
        left = max(0.0, until_s - time.monotonic())
        line = f"{left:4.0f} s left: {tally.ended} ended, {tally.cut} cut off, {len(tally.faults)} faults"
        print(line, file=sys.stderr, flush=True)


class Sampler:
    """The memory of each process, once a second, in a thread of the event loop's own."""

    def __init__(self, processes: dict[str, psutil.Process]) -> None:
        self._processes = processes
        self.rss: dict[str, list[int]] = {role: [] for role in processes}
        self.lost: set[str] = set()

    async def run(self) -> None:
        while True:
            for role, process in self._processes.items():
                try:
                    self.rss[role].append(process.memory_info().rss)
                except psutil.NoSuchProcess:
                    self.lost.add(role)
            await asyncio.sleep(1)

    def memory(self) -> dict[str, dict[str, float]]:
        """By role in MiB: the medians of the second and of the last quarter of the run, the most, and the growth."""
        found = {}
        for role, values in self.rss.items():
            quarter = max(1, len(values) // 4)
            second, last = median(values[quarter : 2 * quarter] or values), median(values[-quarter:])
            mib = {"second_quarter": second, "last_quarter": last, "most": max(values), "growth": last - second}
            found[role] = {name: round(value / 2**20, 2) for name, value in mib.items()}
        return found


def held(processes: dict[str, psutil.Process]) -> dict[str, dict[str, int]]:
    """Open files and threads of each process; of the gateway also its established connections."""
    found = {}
    for role, process in processes.items():
        with suppress(psutil.NoSuchProcess):
            found[role] = {"files": process.num_fds(), "threads": process.num_threads()}
    with suppress(psutil.NoSuchProcess):
        open_ones = [one for one in processes["gateway"].net_connections("tcp") if one.status == "ESTABLISHED"]
        found["gateway"]["connections"] = len(open_ones)
    return found


def is_idle(doors: Service) -> bool:
    """Whether neither the engine nor its cache holds anything of a request."""
    return all(doors.status.get(name) == 0 for name in ("active", "running", "waiting", "kv_usage_percent"))


def left_over(before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> list[str]:
    """What is open that was not: two more files are a probe under way, two more threads a pool's."""
    return [
        f"{role}: {after[role][kind]} {kind}, {count} before"
        for role, counts in before.items()
        for kind, count in counts.items()
        if kind != "threads" and role in after and after[role][kind] > count + 2
    ]


async def run(doors: Service, given: argparse.Namespace) -> dict[str, Any]:
    """The whole of it -> the report, with ``violations``."""
    roles = doors.roles()
    before = held(roles)
    judged = 60 * given.minutes >= JUDGED_S
    if judged:
        await fill(doors, given.engine)
    warm = await load(doors, given, time.monotonic() + 2)  # threads and kernels that stay
    wait_for(lambda: is_idle(doors), 60)
    seen = len(doors.requests)
    sampler = Sampler(roles)
    watching = asyncio.create_task(sampler.run())
    tally = await load(doors, given, time.monotonic() + 60 * given.minutes)
    watching.cancel()
    idle = wait_for(lambda: is_idle(doors), 30)
    wait_for(lambda: not left_over(before, held(roles)), 45)  # connections to Triton are kept for 15 s
    after, memory = held(roles), sampler.memory()
    violations = [*dict.fromkeys([*warm.faults, *tally.faults]), *left_over(before, after)]
    violations += [] if idle else [f"the engine still holds something: {doors.status}"]
    violations += [f"{role} died" for role in sampler.lost]
    if judged:
        violations += [f"{MEMORY}{role} grew: {one}" for role, one in memory.items() if leaks(one)]
    lines = doors.requests[seen:]
    violations += [f"the log: {line}" for line in lines if wrong(line)][:10]
    first = sorted(tally.first_ms) or [0.0]
    return {
        "minutes": given.minutes, "streams": given.streams, "seed": given.seed,
        "ended": tally.ended, "cut_off": tally.cut, "tokens_counted": tally.tokens,
        "cut_off_on_the_way": sum(line.get("ended") == "client gone" for line in lines),
        "statuses": {str(code): count for code, count in tally.statuses.items()},
        "first_event_ms": {"p50": round(median(first), 1), "p99": round(first[int(len(first) * 0.99)], 1)},
        "memory_mib": memory, "before": before, "after": after, "engine": doors.status, "violations": violations,
    }  # fmt: skip


def leaks(memory: dict[str, float]) -> bool:
    return memory["growth"] * 2**20 > max(GROWTH_BYTES, GROWTH * memory["second_quarter"] * 2**20)


def wrong(line: dict[str, Any]) -> bool:
    """A line of the gateway's log that tells of more than a request that went well or whose client left."""
    return line["event"] != "request" or line["status"] >= 500 or line.get("ended") not in (None, "client gone")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, default=Path("scalellm-work/tiny/engine"), help="a CPU engine's folder")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="the report also goes here")
    return parser.parse_args()


def main() -> int:
    given = parse()
    with service(given.engine) as doors:
        report = asyncio.run(run(doors, given))
    text = json.dumps(report, indent=2)
    print(text)
    if given.json:
        given.json.write_text(text + "\n")
    return 1 if report["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
