"""`verify` on a Llama of random weights, whole: its memory and time, and what a kill -9 in the middle costs.

    python scripts/bench_verify.py --shape 13b --samples 2 --tokens 128 --work /somewhere/with/room

Makes the checkpoint on the spot and quantizes it (both as `bench_quantize.py` does), then measures what quantization
changed, on random token ids, in a process of its own: once from beginning to end, and once more killed by the kernel
(SIGKILL) in the middle and started again. Both must give the same report, or it ends with 1. Random weights say nothing
of quality. "Anonymous" memory is what the system cannot drop; peak RSS counts mapped pages of files, too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import bench_quantize as quantizing


class Killer(quantizing.Lines):
    """Progress as lines, and the end of this process where a layer begins."""

    def __init__(self, layer: int | None) -> None:
        self.layer = layer

    def describe(self, text: str) -> None:
        if self.layer is not None and text.startswith(f"layer {self.layer} of "):
            quantizing.say(f"  {text}: kill -9")
            os.kill(os.getpid(), signal.SIGKILL)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=quantizing.SHAPES, default="1b", help="which Llama to imitate (default 1b)")
    parser.add_argument("--run", choices=quantizing.RUNS, default="int4-mse", help="how it is quantized")
    parser.add_argument("--samples", type=int, default=2, help="rows of token ids (default 2)")
    parser.add_argument("--tokens", type=int, default=128, help="token ids in each row (default 128)")
    parser.add_argument("--max-ram", default="", help="what verify is told, such as 4GiB")
    parser.add_argument("--work", type=Path, default=Path("bench-verify"), help="where to write; removed at the end")
    parser.add_argument("--keep", action="store_true", help="keep both checkpoints, and use them next time")
    parser.add_argument("--group-size", type=int, default=128, help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=3, metavar=("MODEL", "QUANTIZED", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--kill-at", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def child(given: argparse.Namespace) -> None:
    """In a process of its own: verify, commit, and print what the kernel says about this process."""
    from toolchain import workspace
    from toolchain.checkpoint import Checkpoint
    from toolchain.quantizers.place import Place
    from toolchain.stages.verify import verify
    from toolchain.units import parse_bytes

    model, quantized, out = map(Path, given.child)
    anonymous, original = quantizing.AnonymousMemory(), Checkpoint.open(model)
    with workspace.draft(out, "verify", {}) as draft:
        verify(
            original,
            Checkpoint.open(quantized),
            draft,
            kvs=(),
            rounds_inputs=False,
            samples=quantizing.random_samples(original.config.vocab_size, given),
            progress=Killer(given.kill_at),
            place=Place(max_ram=parse_bytes(given.max_ram) if given.max_ram else None),
        )
        draft.commit(versions={}, recipe="")
    print(json.dumps({"peak_anonymous_bytes": anonymous.stop(), **quantizing.self_measured()}))


def command(given: argparse.Namespace, folders: list[Path], *more: str) -> list[str]:
    words = [sys.executable, __file__, "--child", *map(str, folders), "--max-ram", given.max_ram]
    return [*words, "--samples", str(given.samples), "--tokens", str(given.tokens), *more]


def measure(given: argparse.Namespace, model: Path, quantized: Path) -> list[dict[str, Any]]:
    """-> the run in one piece, then the two parts of the interrupted one."""
    layers = quantizing.SHAPES[given.shape][2]
    whole, parts = given.work / "out-whole", given.work / "out-parts"
    quantizing.drop_cache([*model.iterdir(), *quantized.iterdir()])
    quantizing.say("verify, in one piece")
    rows = [{"run": "in one piece"} | quantizing.measured_child(command(given, [model, quantized, whole]), whole)]
    quantizing.drop_cache([*model.iterdir(), *quantized.iterdir()])
    start, middle = time.monotonic(), layers // 2 + 1
    done = subprocess.run(command(given, [model, quantized, parts], "--kill-at", str(middle)), check=False)
    if done.returncode != -signal.SIGKILL:
        raise SystemExit(f"the interrupted run ended with {done.returncode}, not by the signal")
    rows.append({"run": f"until layer {middle} of {layers}, kill -9", "wall_s": time.monotonic() - start})
    rows.append({"run": "started again"} | quantizing.measured_child(command(given, [model, quantized, parts]), parts))
    reports = [json.loads((out / "report.json").read_text()) for out in (whole, parts)]
    if reports[0] != reports[1]:
        raise SystemExit("the interrupted run found something else than the run in one piece")
    measured = reports[0]["models"]["weights"]
    rows[0]["found"] = {name: measured[name] for name in ("perplexity_ratio", "kl", "top1_agreement")}
    return rows


def show(given: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    print(f"{given.shape}, {given.run}, {given.samples} x {given.tokens} tokens; load {os.getloadavg()[0]:.1f}\n")
    print("| run | wall s | anonymous | peak RSS | read | CPU s |\n|---|---|---|---|---|---|")
    for row in rows:
        cells = ["-"] * 4
        if "cpu_s" in row:
            memory = [f"{row[name] / 2**20:.0f} MiB" for name in ("peak_anonymous_bytes", "peak_rss_bytes")]
            cells = [*memory, f"{row['read_bytes'] / 1e9:.1f} GB", f"{row['cpu_s']:.0f}"]
        print(f"| {row['run']} | {row['wall_s']:.1f} | {' | '.join(cells)} |")
    print(f"\nBoth reports are equal: {json.dumps(rows[0]['found'])}")


def main() -> None:
    given = parse()
    if given.child:
        child(given)
        return
    given.work.mkdir(parents=True, exist_ok=True)
    model, quantized = given.work / f"model-{given.shape}", given.work / f"quantized-{given.shape}"
    try:
        quantizing.make(model, given.shape)
        if not (quantized / "stamp.json").exists():
            quantizing.say(f"quantize, {given.run}")
            quantizing.in_child(model, quantized, given.run, given)
        rows = measure(given, model, quantized)
    finally:
        for path in given.work.iterdir():
            if not given.keep or path not in (model, quantized):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    show(given, rows)


if __name__ == "__main__":
    main()
