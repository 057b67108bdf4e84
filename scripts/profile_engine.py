"""Where the CPU engine's time goes: OpenVINO's own counters of one prefill and of decoding, by kind of operation.

    python scripts/profile_engine.py ENGINE [--prompt-tokens 256] [--decode-tokens 16] [--activation-group 0]

It compiles the engine's model without GenAI, batch 1, with the counters on, which slows it a little. Weights' bytes are
those of the file; GB/s says how fast a decoded token would have read them all. One JSON object on standard output.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov


class Profiled:
    """One sequence; each call feeds tokens after those before."""

    def __init__(self, engine: Path, group: int) -> None:
        core = ov.Core()
        properties = {"PERF_COUNT": "YES", "DYNAMIC_QUANTIZATION_GROUP_SIZE": group}
        self.request = core.compile_model(engine / "openvino_model.xml", "CPU", properties).create_infer_request()
        self.past = self.calls = 0

    def feed(self, count: int) -> tuple[float, Counter[str]]:
        """-> seconds, and milliseconds by kind of operation."""
        inputs = {
            "input_ids": np.full((1, count), 7, np.int64),
            "attention_mask": np.ones((1, self.past + count), np.int64),
            "position_ids": np.arange(self.past, self.past + count)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        before = self._totals()
        begun = time.perf_counter()
        self.request.infer(inputs)
        seconds = time.perf_counter() - begun
        self.past += count
        self.calls += 1
        return seconds, self._totals() - before

    def reset(self) -> None:
        self.request.reset_state()
        self.past = 0

    def _totals(self) -> Counter[str]:
        """Of all calls so far; OpenVINO's CPU plug-in tells means over them."""
        found: Counter[str] = Counter()
        for one in self.request.get_profiling_info() if self.calls else ():
            found[f"{one.node_type} {one.exec_type}"] += one.real_time.total_seconds() * 1000 * self.calls
        return found


def shares(times: Counter[str]) -> dict[str, float]:
    """The largest, as shares of all."""
    total = sum(times.values()) or 1.0
    return {name: round(value / total, 3) for name, value in times.most_common(6) if value > 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--decode-tokens", type=int, default=16)
    parser.add_argument("--activation-group", type=int, default=0, help="0: activations are not rounded")
    given = parser.parse_args()
    profiled = Profiled(given.engine, given.activation_group)
    profiled.feed(given.prompt_tokens)
    profiled.reset()
    prefill_s, prefill = profiled.feed(given.prompt_tokens)
    decoded = [profiled.feed(1) for _ in range(given.decode_tokens)][1:]
    token_s = statistics.median(seconds for seconds, _ in decoded)
    weights = (given.engine / "openvino_model.bin").stat().st_size
    found: dict[str, Any] = {
        "prefill": {"tokens": given.prompt_tokens, "seconds": prefill_s, "shares": shares(prefill)},
        "decode": {"seconds": token_s, "shares": shares(sum((times for _, times in decoded), Counter()))},
        "weights_gb": weights / 1e9,
        "weights_gb_per_s": weights / 1e9 / token_s,
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
