"""How long an endpoint over hosts takes to recover, and how long a client's stream pauses: the chaos test, timed.

    python scripts/bench_chaos.py [--tokens 2000] [--rounds 3]

As root of a Linux with iproute2, iptables, etcd and nats-server: the hosts are network namespaces of this machine. One
JSON object on standard output: for each strike, of all rounds, the failed streams, those whose text differs from an
undisturbed run's, the largest gap between two tokens of a stream, and the seconds until as many replicas as before take
requests.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.e2e.parrot import write_parrot  # noqa: E402
from tests.fleet import hosts  # noqa: E402
from tests.fleet.chaos import REPLICAS, STREAMS, Fleet, fleet  # noqa: E402
from tests.fleet.conftest import make_repository  # noqa: E402
from tests.fleet.endpoint import until  # noqa: E402

STRIKES: dict[str, Callable[[Fleet], object]] = {
    "kill -9 of a stub": lambda one: one.kill_stub("a"),
    "kill -9 of a Triton": lambda one: one.kill_triton("b"),
    "kill -9 of a worker behind the NAT": lambda one: one.kill_worker("c"),
    "a host loses its power": lambda one: one.hosts["b"].lose(),
    "a black hole": lambda one: one.hosts["c"].cut(),
    "kill -9 of etcd": lambda one: one.kill("head", "bin/etcd"),
    "kill -9 of NATS": lambda one: one.kill("head", "nats-server"),
}
COMES_BACK_ALONE = frozenset(list(STRIKES)[:3])


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--tokens", type=int, default=2000)
    flags.add_argument("--rounds", type=int, default=3)
    asked = flags.parse_args()
    if reason := hosts.why_not():
        sys.exit(reason)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        work = Path(folder)
        parrot = write_parrot(work / "parrot")
        repository = make_repository(parrot, work)
        (work / "endpoint").mkdir()
        with fleet(work / "endpoint", repository, parrot) as running:
            expected = running.stream(asked.tokens).answer
            found = {name: measure(running, name, asked.rounds, asked.tokens, expected) for name in STRIKES}
    machine = {"cores": os.cpu_count(), "kernel": platform.release()}
    print(json.dumps({"machine": machine, "replicas": REPLICAS, "streams": STREAMS, **vars(asked), "strikes": found}))


def measure(running: Fleet, name: str, rounds: int, tokens: int, expected: tuple[str, str, int]) -> dict[str, Any]:
    gaps, backs, failed, differ = [], [], 0, 0
    for _ in range(rounds):
        outcome = running.under_streams(lambda: STRIKES[name](running), tokens, back=name in COMES_BACK_ALONE)
        failed += len(outcome.failed)
        differ += sum(one.answer != expected for one in outcome.streams if not one.error)
        gaps.append(round(outcome.gap_s, 2))
        if name in COMES_BACK_ALONE:
            backs.append(round(outcome.back_s, 2))
        heal(running, name)
    print(f"{name}: gaps {gaps} s, back {backs} s, {failed} failed, {differ} differ", file=sys.stderr)
    return {"gap_s": gaps, "back_s": backs, "failed": failed, "differ": differ}


def heal(running: Fleet, name: str) -> None:
    for host in ("b", "c"):
        running.hosts[host].mend()
    if name == "a host loses its power":
        running.join("b")
    until(running.whole, 120)


if __name__ == "__main__":
    main()
