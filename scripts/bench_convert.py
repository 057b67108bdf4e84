"""Write TensorRT-LLM checkpoints of a Llama's shape, and compare with a plain copy of the same bytes on the same disk.

    python scripts/bench_convert.py --shape 13b --weights awq,fp8 --tp 1,2 --work /somewhere/with/room

Makes a quantized checkpoint of random codes on the spot, in the unified layout, a tensor at a time: W4A16_AWQ in groups
of 128 with pre_quant_scales, or FP8 with an FP8 cache. Then, --repeat times in turn: a plain copy of the quantized
checkpoint (read, write, fsync, in pieces), the same copy hashing what it reads (sha256, as every artifact of ours is
hashed), and `convert` with its stamp and rename, in a process of its own. Each starts with the page cache of what it
reads dropped (posix_fadvise DONTNEED; --warm leaves it alone) and ends with fsynced bytes; wall time of convert is that
of its whole process, imports included. It measures; it judges nothing and holds no product logic.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bench_quantize as bench  # noqa: E402

WEIGHTS: dict[str, dict[str, Any]] = {  # the words of ``layout.Scheme``
    "awq": {"weights": "int4", "method": "awq", "kv": "fp16"},
    "int4": {"weights": "int4", "method": "rtn", "kv": "fp16"},
    "fp8": {"weights": "fp8", "kv": "fp8"},
}
INPUT_SCALE, WEIGHT_SCALE, GROUP_SCALE = 0.02, 0.0003, 0.01
WAYS = ("copy", "hashing copy", "convert")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=bench.SHAPES, default="1b", help="which Llama to imitate (default 1b)")
    parser.add_argument("--layers", type=int, help="so many layers of that shape instead of all")
    parser.add_argument("--weights", default="awq,fp8", help=f"comma-separated, of {', '.join(WEIGHTS)}")
    parser.add_argument("--tp", default="1,2", help="comma-separated numbers of ranks (default 1,2)")
    parser.add_argument("--repeat", type=int, default=3, help="how often each is measured (default 3)")
    parser.add_argument("--work", type=Path, default=Path("bench-convert"), help="where to write; removed at the end")
    parser.add_argument("--warm", action="store_true", help="do not drop the page cache before each measurement")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    parser.add_argument("--child", nargs=3, metavar=("SOURCE", "OUT", "TP"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if unknown := [one for one in args.weights.split(",") if one not in WEIGHTS]:
        parser.error(f"unknown weights {unknown[0]!r}; there are {', '.join(WEIGHTS)}")
    return args


# --- the random quantized checkpoint ---------------------------------------------------------------------------------


def hf_config(args: argparse.Namespace) -> dict[str, Any]:
    config = bench.hf_config(args.shape)
    return config | ({"num_hidden_layers": args.layers} if args.layers else {})


def make(folder: Path, weights: str, args: argparse.Namespace) -> int:
    """Write a quantized checkpoint of random codes. -> its bytes."""
    from toolchain import family
    from toolchain.quantizers import layout
    from toolchain.quantizers.shards import INDEX, ShardWriter, index_document, plan_shards

    raw = hf_config(args)
    scheme = layout.Scheme(group_size=128, scales="modelopt", calibrated=True, **WEIGHTS[weights])
    units = layout.units(family.read_config(raw, args.shape), lambda _name: "F16", scheme)
    shards = plan_shards(units, 5 * 10**9)
    total = sum(unit.nbytes for unit in units)
    bench.say(f"making a {args.shape} checkpoint, {weights}, {raw['num_hidden_layers']} layers, {total / 1e9:.2f} GB")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    numbers = Numbers(scheme.weights)
    with ShardWriter(folder, shards) as writer:
        for unit in writer.units_left:
            for tensor in unit.tensors:
                for piece in numbers.of(tensor):
                    writer.put(tensor.name, piece)
            writer.end_unit()
    if len(shards) > 1:
        (folder / INDEX).write_text(index_document({shard.file: shard.tensor_bytes for shard in shards}))
    document = layout.hf_quant_config(scheme)
    raw["quantization_config"] = layout.quantization_config(document, static_inputs=True)
    (folder / layout.HF_QUANT_CONFIG).write_text(json.dumps(document, indent=2))
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    return total


class Numbers:
    """Random bytes of each kind of tensor, from one block that is read from ever new places."""

    def __init__(self, weights: str) -> None:
        import numpy as np

        self._random = np.random.default_rng(0)
        values = (self._random.standard_normal(bench.PIECE, np.float32) * 0.02).astype(np.float16)
        codes = self._random.integers(0, 256, 2 * bench.PIECE, np.uint8)
        if weights == "fp8":
            codes &= 0xF7  # no NaN, whose bits are all ones
        scale = WEIGHT_SCALE if weights == "fp8" else GROUP_SCALE
        scales = (1 + self._random.random(bench.PIECE, np.float32)).astype(np.float32) * np.float32(scale)
        self._blocks = {"F16": values.view(np.uint8), "F32": scales.view(np.uint8)}
        self._codes = codes
        self._one = {"weight_scale": WEIGHT_SCALE, "input_scale": INPUT_SCALE, "k_scale": 1.0, "v_scale": 1.0}

    def of(self, tensor: Any) -> Iterator[Any]:
        import numpy as np

        if not tensor.shape:
            value = self._one[tensor.name.rpartition(".")[2]]
            yield np.array([value], "<f4").view(np.uint8)
            return
        if tensor.name.endswith(".pre_quant_scale"):
            yield np.full(tensor.shape, 1.25, np.float16).view(np.uint8)
            return
        block, left = self._blocks.get(tensor.dtype, self._codes), tensor.nbytes
        while left:
            count = min(left, bench.PIECE)
            start = int(self._random.integers(0, (len(block) - count) // 4 + 1)) * 4
            yield block[start : start + count]
            left -= count


# --- what is measured ------------------------------------------------------------------------------------------------


def copy(source: Path, target: Path, *, hashing: bool) -> float:
    """Seconds to read, write and fsync every file, in pieces; with their sha256."""
    target.mkdir(parents=True)
    buffer, start = bytearray(bench.PIECE), time.monotonic()
    for file in sorted(source.iterdir()):
        digest = hashlib.sha256()
        with file.open("rb", buffering=0) as stream, (target / file.name).open("wb", buffering=0) as sink:
            while count := stream.readinto(buffer):
                view = memoryview(buffer)[:count]
                if hashing:
                    digest.update(view)
                while view:
                    view = view[sink.write(view) :]
            os.fsync(sink.fileno())
    return time.monotonic() - start


def child(source: str, out: str, tp: str) -> None:
    """In a process of its own: convert, commit, and print what the kernel says about this process."""
    from toolchain import workspace
    from toolchain.backends import tensorrt_llm
    from toolchain.checkpoint import Checkpoint

    start, anonymous = time.monotonic(), bench.AnonymousMemory()
    checkpoint = Checkpoint.open(Path(source))
    kv = "fp8" if checkpoint.quantization and checkpoint.quantization.kv_cache_quant_algo else "fp16"
    with workspace.draft(Path(out), "convert", {"bench": tp}) as draft:
        for file, digest in tensorrt_llm.write(checkpoint, draft.path, tp=int(tp), kv=kv).items():
            draft.known_hash(file, digest)
        draft.commit(versions={}, recipe="")
    measured = {"peak_anonymous_bytes": anonymous.stop(), **bench.self_measured()}
    print(json.dumps({"stage_s": time.monotonic() - start, **measured}))


def convert(source: Path, out: Path, tp: int) -> dict[str, Any]:
    return bench.measured_child([sys.executable, __file__, "--child", str(source), str(out), str(tp)], out)


def measure(source: Path, weights: str, tp: int, args: argparse.Namespace) -> dict[str, Any]:
    """Each of ``WAYS``, in turn, ``--repeat`` times."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    runs: list[dict[str, Any]] = []
    load = []
    for _ in range(args.repeat):
        for way in WAYS:
            out = args.work / "out"
            remove(args.work)
            bench.prepare(source, args)
            load.append(round(os.getloadavg()[0], 2))
            if way == "convert":
                runs.append(convert(source, out, tp))
                times[way].append(runs[-1]["wall_s"])
            else:
                times[way].append(copy(source, out, hashing=way == "hashing copy"))
            bench.say(f"{weights} tp {tp}, {way}: {times[way][-1]:.1f} s")
    remove(args.work)
    middle = {way: statistics.median(found) for way, found in times.items()}
    return {
        "weights": weights,
        "tp": tp,
        "times_s": times,
        "median_s": middle,
        "ratio": middle["convert"] / middle["copy"],
        "ratio_to_hashing": middle["convert"] / middle["hashing copy"],
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
        "peak_anonymous_bytes": max(run["peak_anonymous_bytes"] for run in runs),
        "cpu_s": statistics.median(run["cpu_s"] for run in runs),
        "artifact_bytes": runs[0]["artifact_bytes"],
        "source_bytes": sum(file.stat().st_size for file in source.iterdir()),
        "load": [min(load), max(load)],
    }


