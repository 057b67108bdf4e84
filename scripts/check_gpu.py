"""Is what a GPU quantizes what a CPU quantizes, and does a large model fit the memory that it was given?

    python scripts/check_gpu.py                                   # a small model on both: codes and scales compared
    python scripts/check_gpu.py --shape 13b --ways awq --max-vram 14GiB --samples 512 --tokens 512 --gpu-only

Makes a Llama of random weights with outlier channels, quantizes it on the CPU and on the GPU with the same samples and
prints, for each way, the share of codes that differ, by how much at most, the largest relative difference of scales,
seconds, and the peaks of RssAnon and of torch's memory on the GPU. Codes may differ where a sum in another order tips a
rounding: up to one in a hundred by one step is called "within rounding" for rtn and fp8. A search (awq) or a feedback
(gptq) turns such a difference into other codes of equal worth, so there the errors of the matrices are compared: within
one percent. Exit code 1 when a way is beyond that. --device cpu instead of a GPU shows that the script itself works.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import bench_quantize  # noqa: E402

WAYS: dict[str, dict[str, Any]] = {
    "rtn": {"weights": "int4", "scales": "mse", "kv": "int8"},
    "fp8": {"weights": "fp8", "scales": "modelopt", "kv": "fp8"},
    "awq": {"weights": "int4", "scales": "mse", "kv": "int8", "method": "awq"},
    "gptq": {"weights": "int4", "scales": "mse", "kv": "int8", "method": "gptq"},
}
LARGEST_SHARE = 0.01
LARGEST_ERROR_DIFFERENCE = 0.01


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=bench_quantize.SHAPES, default="tiny")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"comma-separated, of {', '.join(WAYS)}")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--max-ram")
    parser.add_argument("--max-vram")
    parser.add_argument("--gpu-only", action="store_true", help="no run on the CPU, nothing compared")
    parser.add_argument("--work", type=Path, default=Path("check-gpu"), help="where to write; removed at the end")
    return parser.parse_args()


class Peak(threading.Thread):
    """The largest RssAnon from ``start`` to ``stop``."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self._over = 0, threading.Event()

    def run(self) -> None:
        from toolchain.quantizers.place import resident

        while not self._over.wait(0.01):
            self.bytes = max(self.bytes, resident() or 0)

    def stop(self) -> int:
        self._over.set()
        self.join()
        return self.bytes


def add_outliers(model: Path) -> None:
    """Norm weights of one, but for every hundredth channel: 20. Written into the file, where they are 16-bit floats."""
    import numpy as np

    from toolchain.checkpoint import Checkpoint

    for info in Checkpoint.open(model).tensors.values():
        if "layernorm" in info.name:
            values = np.memmap(info.file, np.float16, "r+", info.offset, info.shape)
            values[::100] = 20
            values.flush()


def quantized(model: Path, out: Path, way: str, place: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Quantize into ``out``. -> seconds and peaks."""
    import numpy as np
    import torch

    from toolchain import workspace
    from toolchain.checkpoint import Checkpoint
    from toolchain.quantizers.samples import Samples
    from toolchain.stages.quantize import quantize

    checkpoint = Checkpoint.open(model)
    shape = (args.samples, args.tokens)
    ids = np.random.default_rng(0).integers(0, checkpoint.config.vocab_size, shape).astype(np.int32)
    samples = Samples(ids, "random", "random tokens")
    on_gpu = place.device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(torch.device(place.device))
    peak, start = Peak(), time.monotonic()
    peak.start()
    shutil.rmtree(out, ignore_errors=True)
    with workspace.draft(out, "check", {"way": way}) as draft:
        choices = {"group_size": 128, "progress": bench_quantize.Lines(), "samples": samples, "place": place}
        how = quantize(checkpoint, draft, **choices, **WAYS[way])
        draft.commit(versions={}, recipe="")
    row = {"way": way, **how, "seconds": round(time.monotonic() - start, 1), "rss_anon_mib": peak.stop() >> 20}
    if on_gpu:
        row["gpu_mib"] = torch.cuda.max_memory_reserved(torch.device(place.device)) >> 20
    return row


def compared(ours: Path, theirs: Path) -> dict[str, Any]:
    """How the tensors of two folders differ."""
    import torch

    from toolchain.checkpoint import Checkpoint
    from toolchain.quantizers.int4 import unpack
    from toolchain.quantizers.source import Source

    sources = [Source(Checkpoint.open(folder)) for folder in (ours, theirs)]
    codes, different, steps, scales = 0, 0, 0, 0.0
    for name in sources[0].checkpoint.tensors:
        one, other = (source.weight(name) for source in sources)
        if one.dtype in (torch.uint8, torch.float8_e4m3fn):
            wide = [unpack(x) if x.dtype == torch.uint8 else ordered(x) for x in (one, other)]
            apart = (wide[0].short() - wide[1].short()).abs()
            codes, different = codes + apart.numel(), different + int(apart.count_nonzero())
            steps = max(steps, int(apart.max()))
        elif name.endswith("scale") or "norm" in name:
            one, other = one.float(), other.float()
            scales = max(scales, float(((one - other).abs() / other.abs().clamp(min=1e-12)).max()))
    reports = [json.loads((folder / "quantization_report.json").read_text()) for folder in (ours, theirs)]
    errors = [report["relative_error"] for report in reports]
    by_error = max(abs(errors[0][name] / errors[1][name] - 1) for name in errors[1])
    share = different / codes
    return {"codes_differing": share, "most_steps": steps, "scales_apart": scales, "errors_apart": by_error}


def ordered(codes: Any) -> Any:
    """e4m3 -> integers in the order of the numbers, a step apart."""
    import torch

    bits = codes.view(torch.uint8).short()
    return torch.where(bits > 127, 128 - bits, bits)


def verdict(way: str, found: dict[str, Any]) -> bool:
    if way in ("awq", "gptq"):
        return bool(found["errors_apart"] < LARGEST_ERROR_DIFFERENCE)
    return bool(found["codes_differing"] < LARGEST_SHARE and found["most_steps"] <= 1)


def main() -> int:
    args = parse()
    from toolchain.quantizers.place import Place
    from toolchain.units import parse_bytes

    limits = {name: parse_bytes(size) for name in ("max_ram", "max_vram") if (size := getattr(args, name))}
    args.work.mkdir(parents=True, exist_ok=True)
    model, good = args.work / f"model-{args.shape}", True
    try:
        bench_quantize.make(model, args.shape)
        add_outliers(model)
        for way in args.ways.split(","):
            row = quantized(model, args.work / "gpu", way, Place(args.device, **limits), args)
            if not args.gpu_only:
                on_cpu = quantized(model, args.work / "cpu", way, Place("cpu"), args)
                found = compared(args.work / "gpu", args.work / "cpu")
                within = verdict(way, found)
                good = good and within
                row |= {"cpu_seconds": on_cpu["seconds"], **found, "within_rounding": within}
            print(json.dumps(row), flush=True)
    finally:
        shutil.rmtree(args.work, ignore_errors=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
