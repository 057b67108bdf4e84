"""Our Triton endpoint beside llama.cpp's server and transformers: one Llama, the same prompts, in turns.

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36      # its sdist holds llama.cpp, server included
    tar xzf llama_cpp_python-*.tar.gz && cmake -S llama_cpp_python-*/vendor/llama.cpp -B build -G Ninja \\
      -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF \\
      -DLLAMA_USE_PREBUILT_UI=OFF
    ninja -C build llama-server llama-quantize
    python scripts/bench_peers.py --llama-cpp build/bin --work DIR          # the peers
    python scripts/bench_peers.py --peers ours --shape 13b --lengths 512 --concurrency 1 --work DIR

Each server runs alone: started, warmed up, measured, stopped; the next round begins with the next one. All ignore the
end of text, and are asked for exactly as many tokens. A round has prompts of its own, the same for every server. "ours"
is int4 in groups of 128 with 16-bit activations (W4A16), "ours-int8" the same engine with `cpu.activations: int8`.
llama.cpp's Q4_0 is groups of 32, and it rounds activations to 8 bits; transformers has 16 or 32-bit weights
(`--dtype`), and one request at a time. The tables are
Markdown; ratios are medians with 95 % bootstrap intervals over all requests of all rounds. `--out` keeps the reports.
What our own doors cost, against the engine without a server: `bench_doors.py`.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts import bench_quantize, peer_model  # noqa: E402
from toolchain.measuring.doors import Door  # noqa: E402
from toolchain.measuring.prompts import Tokens  # noqa: E402
from toolchain.measuring.report import Load, Report, Run, write  # noqa: E402
from toolchain.measuring.statistics import percentile, ratio_of_percentiles, ratio_of_rates  # noqa: E402
from toolchain.progress import Silent  # noqa: E402
from toolchain.stages.bench import Asked, Provenance, bench  # noqa: E402

RECIPE = """\
name: {name}
model: {model}
device: cpu
quantization: {{weights: int4, group_size: 128}}
kv_cache: {{dtype: int8, reuse: {reuse}}}
limits: {{max_batch_size: 16, max_seq_len: {tokens}}}
cpu: {{activations: {activations}}}
"""
PEERS = ("ours", "ours-int8", "llama.cpp", "transformers")


@dataclass(frozen=True)
class Counted(Tokens):
    """Random weights give random text, which can be cut into tokens in other ways: what was asked for counts."""

    output: int = 64

    def of_answer(self, text: str) -> int:
        return self.output


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def running(argv: Sequence[str], ready: Any, log: Path, environment: dict[str, str] | None = None) -> Iterator[None]:
    """A server in a group of its own, from ``ready()`` on."""
    environment = environment or {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("w") as out:
        server = subprocess.Popen(argv, stdout=out, stderr=out, start_new_session=True, env=environment)
        try:
            deadline = time.monotonic() + 900
            while not ready():
                if server.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{argv[0]} did not start: see {log}")
                time.sleep(0.2)
            yield
        finally:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(60)
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def answers(url: str) -> bool:
    with suppress(OSError):
        return urllib.request.urlopen(url, timeout=2).status == 200
    return False


@contextmanager
def ours(
    given: argparse.Namespace, name: str, *, reuse: bool = True, activations: str = "full", gateway: bool = False
) -> Iterator[dict[str, Door]]:
    """Built unless it is, and served; with ``reuse`` it keeps prompts in its cache. -> doors by name."""
    cli = [sys.executable, "-m", "toolchain.cli"]
    recipe = given.work / f"{name}.yaml"
    told = {"tokens": given.room, "reuse": str(reuse).lower(), "activations": activations}
    recipe.write_text(RECIPE.format(name=name, model=given.model, **told))
    common = ["--recipe", str(recipe), "--work", str(given.work / "artifacts")]
    subprocess.run([*cli, "build", *common], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    http, grpc, metrics, openai = (free_port() for _ in range(4))
    ports = ["--http-port", str(http), "--grpc-port", str(grpc), "--metrics-port", str(metrics)]
    more = ["--gateway", "--gateway-port", str(openai), "--no-predict"] if gateway else []
    log, exactly = given.work / "serve.log", {"min_tokens": given.output_tokens}  # it has no ignore_eos
    with running([*cli, "serve", *common, *ports, *more], lambda: "Ctrl-C" in log.read_text(), log):
        yield {
            "gRPC": Door("triton-grpc", f"127.0.0.1:{grpc}", "tensorrt_llm_bls", ignore_eos=True),
            "HTTP": Door("triton-http", f"http://127.0.0.1:{http}", "tensorrt_llm_bls", ignore_eos=True),
            "gateway": Door("openai-completions", f"http://127.0.0.1:{openai}/v1", name, extra=exactly),
        }


@contextmanager
def peer(name: str, given: argparse.Namespace) -> Iterator[Door]:
    """One server, alone on the machine."""
    if name.startswith("ours"):
        with ours(given, f"{given.shape}-{name}", activations="int8" if name == "ours-int8" else "full") as doors:
            yield doors["gRPC"]
        return
    port, log = free_port(), given.work / f"{name}.log"
    base = f"http://127.0.0.1:{port}"
    if name == "transformers":
        script = str(ROOT / "scripts" / "peer_transformers.py")
        argv = [sys.executable, script, str(given.model), str(port), "--dtype", given.dtype]
        with running(argv, lambda: answers(f"{base}/v1/models"), log):
            yield Door("openai-completions", f"{base}/v1", "peer")
        return
    slots = max(given.concurrency)
    file = peer_model.write_gguf(given.model, given.work / "gguf", str(given.llama_cpp / "llama-quantize"), "Q4_0")
    argv = [str(given.llama_cpp / "llama-server"), "-m", str(file), "--host", "127.0.0.1", "--port", str(port)]
    argv += ["-np", str(slots), "-c", str(slots * given.room), "-t", str(given.threads), "-tb", str(given.threads)]
    with running(argv, lambda: answers(f"{base}/health"), log):
        yield Door("openai-completions", f"{base}/v1", "peer", extra={"ignore_eos": True, "cache_prompt": False})


def measured(door: Any, name: str, given: argparse.Namespace, seed: int, tokens: Tokens) -> list[Report]:
    """One report for each load: as many requests as asked for, and at least as many as run at once."""
    found = []
    for place, many in enumerate(given.concurrency):
        if many > 1 and name == "transformers":  # it answers one request after the other: more of them only wait
            continue
        asked = Asked(
            loads=(Load(kind="closed", concurrency=many),),
            lengths=tuple(given.lengths),
            output_tokens=given.output_tokens,
            requests=max(given.requests, many),
            warmup=1,
            seed=seed * len(given.concurrency) + place,  # prompts of its own: a server may keep those before
        )
        report = bench([door], asked, tokens, Provenance(name), Silent())
        for run in report.runs:
            tell(name, run)
        if given.out:
            write(report, given.out / f"{name}-{seed + 1}-at-once-{many}.json")
        found.append(report)
    return found


def tell(name: str, run: Run) -> None:
    """A line of what was measured, and of all that is wrong with it."""
    found = run.summary()
    middles = [f"{key[:-2]} p50 {found[key]['p50'] * 1000:.1f} ms" for key in ("ttft_s", "itl_s") if found[key]]
    bench_quantize.say(
        f"  {name}: {run.conditions.input_tokens} in, {run.conditions.load}: {', '.join(middles)}, "
        f"{found['tokens_per_s']:.1f} tokens/s; load {os.getloadavg()[0]:.1f}"
    )
    for flag in (*run.flags(), *run.errors()):
        bench_quantize.say(f"  {name}: RED FLAG: {flag}")


def rounds_of_peers(given: argparse.Namespace, tokens: Tokens) -> dict[str, list[Report]]:
    found: dict[str, list[Report]] = {name: [] for name in given.peers}
    for number in range(given.rounds):
        turn = number % len(given.peers)
        for name in (*given.peers[turn:], *given.peers[:turn]):
            bench_quantize.say(f"round {number + 1} of {given.rounds}: {name}")
            with peer(name, given) as door:
                found[name].extend(measured(door, name, given, number, tokens))
    return found


def runs_of(reports: Sequence[Report], size: int, many: int) -> list[Run]:
    return [
        run
        for report in reports
        for run in report.runs
        if (run.conditions.input_tokens, run.conditions.load.concurrency) == (size, many)
    ]


def show(found: dict[str, list[Report]], given: argparse.Namespace) -> None:
    """Medians of each, and every ratio to the first."""
    first = next(iter(found))
    print(f"\nOf all {given.rounds} rounds of {given.requests} requests, or as many as run at once.")
    print(f"Ratios are to {first}, with 95 % intervals.\n")
    print("| tokens in | at once | | TTFT p50 | ratio | ITL p50 | ratio | tokens/s | ratio | RSS |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for size in given.lengths:
        for many in given.concurrency:
            base = runs_of(found[first], size, many)
            for name, reports in found.items():
                if runs := base if name == first else runs_of(reports, size, many):
                    print(f"| {size} | {many} | {name} | {' | '.join(cells(runs, base))} |")


def cells(runs: Sequence[Run], base: Sequence[Run]) -> Iterator[str]:
    for quantity in ("ttft_s", "itl_s"):
        own, other = ([value for run in side for value in run.values(quantity)] for side in (runs, base))  # type: ignore[arg-type]
        yield f"{percentile(own, 50) * 1000:.1f} ms" if own else "-"
        yield "" if runs is base or not own or not other else interval(ratio_of_percentiles(other, own))
    yield f"{sum(float(run.summary()['tokens_per_s']) for run in runs) / len(runs):.1f}"
    yield "" if runs is base else interval(ratio_of_rates(amounts(base), amounts(runs)))
    seen = [one.rss_bytes for run in runs for one in run.memory if one.rss_bytes]
    yield f"{max(seen) / 2**20:.0f} MiB" if seen else "-"


def amounts(runs: Sequence[Run]) -> list[tuple[float, float]]:
    """(tokens, seconds) of each answer."""
    return [(one.output_tokens, one.e2e_s) for run in runs for one in run.requests if one.e2e_s]


def interval(ratio: Any) -> str:
    return f"{ratio.value:.3f} ({ratio.low:.3f} - {ratio.high:.3f})"


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=bench_quantize.SHAPES, default="1b")
    parser.add_argument("--peers", type=lambda text: text.split(","), default=list(PEERS), help=",".join(PEERS))
    parser.add_argument("--llama-cpp", type=Path, help="the folder of llama-server and llama-quantize")
    parser.add_argument("--dtype", default="bfloat16", help="of transformers: bfloat16 or float32, whichever is faster")
    parser.add_argument("--lengths", type=numbers, default=[512, 2048], help="tokens of prompts (default 512,2048)")
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=numbers, default=[1, 4, 16], help="default 1,4,16")
    parser.add_argument("--requests", type=int, default=16, help="of each length and load in a round, at least")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of llama.cpp")
    parser.add_argument("--work", type=Path, required=True, help="models and artifacts stay here for the next time")
    parser.add_argument("--out", type=Path, help="a folder for the reports of each round")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    given.work, given.model = given.work.resolve(), given.work.resolve() / f"model-{given.shape}"
    given.room = max(given.lengths) + given.output_tokens + 64
    if "llama.cpp" in given.peers and not (given.llama_cpp and given.llama_cpp.is_dir()):
        parser.error("--llama-cpp DIR: see the commands above, or --peers ours,transformers")
    return given


def main() -> None:
    given = parse()
    peer_model.make(given.model, given.shape)
    loaded = Tokens.load(given.model)
    tokens = Counted(loaded.tokenizer, loaded.sha256, output=given.output_tokens)
    show(rounds_of_peers(given, tokens), given)


if __name__ == "__main__":
    main()
