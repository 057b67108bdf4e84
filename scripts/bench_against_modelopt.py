"""Our quantizers and NVIDIA ModelOpt 0.47.0 side by side: seconds, memory, and how good the result is.

    make test-oracle                                    # once: the environment .venv-oracle
    python scripts/bench_against_modelopt.py --json bench.json

Shapes: one decoder layer of Llama-2-13B, and a whole model of TinyLlama's shape (1.1B), random weights in bfloat16 with
outlier channels, 1024 calibration tokens as one batch. Each step is a process of its own, from a folder to a finished
folder, ours and ModelOpt's in turn; medians over --repeat. Memory is that of the process: RssAnon is what the system
cannot drop (sampled every 50 ms), RSS counts mapped files too. The model's files are in the page cache for both. Errors
are relative, in float32, on tokens that nothing was calibrated on. It measures; it judges nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STEP = HERE / "bench_one_quantizer.py"
SHAPES = ("layer-13b", "1b", "tiny")
RUNS = ("fp8-pack", "fp8", "awq", "awq-amax")
ROOM_BYTES = {"layer-13b": 3 * 10**9, "1b": 8 * 10**9, "tiny": 10**8}
POLL_S = 0.05


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="layer-13b,1b", help=f"comma-separated, of {', '.join(SHAPES)}")
    parser.add_argument("--runs", default="fp8-pack,fp8,awq", help=f"comma-separated, of {', '.join(RUNS)}")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--oracle", type=Path, default=HERE.parent / ".venv-oracle/bin/python")
    parser.add_argument("--work", type=Path, default=Path("bench-modelopt"), help="where to write; removed at the end")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured there")
    args = parser.parse_args(argv)
    for given, known in ((args.shape, SHAPES), (args.runs, RUNS)):
        if unknown := [one for one in given.split(",") if one not in known]:
            parser.error(f"unknown {unknown[0]!r}; there are {', '.join(known)}")
    if not args.oracle.exists():
        parser.error(f"{args.oracle} is not there: make test-oracle, or name another Python: --oracle")
    return args


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def step(python: Path | str, *arguments: object) -> dict[str, Any]:
    """Run one step. -> what it printed, its wall time and peak memory."""
    start = time.monotonic()
    command = [str(python), str(STEP), *map(str, arguments)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    anonymous = resident = 0
    try:
        while child.poll() is None:
            status = memory_of(child.pid)
            anonymous, resident = max(anonymous, status.get("RssAnon", 0)), max(resident, status.get("VmHWM", 0))
            time.sleep(POLL_S)
    finally:
        child.kill()  # does nothing to a finished one
    wall_s = time.monotonic() - start
    out, err = child.communicate()
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{err[-4000:]}")
    measured = {"wall_s": wall_s, "peak_anon_bytes": anonymous * 1024, "peak_rss_bytes": resident * 1024}
    return measured | dict(json.loads(out.splitlines()[-1]))


def memory_of(pid: int) -> dict[str, int]:
    """KiB by name; empty for a process that has just ended."""
    try:
        lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return {line[0].rstrip(":"): int(line[1]) for line in lines if line[0] in ("RssAnon:", "VmHWM:")}
    except (OSError, IndexError):
        return {}


def measure(shape: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every run of one shape. The model and each result are removed."""
    model, rows = args.work / f"model-{shape}", []
    say(f"making {shape}")
    size = step(sys.executable, "make", shape, model, args.tokens)["model_bytes"]
    for round_ in range(args.repeat):
        for run in args.runs.split(","):
            order = [("ours", sys.executable), ("modelopt", args.oracle)]
            for who, python in order if round_ % 2 == 0 else reversed(order):
                os.sync()
                load = round(os.getloadavg()[0], 2)
                row = {"shape": shape, "run": run, "who": who, "model_bytes": size, "load": load}
                rows.append(row | one(who, python, run, model, args.work / "out", first=round_ == 0))
                say(json.dumps(rows[-1]))
    shutil.rmtree(model)
    return rows


def one(who: str, python: Path | str, run: str, model: Path, out: Path, *, first: bool) -> dict[str, Any]:
    if run == "fp8-pack":
        return step(python, f"pack-{who}", model)
    try:
        found = step(python, who, run, model, out)
        found["artifact_bytes"] = sum(file.stat().st_size for file in out.iterdir())
        if first:
            errors = step(sys.executable, "errors", model, out)
            found |= {name: errors[name] for name in ("layer_error", "logit_error")}
        return found
    finally:
        shutil.rmtree(out, ignore_errors=True)


def medians(rows: list[dict[str, Any]], **which: str) -> dict[str, float]:
    chosen = [row for row in rows if all(row[key] == value for key, value in which.items())]
    numbers = {key for row in chosen for key, value in row.items() if isinstance(value, float | int)}
    return {key: statistics.median(row[key] for row in chosen if key in row) for key in numbers}


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["shape      run       who        wall s  work s  pack s  RssAnon MiB  RSS MiB  layer err  logit err"]
    for shape, run in dict.fromkeys((row["shape"], row["run"]) for row in rows):
        sides = {who: medians(rows, shape=shape, run=run, who=who) for who in ("ours", "modelopt")}
        for who, found in sides.items():
            seconds = "".join(cell(found.get(key), 8, ".2f") for key in ("wall_s", "work_s", "pack_s"))
            sizes = cell(found["peak_anon_bytes"] / 2**20, 13, ".0f") + cell(found["peak_rss_bytes"] / 2**20, 9, ".0f")
            quality = "".join(cell(found.get(key), 11, ".4f") for key in ("layer_error", "logit_error"))
            lines.append(f"{shape:10} {run:9} {who:8}{seconds}{sizes}{quality}")
        compared = ("pack_s",) if run == "fp8-pack" else ("wall_s", "work_s", "peak_anon_bytes", "peak_rss_bytes")
        ratios = (f"{key} {sides['modelopt'][key] / sides['ours'][key]:.2f}" for key in compared)
        lines.append(f"{'':10} {run:9} ModelOpt / ours: {', '.join(ratios)}")
    return "\n".join(lines)


def cell(value: float | None, width: int, form: str) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    cpus = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": cpus[0].partition(":")[2].strip() if cpus else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "python": platform.python_version(),
        "tokens": args.tokens,
        "repeat": args.repeat,
        "dtype": "bfloat16",
        "group_size": 128,
        "page_cache": "warm",
    }


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    shapes = args.shape.split(",")
    args.work.mkdir(parents=True)
    needed, free = max(ROOM_BYTES[shape] for shape in shapes), shutil.disk_usage(args.work).free
    rows: list[dict[str, Any]] = []
    try:
        if free < needed:
            say(f"{args.work}: {needed / 1e9:.0f} GB are needed here, {free / 1e9:.0f} GB are free. Another: --work")
            return 5
        for shape in shapes:
            rows += measure(shape, args)
            if args.json:
                args.json.write_text(json.dumps({"conditions": conditions(args), "runs": rows}, indent=2) + "\n")
    finally:
        shutil.rmtree(args.work, ignore_errors=True)
    print(json.dumps(conditions(args)))
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
