"""Where the CPU engine's time goes: OpenVINO's own counters of one prefill and of decoding, by kind of operation.

    python scripts/profile_engine.py ENGINE [--prompt-tokens 256] [--decode-tokens 16] [--activation-group 0]
    python scripts/profile_engine.py ENGINE --activation-group 128 --beside http://127.0.0.1:PORT    # llama-server

It compiles the engine's model without GenAI, batch 1, with the counters on, which slows it a little. One JSON object on
standard output: seconds, shares of the time, and how fast the weights of a kind of product were read while a token was
decoded (GB/s), beside what as many threads read of plain memory at the same time. With ``--beside``, llama.cpp's server
decodes as many tokens in turns with the engine; its time is its own (``timings.predicted_per_token_ms``).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

_TURNS = 8
_PLAIN_BYTES = 2**28


class Profiled:
    """One sequence; each call feeds tokens after those before."""

    def __init__(self, engine: Path, group: int, counters: bool = True) -> None:
        core = ov.Core()
        properties = {"PERF_COUNT": "YES" if counters else "NO", "DYNAMIC_QUANTIZATION_GROUP_SIZE": group}
        self.request = core.compile_model(engine / "openvino_model.xml", "CPU", properties).create_infer_request()
        self.past = self.calls = 0

    def feed(self, count: int) -> float:
        """-> seconds."""
        inputs = {
            "input_ids": np.full((1, count), 7, np.int64),
            "attention_mask": np.ones((1, self.past + count), np.int64),
            "position_ids": np.arange(self.past, self.past + count)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        begun = time.perf_counter()
        self.request.infer(inputs)
        seconds = time.perf_counter() - begun
        self.past += count
        self.calls += 1
        return seconds

    def counted(self, count: int) -> tuple[float, Counter[str]]:
        """-> seconds, and milliseconds by kind of operation."""
        before = self._totals()
        seconds = self.feed(count)
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


def weight_bytes(engine: Path) -> dict[str, int]:
    """Of the products, by OpenVINO's name for their kind: quantized matrices with their scales, and the 16-bit head.
    Embeddings are not among them: a token reads one row.
    """
    found: Counter[str] = Counter()
    for node in ov.Core().read_model(engine / "openvino_model.xml").get_ops():
        if node.get_type_name() != "MatMul":
            continue
        constants = list(_constants(node.input(1).get_source_output().get_node()))
        kind = "FullyConnectedCompressed" if len(constants) > 1 else "FullyConnected"
        found[kind] += sum(constants)
    return dict(found)


def _constants(node: Any) -> Any:
    """Bytes of each constant above a weight."""
    if node.get_type_name() == "Constant":
        bits = node.get_output_element_type(0).bitwidth
        if (count := math.prod(node.get_output_shape(0))) > 16:  # less is a shape
            yield count * bits // 8
    for place in range(node.get_input_size()):
        yield from _constants(node.input(place).get_source_output().get_node())


def plain_gb_per_s(threads: int) -> float:
    """The best of five: what so many threads read of an array together."""
    parts = np.array_split(np.ones(_PLAIN_BYTES // 8, np.int64), threads)
    best = math.inf
    for _ in range(5):
        readers = [threading.Thread(target=part.max) for part in parts]
        begun = time.perf_counter()
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        best = min(best, time.perf_counter() - begun)
    return _PLAIN_BYTES / 1e9 / best


def in_turns(profiled: Profiled, url: str, prompt: int, count: int) -> dict[str, Any]:
    """Milliseconds for a token of both, and the median of the turns' ratios."""
    body = {"prompt": [7] * prompt, "n_predict": count, "ignore_eos": True, "cache_prompt": True, "temperature": 0}

    def theirs() -> float:
        request = urllib.request.Request(f"{url}/completion", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        return float(json.loads(urllib.request.urlopen(request).read())["timings"]["predicted_per_token_ms"])

    theirs()
    pairs = []
    for _ in range(_TURNS):
        profiled.reset()
        profiled.feed(prompt)
        pairs.append((1000 * statistics.median(profiled.feed(1) for _ in range(count)), theirs()))
    own, other = (statistics.median(side) for side in zip(*pairs, strict=True))
    return {"ms": own, "llama_cpp_ms": other, "ratio": statistics.median(mine / its for mine, its in pairs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--decode-tokens", type=int, default=16)
    parser.add_argument("--activation-group", type=int, default=0, help="0: activations are not rounded")
    parser.add_argument("--beside", metavar="URL", help="llama.cpp's server, to decode in turns with")
    given = parser.parse_args()
    profiled = Profiled(given.engine, given.activation_group)
    profiled.feed(given.prompt_tokens)
    profiled.reset()
    prefill_s, prefill = profiled.counted(given.prompt_tokens)
    decoded = [profiled.counted(1) for _ in range(given.decode_tokens)][1:]
    token_s = statistics.median(seconds for seconds, _ in decoded)
    part = shares(sum((times for _, times in decoded), Counter()))
    weights = weight_bytes(given.engine)
    seconds = {
        kind: sum(share for name, share in part.items() if name.split()[0] == kind) * token_s for kind in weights
    }
    found: dict[str, Any] = {
        "prefill": {"tokens": given.prompt_tokens, "seconds": prefill_s, "shares": shares(prefill)},
        "decode": {"seconds": token_s, "shares": part},
        "weights_gb": {kind: size / 1e9 for kind, size in weights.items()},
        "weights_gb_per_s": {kind: weights[kind] / 1e9 / seconds[kind] for kind in weights if seconds[kind]},
        "plain_gb_per_s": plain_gb_per_s(len(os.sched_getaffinity(0))),
    }
    if given.beside:
        quiet = Profiled(given.engine, given.activation_group, counters=False)
        found["in_turns"] = in_turns(quiet, given.beside.rstrip("/"), given.prompt_tokens, given.decode_tokens)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
