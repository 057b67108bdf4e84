"""What our doors cost: one engine, asked in its own process without a server, and through gRPC, HTTP and the gateway.

    python scripts/bench_doors.py --work DIR [--shape 1b] [--lengths 512,2048] [--requests 8] [--rounds 3] [--out DIR]

How it is made fair:

- Both engines are the same files with the same settings, environment and Python: Triton's engine process is looked up,
  and `engine_alone.py` is started as that one was, on the same folder, with its `pipeline.py`. It calls OpenVINO
  GenAI's pipeline and nothing else. Both were warmed up by requests of the measured length.
- Two at a time are compared, the engine alone and one door, request by request in turns with the same prompt, so that a
  machine that slows down slows both. They change places from round to round. What is told are medians over the
  pairs, with 95 % bootstrap intervals: what the door adds to the time to the first token, in ms, and its time between
  tokens as a ratio.
- The prefix cache is off in the recipe, so that no request finds its prompt known. The work is the same everywhere:
  greedy, the end of text forbidden, as many tokens as asked.
- The engine alone is timed at its own boundary: from token ids given to token ids read, in its own process, on the
  clock that all processes share. So tokenizing, text, every hop and the client itself are the doors' cost; the client
  has no cores of its own here. A token counts where its text could be shown, on both sides: one that ends within a
  character waits for the next.
- While one is asked the other is idle. Before each comparison it is checked, and told, that idle processes take no CPU
  time.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts import bench_peers, bench_quantize, peer_model  # noqa: E402
from toolchain.measuring.doors import Piece  # noqa: E402
from toolchain.measuring.memory import listener  # noqa: E402
from toolchain.measuring.prompts import Tokens  # noqa: E402
from toolchain.measuring.report import Load, Report, Request, write  # noqa: E402
from toolchain.measuring.statistics import median_with_interval, percentile  # noqa: E402
from toolchain.progress import Silent  # noqa: E402
from toolchain.stages.bench import Asked, Provenance, bench  # noqa: E402

DOORS = ("gRPC", "HTTP", "gateway")
IDLE_S = 3.0
SPIN = 0.05
"""Of one core: idle processes that take more than this disturb what is measured beside them."""


@dataclass(frozen=True)
class Alone:
    """`engine_alone.py` as a door, one request at a time; times are those that it tells."""

    url: str
    tokenizer: Any
    kind: str = "in-process"
    model: str = "openvino_genai"
    ignore_eos: bool = True
    extra: tuple[()] = ()

    def about(self) -> dict[str, str]:
        return {}

    def open(self) -> Session:
        host, _, port = self.url.partition(":")
        return Session(Client((host, int(port))), self.tokenizer)


@dataclass(frozen=True)
class Session:
    """A connection to the process."""

    connection: Any
    tokenizer: Any

    def close(self) -> None:
        self.connection.close()

    def ask(self, prompt: str, max_tokens: int, sent: Callable[[], None]) -> Iterator[Piece]:
        """Times as if the process had been reached in no time, and the prompt had come as ids."""
        sent()
        asked = time.perf_counter()
        self.connection.send((self.tokenizer(prompt)["input_ids"], max_tokens))
        begin, steps = self.connection.recv()
        ids, shown = list[int](), 0
        for at, made in steps:
            ids += made
            text = self.tokenizer.decode(ids)
            if not text.endswith("\ufffd"):
                yield Piece(text[shown:], asked + at - begin, len(ids))
                shown = len(text)


@contextmanager
def alone(served: psutil.Process, given: argparse.Namespace, tokens: Tokens) -> Iterator[Alone]:
    """Another one of the engine process ``served``, without a server."""
    python, script, _descriptor, folder, *_ = served.cmdline()
    port, log = bench_peers.free_port(), given.work / "alone.log"
    argv = [python, str(ROOT / "scripts" / "engine_alone.py"), folder, str(Path(script).parent), str(port)]
    url = f"127.0.0.1:{port}"
    with bench_peers.running(argv, lambda: listener(url) is not None, log, served.environ()):
        yield Alone(url, tokens.tokenizer)


def family(url: str) -> list[psutil.Process]:
    """The process that listens there, its parents of this benchmark, and all their children."""
    one = psutil.Process(listener(url))
    while (parent := one.parent()) is not None and parent.pid not in (1, os.getpid()):
        one = parent
    return [one, *one.children(recursive=True)]


def idle_share(processes: Sequence[psutil.Process]) -> float:
    """Of one core, while nobody asks them anything."""

    def used() -> float:
        return sum(times.user + times.system for times in (one.cpu_times() for one in processes))

    before = used()
    time.sleep(IDLE_S)
    return (used() - before) / IDLE_S


def compared(engine: Alone, door: Any, name: str, number: int, given: argparse.Namespace, tokens: Tokens) -> Report:
    """Of the two in turns; service 0 of the report is who went first."""
    share = idle_share([*family(engine.url), *family(door.url)])
    flag = "RED FLAG: " if share > SPIN else ""
    bench_quantize.say(f"  {flag}idle processes take {share:.1%} of a core; load {os.getloadavg()[0]:.1f}")
    asked = Asked(
        loads=(Load(kind="closed", concurrency=1),),
        lengths=tuple(given.lengths),
        output_tokens=given.output_tokens,
        requests=given.requests,
        warmup=1,
        pattern="one-at-a-time",
        seed=number,
    )
    both = [engine, door] if number % 2 == 0 else [door, engine]
    report = bench(both, asked, tokens, Provenance(f"engine alone, {name}"), Silent())
    for run in report.runs:
        for flag in (*run.flags(), *run.errors()):
            bench_quantize.say(f"  {name}: RED FLAG: {flag}")
    if given.out:
        write(report, given.out / f"{name}-{number + 1}.json")
    return report


def measured(given: argparse.Namespace, tokens: Tokens) -> dict[str, list[Report]]:
    found: dict[str, list[Report]] = {name: [] for name in DOORS}
    with bench_peers.ours(given, f"{given.shape}-doors", reuse=False, gateway=True) as doors:
        (served,) = (one for one in family(doors["gRPC"].url) if "engine_process.py" in " ".join(one.cmdline()))
        with alone(served, given, tokens) as engine:
            for number in range(given.rounds):
                for name in DOORS:
                    bench_quantize.say(f"round {number + 1} of {given.rounds}: {name}")
                    found[name].append(compared(engine, doors[name], name, number, given, tokens))
                    show({name: found[name]}, given)
    return found


def pairs(reports: Sequence[Report], size: int) -> Iterator[tuple[Request, Request]]:
    """(by the engine alone, through the door) of one prompt each, where both were answered."""
    for report in reports:
        first = [service.door for service in report.services].index("in-process")
        for run in report.runs:
            if run.conditions.input_tokens == size:
                own = {one.prompt: one for one in run.of(first) if not one.error}
                through = {one.prompt: one for one in run.of(1 - first) if not one.error}
                yield from ((own[prompt], through[prompt]) for prompt in sorted(own.keys() & through.keys()))


def show(found: dict[str, list[Report]], given: argparse.Namespace) -> None:
    print(
        "\n| tokens in | door | pairs | TTFT p50 alone | through | added TTFT p50 | ITL p50 alone | through | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for size in given.lengths:
        for name, reports in found.items():
            both = list(pairs(reports, size))
            print(f"| {size} | {name} | {len(both)} | {' | '.join(cells(both))} |", flush=True)


def cells(both: Sequence[tuple[Request, Request]]) -> Iterator[str]:
    for quantity in ("ttft_s", "itl_s"):
        values = [(getattr(own, quantity), getattr(through, quantity)) for own, through in both]
        values = [(own, through) for own, through in values if own and through]
        if not values:
            yield from ("-", "-", "-")
            continue
        yield from (f"{percentile([pair[side] for pair in values], 50) * 1000:.1f} ms" for side in (0, 1))
        if quantity == "ttft_s":
            middle = median_with_interval([1000 * (through - own) for own, through in values])
            yield "{:+.1f} ms ({:+.1f} to {:+.1f})".format(*middle)
        else:
            yield "{:.3f} ({:.3f} - {:.3f})".format(*median_with_interval([through / own for own, through in values]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=bench_quantize.SHAPES, default="1b")
    parser.add_argument("--lengths", type=bench_peers.numbers, default=[512, 2048], help="tokens of prompts")
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=8, help="pairs of each length and door in a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", type=Path, required=True, help="models and artifacts stay here for the next time")
    parser.add_argument("--out", type=Path, help="a folder for the reports of each round")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    given.work, given.model = given.work.resolve(), given.work.resolve() / f"model-{given.shape}"
    given.room = max(given.lengths) + given.output_tokens + 64
    return given


def main() -> None:
    given = parse()
    peer_model.make(given.model, given.shape)
    loaded = Tokens.load(given.model)
    tokens = bench_peers.Counted(loaded.tokenizer, loaded.sha256, output=given.output_tokens)
    found = measured(given, tokens)
    print(f"\nRounds: {given.rounds}. Intervals are 95 %, bootstrapped over pairs.")
    show(found, given)


if __name__ == "__main__":
    main()
