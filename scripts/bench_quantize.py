"""Quantize a Llama of random weights, whole, and compare it with a plain copy of the same bytes on the same disk.

    python scripts/bench_quantize.py --shape 13b --runs int4-mse,int4-modelopt,fp8 --work /somewhere/with/room
    python scripts/bench_quantize.py --shape 13b --runs fp8-calibrated,awq --work /somewhere/with/room

Makes the checkpoint on the spot (normal-like fp16 values, a few large channels in the norms, shards of up to 5 GB).
Calibrated runs see --samples rows of --tokens random token ids. Then, for each run: a plain copy
(read, write, fsync, in pieces), deleted again, and `quantize` with its stamp and rename in a process of its own.
Both start with the page cache of the model's files dropped (posix_fadvise DONTNEED; --warm leaves it alone), and both
end with fsynced bytes. Wall time of quantize is that of its whole process, imports included. With --engine, each result
is also copied plainly and built into the CPU engine, measured in the same way. It measures; it judges nothing and holds
no product logic.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHAPES = {  # hidden, intermediate, layers, heads, kv heads, vocabulary
    "13b": (5120, 13824, 40, 40, 40, 32000),
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "1b": (2048, 5632, 22, 32, 4, 32000),
    "tiny": (256, 768, 4, 4, 2, 2048),
}
RUNS: dict[str, dict[str, Any]] = {  # what `quantize` is told; those with a "method" or "calibrated" see tokens
    "int4-mse": {"weights": "int4", "scales": "mse"},
    "int4-modelopt": {"weights": "int4", "scales": "modelopt"},
    "fp8": {"weights": "fp8"},
    "fp8-calibrated": {"weights": "fp8", "kv": "fp8", "calibrated": True},
    "awq": {"weights": "int4", "scales": "mse", "method": "awq", "kv": "int8", "calibrated": True},
    "gptq": {"weights": "int4", "scales": "mse", "method": "gptq", "kv": "int8", "calibrated": True},
}
OUTLIERS, OUTLIER_SIZE = 8, 12.0  # channels of each norm that are so many times as large as the others
PIECE = 16 * 2**20
BLOCK = 64 * 2**20  # distinct random values: 128 MiB of fp16, read from ever new offsets


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b", help="which Llama to imitate (default 1b)")
    parser.add_argument("--runs", default="int4-mse", help=f"comma-separated, of {', '.join(RUNS)}")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=4, help="rows of token ids in calibrated runs (default 4)")
    parser.add_argument("--tokens", type=int, default=256, help="token ids in each row (default 256)")
    parser.add_argument("--work", type=Path, default=Path("bench-quantize"), help="where to write; removed at the end")
    parser.add_argument("--keep", action="store_true", help="keep the random checkpoint, and use it next time")
    parser.add_argument("--warm", action="store_true", help="do not drop the page cache before each measurement")
    parser.add_argument("--engine", action="store_true", help="build the CPU engine from each result, too")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    parser.add_argument("--child", nargs=3, metavar=("MODEL", "OUT", "RUN"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if unknown := [run for run in args.runs.split(",") if run not in RUNS]:
        parser.error(f"unknown run {unknown[0]!r}; there are {', '.join(RUNS)}")
    return args


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- the random checkpoint -------------------------------------------------------------------------------------------


def hf_config(shape: str) -> dict[str, Any]:
    hidden, inner, layers, heads, kv_heads, vocab = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float16",
    }


def plan(shape: str) -> list[Any]:
    from toolchain import family
    from toolchain.quantizers.shards import Unit, plan_shards
    from toolchain.safetensors_file import TensorPlan

    shapes = family.expected_tensors(family.read_config(hf_config(shape), shape))
    units = [Unit(name, (TensorPlan(name, "F16", size),)) for name, size in shapes.items()]
    return plan_shards(units, 5 * 10**9)


def make(folder: Path, shape: str) -> int:
    """Write the checkpoint, unless it is there already. -> its bytes."""
    from toolchain.quantizers.shards import INDEX, index_document

    shards = plan(shape)
    total = sum(unit.nbytes for shard in shards for unit in shard.units)
    if (folder / "config.json").exists():
        say(f"{folder}: made earlier")
        return total
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    say(f"making a {shape} checkpoint, {total / 1e9:.1f} GB")
    write_random(folder, shards, total)
    if len(shards) > 1:
        (folder / INDEX).write_text(index_document({shard.file: shard.tensor_bytes for shard in shards}))
    (folder / "config.json").write_text(json.dumps(hf_config(shape), indent=2))
    return total


def write_random(folder: Path, shards: list[Any], total: int) -> None:
    import numpy as np

    from toolchain.quantizers.shards import ShardWriter

    random = np.random.default_rng(0)
    block = np.concatenate(
        [(random.standard_normal(BLOCK // 16, np.float32) * 0.02).astype(np.float16) for _ in range(16)]
    )
    norm = np.ones(max(size[0] for size in SHAPES.values()), np.float16)
    norm[random.choice(SHAPES["tiny"][0], OUTLIERS, replace=False)] = OUTLIER_SIZE
    done = Ticker(total)
    with ShardWriter(folder, shards) as writer:
        for unit in writer.units_left:
            left = unit.nbytes // 2
            while left:
                count = min(left, PIECE // 2)
                start = int(random.integers(0, BLOCK - count))
                values = norm[:count] if "norm" in unit.name else block[start : start + count]
                writer.put(unit.name, values.view(np.uint8))
                done(count * 2)
                left -= count
            writer.end_unit()


class Ticker:
    """A line every ten seconds."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.said = total, 0, time.monotonic()

    def __call__(self, count: int) -> None:
        self.done += count
        if time.monotonic() - self.said > 10:
            self.said = time.monotonic()
            say(f"  {self.done / self.total:4.0%}")