def remove(work: Path) -> None:
    """What a measurement wrote, with its lock."""
    for path in (*work.glob("out*"), *work.glob(".out*")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.child:
        child(*args.child)
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    rows = []
    model = args.work / "model"
    try:
        for weights in args.weights.split(","):
            total = make(model, weights, args)
            free = shutil.disk_usage(args.work).free
            if free < total * 1.1 + 2**30:
                bench.say(
                    f"{args.work}: {total / 1e9:.0f} GB more are needed, {free / 1e9:.0f} GB are free: --work DIR"
                )
                return 5
            rows += [measure(model, weights, int(tp), args) for tp in args.tp.split(",")]
    finally:
        remove(args.work)
        shutil.rmtree(model, ignore_errors=True)
        if not any(args.work.iterdir()):
            args.work.rmdir()
    show(args, rows)
    return 0


def show(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    cache = "as it was" if args.warm else "dropped before each measurement"
    head = {
        "shape": args.shape,
        "layers": hf_config(args)["num_hidden_layers"],
        "repeat": args.repeat,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "page_cache": cache,
    }
    if args.json:
        print(json.dumps({**head, "runs": rows}, indent=2))
        return
    print(f"{args.shape}, {head['layers']} layers, {head['cores']} cores, page cache {cache}; medians of {args.repeat}")
    print("weights  tp  input GB  output GB  copy s  hashing s  convert s  ratio  to hashing  RSS MiB  anon. MiB  CPU")
    for row in rows:
        middle = row["median_s"]
        print(
            f"{row['weights']:7} {row['tp']:3}  {row['source_bytes'] / 1e9:8.2f}  {row['artifact_bytes'] / 1e9:9.2f}  "
            f"{middle['copy']:6.1f}  {middle['hashing copy']:9.1f}  {middle['convert']:9.1f}  {row['ratio']:5.2f}  "
            f"{row['ratio_to_hashing']:10.2f}  {row['peak_rss_bytes'] / 2**20:7.0f}  "
            f"{row['peak_anonymous_bytes'] / 2**20:9.0f}  {row['cpu_s']:5.1f}   load {row['load']}"
        )


if __name__ == "__main__":
    sys.exit(main())
