"""What an endpoint costs against plain Triton, and how long a lost part of a replica is felt.

    python scripts/bench_fleet.py REPOSITORY [--streams 32] [--rounds 5] [--tokens 128]

Two replicas on this machine. The gateway over the endpoint and a gateway over the same two Tritons are asked in turn,
``rounds`` times, with greedy streams of equal length; then, under 16 streams, each part of a replica is killed. Prints
one JSON object. Figures are of this machine; compare them by their ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil

from toolchain.fleet.deployment import Deployment, Replicas
from toolchain.gateway.run import Listen
from toolchain.gateway.settings import Settings, Timeouts, Upstream
from toolchain.progress import Silent
from toolchain.servers.triton.ports import free_ports
from toolchain.stages import deploy, gateway

PROMPT = "Once upon a time there was"
FELT_UNDER = 16
_READY_S = 60.0


@dataclass(frozen=True)
class Stream:
    """What one client saw."""

    ttft_s: float
    seconds: float
    pieces: int
    gap_s: float
    """The longest between two pieces."""
    text: str


def stream(url: str, model: str, tokens: int, begun: Callable[[], object] = lambda: None) -> Stream:
    """One greedy answer of exactly ``tokens`` tokens."""
    client = openai.OpenAI(base_url=url, api_key="x", max_retries=0, timeout=300)
    start = last = time.perf_counter()
    times, text = [], ""
    for event in client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=tokens,
        temperature=0,
        stream=True,
        extra_body={"min_tokens": tokens},
    ):
        now = time.perf_counter()
        times.append(now - last)
        last = now
        text += event.choices[0].text
        begun()
    return Stream(times[0], last - start, len(times), max(times[1:], default=0.0), text)


def together(url: str, model: str, streams: int, tokens: int) -> dict[str, float]:
    """Median time to the first token, and tokens a second over all of them."""
    begun = time.perf_counter()
    with ThreadPoolExecutor(streams) as pool:
        found = list(pool.map(lambda _: stream(url, model, tokens), range(streams)))
    return {
        "ttft_p50_ms": statistics.median(one.ttft_s for one in found) * 1000,
        "tokens_per_s": streams * tokens / (time.perf_counter() - begun),
    }


def compared(fleet: str, plain: str, model: str, streams: int, rounds: int, tokens: int) -> dict[str, Any]:
    """Both, in turn; medians over the rounds, and the median of the rounds' own ratios."""
    runs: dict[str, list[dict[str, float]]] = {"fleet": [], "plain": []}
    for url in (fleet, plain):
        together(url, model, streams, tokens)
    for number in range(rounds):
        order = [("fleet", fleet), ("plain", plain)]
        for name, url in order if number % 2 else reversed(order):
            runs[name].append(together(url, model, streams, tokens))
    pairs = list(zip(runs["fleet"], runs["plain"], strict=True))
    return {
        **{
            f"{name}_{key}": statistics.median(run[key] for run in runs[name]) for name in runs for key in runs[name][0]
        },
        "tokens_per_s_ratio": statistics.median(one["tokens_per_s"] / two["tokens_per_s"] for one, two in pairs),
        "ttft_p50_added_ms": statistics.median(one["ttft_p50_ms"] - two["ttft_p50_ms"] for one, two in pairs),
    }


def stub_of(triton: int) -> int:
    """The process of the engine's Triton model."""
    children = psutil.Process(triton).children(recursive=True)
    return next(one.pid for one in children if "/tensorrt_llm/1/model.py" in " ".join(one.cmdline()))


def felt(endpoint: deploy.Local, url: str, model: str, tokens: int, part: str, number: int) -> dict[str, Any]:
    """Kill one part of a replica under streams: what they saw, and when it is back. ``number`` 0 kills nothing: then
    ``as_alone`` says how many greedy answers the batch itself leaves as they are for one client alone.
    """
    replica = endpoint.replicas[0]
    pids = replica.state()["pids"]
    pid = {"worker": pids["worker"], "triton": pids["triton"]}.get(part) or stub_of(pids["triton"])
    undisturbed = stream(url, model, tokens)
    first = threading.Event()
    with ThreadPoolExecutor(FELT_UNDER) as pool:
        asked = [pool.submit(stream, url, model, tokens, first.set) for _ in range(FELT_UNDER)]
        first.wait()
        time.sleep(0.3)
        killed, at_work = time.perf_counter(), sum(not one.done() for one in asked)
        back_s = None
        if number:
            os.kill(pid, number)
        if number == signal.SIGKILL:
            back_s = _until_back(replica, pids) - killed
        found, failed = [], []
        for one in asked:
            try:
                found.append(one.result())
            except openai.APIError as error:
                failed.append(str(error))
    if number == signal.SIGSTOP:
        os.kill(pid, signal.SIGKILL)
        _until_back(replica, pids)
    return {
        "at_work": at_work,
        "failed": failed,
        "as_alone": sum(one.text == undisturbed.text for one in found),
        "largest_gap_s": max(one.gap_s for one in found),
        "undisturbed_gap_s": undisturbed.gap_s,
        "back_s": back_s,
    }


def _until_back(replica: deploy.Replica, before: dict[str, int]) -> float:
    """When the replica takes requests again, with what was killed replaced."""
    until = time.perf_counter() + _READY_S
    while time.perf_counter() < until:
        state = replica.state()
        if state["state"] == "ready" and state["pids"] != before:
            return time.perf_counter()
        time.sleep(0.02)
    raise SystemExit("the replica did not come back")


def main() -> None:
    """Both measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--long", type=int, default=600, help="Tokens of the streams under which a part is killed.")
    asked = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="bench-fleet-"))
    deployment = Deployment(endpoint="bench", recipes=("given",), replicas=Replicas(min=2), drain_seconds=3.0)
    model = gateway.model_of_repository(asked.repository, deployment.endpoint)
    place = deploy.Place.of(work, deployment.endpoint)
    settings = Settings(model, (), timeouts=Timeouts(patience_s=60))
    fleet_at, plain_at = (Listen(port=free_ports().http, predict_port=None) for _ in range(2))
    with (
        deploy.local(deployment, [asked.repository] * 2, place, progress=Silent()) as endpoint,
        gateway.background(settings, fleet_at, log=work / "fleet.log", engines=endpoint.engines),
    ):
        ports = [replica.state()["ports"]["http"] for replica in endpoint.replicas]
        over = Settings(model, tuple(Upstream(f"http://127.0.0.1:{port}") for port in ports))
        fleet, plain = fleet_at.urls["OpenAI"], plain_at.urls["OpenAI"]
        while any(replica.state()["state"] != "ready" for replica in endpoint.replicas):
            time.sleep(0.1)
        with gateway.background(over, plain_at, log=work / "plain.log"):
            time.sleep(2)
            found: dict[str, Any] = {
                "streams": asked.streams,
                "tokens": asked.tokens,
                "rounds": asked.rounds,
                **compared(fleet, plain, model.name, asked.streams, asked.rounds, asked.tokens),
            }
        parts = [
            ("worker", signal.SIGKILL),
            ("triton", signal.SIGKILL),
            ("stub", signal.SIGKILL),
            ("worker", signal.SIGSTOP),
        ]
        found["nothing killed"] = felt(endpoint, fleet, model.name, asked.long, "worker", 0)
        for part, number in parts:
            name = f"{part} {number.name}"
            found[name] = felt(endpoint, fleet, model.name, asked.long, part, number)
            print(name, found[name], file=sys.stderr)
            time.sleep(1)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