# --- what is measured ------------------------------------------------------------------------------------------------


def drop_cache(files: Iterable[Path]) -> None:
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy(model: Path, target: Path, total: int) -> float:
    """Seconds to read, write and fsync every file, in pieces."""
    target.mkdir(parents=True)
    buffer, tick, start = bytearray(PIECE), Ticker(total), time.monotonic()
    for file in sorted(model.iterdir()):
        with file.open("rb", buffering=0) as source, (target / file.name).open("wb", buffering=0) as sink:
            while count := source.readinto(buffer):
                view = memoryview(buffer)[:count]
                while view:
                    view = view[sink.write(view) :]
                tick(count)
            os.fsync(sink.fileno())
    return time.monotonic() - start


class Lines:
    """A stage's progress as a line every ten seconds."""

    def task(self, label: str, total: int, unit: str) -> Lines:
        self.advance = Ticker(total)
        return self

    def describe(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        say(text)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def child(source: str, out: str, run: str, args: argparse.Namespace) -> None:
    """In a process of its own: quantize (or build), commit, and print what the kernel says about this process."""
    from toolchain import workspace
    from toolchain.checkpoint import Checkpoint

    start, anonymous = time.monotonic(), AnonymousMemory()
    checkpoint = Checkpoint.open(Path(source))
    with workspace.draft(Path(out), "bench", {"run": run}) as draft:
        if run == "engine":
            from toolchain.backends import openvino

            openvino.build(checkpoint, draft.path, Lines())
        else:
            from toolchain.stages.quantize import quantize

            words = {"group_size": args.group_size, "scales": "modelopt", "kv": "fp16", **RUNS[run]}
            samples = random_samples(checkpoint.config.vocab_size, args) if words.pop("calibrated", False) else None
            quantize(checkpoint, draft, **words, samples=samples, progress=Lines())
        draft.commit(versions={}, recipe="")
    measured = {"peak_anonymous_bytes": anonymous.stop(), **self_measured()}
    print(json.dumps({"stage_s": time.monotonic() - start, **measured}))


def random_samples(vocabulary: int, args: argparse.Namespace) -> Any:
    import hashlib

    import numpy as np

    from toolchain.quantizers.samples import Samples

    ids = np.random.default_rng(1).integers(0, vocabulary, (args.samples, args.tokens)).astype(np.int32)
    return Samples(token_ids=ids, digest=hashlib.sha256(ids.tobytes()).hexdigest(), source="random token ids")


class AnonymousMemory:
    """The largest RssAnon of this process, looked at 20 times a second: memory that no file stands behind."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self.peak_bytes

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            lines = Path("/proc/self/status").read_text().splitlines()
            now = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            self.peak_bytes = max(self.peak_bytes, now * 1024)


def self_measured() -> dict[str, Any]:
    def table(name: str) -> dict[str, int]:
        lines = (line.split() for line in Path(f"/proc/self/{name}").read_text().splitlines())
        return {line[0].rstrip(":"): int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}

    status, io = table("status"), table("io")
    cpu = os.times()
    return {
        "peak_rss_bytes": status["VmHWM"] * 1024,
        "read_bytes": io["read_bytes"],
        "written_bytes": io["write_bytes"],
        "cpu_s": cpu.user + cpu.system,
    }


def in_child(source: Path, out: Path, run: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", str(source), str(out), run]
    for flag in ("group_size", "samples", "tokens"):
        command += [f"--{flag.replace('_', '-')}", str(getattr(args, flag))]
    return measured_child(command, out)


def measured_child(command: list[str], out: Path) -> dict[str, Any]:
    """What the process says of itself in its last line, its wall time, imports included, and the size of ``out``."""
    start = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    wall_s = time.monotonic() - start
    size = sum(file.stat().st_size for file in out.iterdir())
    return {"wall_s": wall_s, **json.loads(done.stdout.splitlines()[-1]), "artifact_bytes": size}


def measure(source: Path, run: str, out: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A plain copy of ``source``, then ``run`` on it into ``out``, which stays."""
    copied = args.work / "copy"
    for folder in (copied, out):
        shutil.rmtree(folder, ignore_errors=True)
    total = sum(file.stat().st_size for file in source.iterdir())
    prepare(source, args)
    load = [os.getloadavg()[0]]
    say("plain copy")
    copy_s = copy(source, copied, total)
    shutil.rmtree(copied)
    prepare(source, args)
    load.append(os.getloadavg()[0])
    say(run)
    row = {"run": run, "copy_s": copy_s, **in_child(source, out, run, args)}
    load.append(os.getloadavg()[0])
    if run in RUNS:
        errors = json.loads((out / "quantization_report.json").read_text())["relative_error"].values()
        row["mean_relative_error"] = sum(errors) / len(errors)
    row |= {"ratio": row["wall_s"] / copy_s, "load": [round(value, 2) for value in load]}
    say(json.dumps(row))
    return row


def measure_all(model: Path, args: argparse.Namespace) -> Iterable[dict[str, Any]]:
    for run in args.runs.split(","):
        out = args.work / f"out-{run}"
        yield measure(model, run, out, args)
        if args.engine:
            engine = args.work / "out-engine"
            yield measure(out, "engine", engine, args) | {"of": run}
            shutil.rmtree(engine)
        shutil.rmtree(out)


def prepare(model: Path, args: argparse.Namespace) -> None:
    os.sync()
    if not args.warm:
        drop_cache(model.iterdir())


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.child:
        child(*args.child, args)
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    model = args.work / f"model-{args.shape}"
    total = sum(unit.nbytes for shard in plan(args.shape) for unit in shard.units)
    needed = total * (1 if (model / "config.json").exists() else 2) + 2**30
    free = shutil.disk_usage(args.work).free
    if free < needed:
        say(f"{args.work}: {needed / 1e9:.0f} GB are needed here, {free / 1e9:.0f} GB are free. Name another: --work")
        return 5
    try:
        make(model, args.shape)
        rows = list(measure_all(model, args))
    finally:
        clean(args, model)
    show(args, total, rows)
    return 0


def clean(args: argparse.Namespace, model: Path) -> None:
    for path in args.work.iterdir():
        if path.name.startswith((".out-", "out-", "copy")) or (path == model and not args.keep):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not any(args.work.iterdir()):
        args.work.rmdir()


def show(args: argparse.Namespace, total: int, rows: list[dict[str, Any]]) -> None:
    cache = "as it was" if args.warm else "dropped before each measurement"
    head = {
        "shape": args.shape,
        "model_bytes": total,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "page_cache": cache,
    }
    if args.json:
        print(json.dumps({**head, "runs": rows}, indent=2))
        return
    print(f"{args.shape}, {total / 1e9:.2f} GB of fp16, {head['cores']} cores, page cache {cache}")
    print(
        "run             copy s      wall s  ratio  peak RSS MiB  anonymous MiB  read GB  written GB  CPU s  rel. error"
        "  load"
    )
    for row in rows:
        error = f"{row['mean_relative_error']:.4f}" if "mean_relative_error" in row else "-"
        print(
            f"{row['run']:15} {row['copy_s']:6.1f}  {row['wall_s']:10.1f}  {row['ratio']:5.2f}  "
            f"{row['peak_rss_bytes'] / 2**20:12.0f}  {row['peak_anonymous_bytes'] / 2**20:13.0f}  "
            f"{row['read_bytes'] / 1e9:7.2f}  "
            f"{row['written_bytes'] / 1e9:10.2f}  {row['cpu_s']:5.0f}  {error:>10}  "
            f"{row['load']}"
        )


if __name__ == "__main__":
    sys.exit(main())
