"""kill -9 of each process behind a gateway, under load: how long until it answers again, and what its clients saw.

    python scripts/bench_recovery.py --engine scalellm-work/tiny/engine --kills 5 --streams 16 --json recovery.json

Each kill gets a service of its own (the supervisor doubles its pause with each restart), on free ports of 127.0.0.1.
Streams ask again and again; the process dies in the middle. Times count from the signal: until ``/ready`` says 503,
until it says 200 again, and until the first token of an answer that was asked for after the signal. An answer that had
not begun must come all the same; one that had must end with an error event.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
from serving_processes import Service, service

VICTIMS = ("triton", "stub tensorrt_llm_bls", "stub tensorrt_llm", "engine")
BEFORE_S, PATIENCE_S, LOOK_S = 2.0, 60.0, 0.02
TOKENS = 600


@dataclass
class Seen:
    """One kill."""

    killed_s: float = 0.0
    down_s: float | None = None
    ready_s: float | None = None
    token_s: float | None = None
    outcomes: Counter[str] = field(default_factory=Counter)

    def since(self) -> float:
        return time.perf_counter() - self.killed_s


async def keep_asking(session: aiohttp.ClientSession, url: str, body: dict[str, Any], seen: Seen) -> None:
    """One stream after the other, until the first answer that was begun after the kill has ended."""
    while True:
        asked_late = seen.killed_s > 0
        outcome = await ask(session, url, body, seen, asked_late)
        if seen.killed_s:
            seen.outcomes[outcome] += 1
        if asked_late:
            return


async def ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any], seen: Seen, asked_late: bool) -> str:
    """How it went, in words."""
    begun_before = False
    last = ""
    try:
        async with session.post(url, json=body) as response:
            if response.status != 200:
                return f"refused with {response.status}"
            async for line in response.content:
                if line.startswith(b"data: "):
                    last = line[6:].decode().strip()
                    begun_before = begun_before or not seen.killed_s
                    if asked_late and seen.token_s is None:
                        seen.token_s = seen.since()
                    if '"error"' in last:
                        return "begun, ended with an error" if begun_before else "not begun, ended with an error"
    except (aiohttp.ClientError, OSError) as error:
        return f"cut without a word ({type(error).__name__})"
    if last != "[DONE]":
        return "ended without its end"
    return "asked after the kill, whole" if asked_late else "begun, whole" if begun_before else "not begun, whole"


async def watch(session: aiohttp.ClientSession, url: str, seen: Seen) -> None:
    """Until it has been down and is ready again."""
    while seen.ready_s is None and seen.since() < PATIENCE_S:
        async with session.get(url) as answer:
            if answer.status == 503 and seen.down_s is None:
                seen.down_s = seen.since()
            if answer.status == 200 and seen.down_s is not None:
                seen.ready_s = seen.since()
        await asyncio.sleep(LOOK_S)


async def one_kill(doors: Service, victim: str, streams: int) -> Seen:
    seen, process = Seen(), doors.roles()[victim]
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        async with session.get(f"{doors.openai}/v1/models") as answer:
            model = (await answer.json())["data"][0]["id"]
        body = {"model": model, "prompt": "Tell me about the sea.", "max_tokens": TOKENS, "min_tokens": TOKENS,
                "temperature": 0, "stream": True}  # fmt: skip
        url = f"{doors.openai}/v1/completions"
        tasks = [asyncio.create_task(keep_asking(session, url, body, seen)) for _ in range(streams)]
        await asyncio.sleep(BEFORE_S)
        os.kill(process.pid, signal.SIGKILL)
        seen.killed_s = time.perf_counter()
        await asyncio.gather(watch(session, f"{doors.openai}/ready", seen), *tasks)
    return seen


def summary(kills: list[Seen]) -> dict[str, Any]:
    """Medians and ranges in s, and what became of all requests that were under way."""
    found: dict[str, Any] = {"kills": len(kills)}
    for name in ("down_s", "ready_s", "token_s"):
        values = [value for one in kills if (value := getattr(one, name)) is not None]
        found[name] = [round(value, 2) for value in (median(values), min(values), max(values))] if values else None
    found["outcomes"] = dict(sum((one.outcomes for one in kills), Counter()))
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, default=Path("scalellm-work/tiny/engine"), help="a CPU engine's folder")
    parser.add_argument("--kills", type=int, default=5, help="of each process")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=VICTIMS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="the report also goes here")
    return parser.parse_args()


GOOD = {"begun, whole", "begun, ended with an error", "not begun, whole", "asked after the kill, whole"}


def main() -> int:
    given = parse()
    found: dict[str, list[Seen]] = {victim: [] for victim in given.victims}
    for number in range(given.kills):
        for victim in given.victims:
            with service(given.engine) as doors:
                found[victim].append(asyncio.run(one_kill(doors, victim, given.streams)))
            print(f"{number + 1} {victim}: {summary(found[victim][-1:])}", file=sys.stderr, flush=True)
            report = {"streams": given.streams, "victims": {name: summary(kills) for name, kills in found.items()}}
            if given.json:  # after each, so that what was measured stays when the next one does not start
                given.json.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    wrong = {outcome for one in report["victims"].values() for outcome in one["outcomes"]} - GOOD
    return 1 if wrong or any(one["ready_s"] is None for one in report["victims"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
