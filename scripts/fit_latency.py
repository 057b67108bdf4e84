"""Fits the factors of toolchain/facts/latency.yaml to published measurements; prints how well they predict the rest.

    python scripts/fit_latency.py            # the error table of the factors as they are
    python scripts/fit_latency.py --rows     # every row of it
    python scripts/fit_latency.py --fit      # fit again, print the factors, then their error table

Fitted by least squares of the logarithm of prediction / measurement (Levenberg-Marquardt) over
facts/published_latency_fit.yaml alone; facts/published_latency_validation.yaml is only predicted.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from toolchain import workspace
from toolchain.device import Device, device
from toolchain.engine import Limits
from toolchain.family import published
from toolchain.planning.latency import (
    Deployment,
    Factors,
    Link,
    decode,
    factors,
    in_flight_tokens_per_s,
    interconnect,
    prefill,
    static_tokens_per_s,
)
from toolchain.planning.memory import kv_bytes_per_token, memory_plan, parameters
from toolchain.quantization import KV, WEIGHTS

FIT, VALIDATION = "published_latency_fit", "published_latency_validation"
ENGINE = "TensorRT-LLM"

KV_FRACTION = 0.95
"""Share of the memory left that NVIDIA's throughput tables give to the cache (perf-overview.md of 0.17 and 1.0)."""

BENCH_BATCH, BENCH_TOKENS = (64, 4096), (2048, 32768)
"""Least and most that trtllm-bench chooses as max_batch_size and max_num_tokens (see ``bench_limits``)."""

FITTED_COMPUTE = (("Ampere", "fp16"), ("Ada", "fp8"), ("Hopper", "fp8"), ("Turing", "fp16"))
ARCHITECTURES = ("Ampere", "Ada", "Hopper", "Turing")
MEMORY_MOST = 0.93
"""A share of the memory bandwidth that no kernel exceeds: refresh and turnaround of DRAM take the rest. Our bound, near
what copying reaches; without it the fit hides errors of other terms in shares of 0.96 to 1."""

AT_BOUND = 1e-3
"""A fitted value that moves no prediction by this much has reached its bound."""

LARGEST = 30.0
"""Of a number of the fitted vector: a share that far from 0.5 is 0 or 1 to a double's precision."""

START = {"share": 0.6, "layer_s": 5e-5, "dequantization": 1.3, "latency_s": 2e-5}

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """One published value and how to predict it."""

    table: Mapping[str, Any]
    deployment: Deployment
    values: tuple[float, ...]
    """What the metric's row holds, without tp and the measurement."""
    measured: float

    @property
    def metric(self) -> str:
        return str(self.table["metric"])

    def predict(self, using: Factors) -> float:
        """In the metric's unit."""
        counts = [int(value) for value in self.values]
        if self.metric == "ttft_ms":
            return prefill(self.deployment, counts[1], counts[0], using).total_s * 1e3
        if self.metric == "itl_ms":
            batch, tokens, output = counts
            return decode(self.deployment, batch, tokens + output // 2, using).total_s * 1e3
        if self.metric == "static_tokens_per_s":
            return static_tokens_per_s(self.deployment, *counts, using)
        tokens, output, requests = counts
        return in_flight_tokens_per_s(self.deployment, self.sequences, tokens, output, using, requests=requests)

    @functools.cached_property
    def sequences(self) -> int:
        """Requests at once: what the cache holds at full length, as no request is ever put off once it runs."""
        made, (tokens, output, requests) = self.deployment, (int(value) for value in self.values)
        limits = bench_limits(made, tokens, output)
        found = memory_plan(made.config, made.weights, made.kv, limits, made.device, tp=made.tp, kv_tokens=0)
        assert found.available is not None
        cache = KV_FRACTION * max(0, found.available - found.total)
        fitting = int(cache / found.kv_bytes_per_token / (tokens + output))
        return max(1, min(fitting, requests, limits.max_batch_size))


def bench_limits(made: Deployment, tokens: int, output: int) -> Limits:
    """The limits that ``trtllm-bench build --dataset`` gives an engine; NVIDIA's throughput tables are of such engines.

    It takes all memory but the weights for the cache, and rounds up what that could hold. Sources: perf-overview.md
    ("Engine Building") and tensorrt_llm/bench/build/tuning.py @04cba882 of TensorRT-LLM.
    """
    assert made.device.memory_bytes is not None
    weights = parameters(made.config) * (made.weights.bits if made.weights.quant_algo else 16) / 8
    per_token = kv_bytes_per_token(made.config, made.kv, tp=made.tp) * made.tp
    holds = KV_FRACTION * (made.device.memory_bytes * made.tp - weights) / per_token / (tokens + output)
    batch = min(holds, BENCH_BATCH[1])
    in_step = min(batch * (1 + tokens / output), BENCH_TOKENS[1])
    max_batch = max(BENCH_BATCH[0], _round_up(batch, {256: 32, 1024: 128, math.inf: 256}))
    max_tokens = max(BENCH_TOKENS[0], _round_up(in_step, {4096: 256, 8192: 512, math.inf: 1024}))
    return Limits(max_batch, tokens + output, tokens, max_tokens)


def _round_up(value: float, multiples: Mapping[float, int]) -> int:
    """Up to the multiple that belongs to the first bound above ``value``."""
    to = next(to for below, to in multiples.items() if value < below)
    return math.ceil(value / to) * to


def rows(name: str) -> list[Row]:
    """Every row of one of the two files of published values."""
    return [row for table in workspace.facts(name)["tables"] for row in _rows(table)]


def _rows(table: Mapping[str, Any]) -> Iterator[Row]:
    config = published(table["model"])
    assert config is not None, table["model"]
    tp_at = 0 if table["metric"].startswith("in_flight") else 1
    target = _gpu(table["gpu"])
    for *values, measured in table["rows"]:
        made = Deployment(
            config,
            WEIGHTS[table["weights"]],
            KV[table["kv"]],
            target,
            tp=values[tp_at],
            fused_attention=target.sm is not None and target.sm >= 80,
            interconnect=interconnect(table["gpu"]),
        )
        yield Row(table, made, tuple(values[:tp_at] + values[tp_at + 1 :]), float(measured))


def _gpu(name: str) -> Device:
    """A device of devices.yaml, or one that only the published values know."""
    row = workspace.facts(FIT)["gpus"].get(name)
    if row is None:
        return device(name)
    changed = {key: row[key] for key in ("title", "memory_mib", "bandwidth_gb_s")}
    return replace(device(row["like"]), name=name, tflops=MappingProxyType(row["tflops"]), **changed)


def error(row: Row, using: Factors) -> float:
    """How far the prediction is off, in either direction, as a share: 0.1 for 10 % too much or too little.

    Symmetric: max(predicted / measured, measured / predicted) - 1.
    """
    return math.exp(abs(math.log(row.predict(using) / row.measured))) - 1


# The vector that is fitted: logit of each share, logarithm of each time and of dequantization - 1.


def _unpack(vector: Vector) -> Factors:
    vector = np.clip(vector, -LARGEST, LARGEST)
    shares = 1 / (1 + np.exp(-vector[:10]))
    shares[4:8] *= MEMORY_MOST
    prefill_s, decode_s, unpacking, nvlink_s, pcie_s = (float(value) for value in np.exp(vector[10:]))
    return Factors(
        compute={key: float(share) for key, share in zip(FITTED_COMPUTE, shares[:4], strict=True)},
        memory={arch: float(share) for arch, share in zip(ARCHITECTURES, shares[4:8], strict=True)},
        prefill_layer_s=prefill_s,
        decode_layer_s=decode_s,
        dequantization=1 + unpacking,
        links={"nvlink": Link(float(shares[8]), nvlink_s), "pcie": Link(float(shares[9]), pcie_s)},
    )


def _start() -> Vector:
    share = math.log(START["share"] / (1 - START["share"]))
    times = [START["layer_s"], START["layer_s"], START["dequantization"] - 1, START["latency_s"], START["latency_s"]]
    return np.array([share] * 10 + [math.log(value) for value in times])


def fit(fitted: Sequence[Row]) -> tuple[Factors, list[float]]:
    """The factors with the least sum of squared logarithmic errors, and a standard error of each as a share of it.

    The standard error of a factor at its bound is nan. Formats that no row has keep no entry in ``compute``.
    """

    def residuals(vector: Vector) -> Vector:
        using = _fill(_unpack(vector))
        return np.array([math.log(row.predict(using) / row.measured) for row in fitted])

    vector = _levenberg_marquardt(residuals, _start())
    slopes, left = _jacobian(residuals, vector), residuals(vector)
    variance = float(left @ left) / (len(fitted) - len(vector))
    free = np.linalg.norm(slopes, axis=0) > AT_BOUND
    spread = np.full(len(vector), np.nan)
    spread[free] = np.sqrt(np.diag(np.linalg.inv(slopes[:, free].T @ slopes[:, free])) * variance)
    found = _unpack(vector)
    share = 1 / (1 + np.exp(-vector[:10]))
    spread[:10] *= 1 - share
    spread[12] *= (found.dequantization - 1) / found.dequantization
    return found, [float(value) for value in spread]


def _fill(found: Factors) -> Factors:
    """Attention and the head compute in 16 bits also where only 8-bit GEMMs are fitted: with the same share."""
    compute = dict(found.compute)
    for arch in ARCHITECTURES:
        compute.setdefault((arch, "fp16"), found.compute.get((arch, "fp8"), 0.0))
    return replace(found, compute=compute)


def _levenberg_marquardt(residuals: Callable[[Vector], Vector], vector: Vector, steps: int = 60) -> Vector:
    """Least squares from ``vector`` on, derivatives by differences; stops when a step gains less than 1e-9."""
    damping, current = 1e-2, residuals(vector)
    for _ in range(steps):
        jacobian = _jacobian(residuals, vector)
        normal, slope = jacobian.T @ jacobian, jacobian.T @ current
        while damping < 1e9:
            trial = vector - np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-12), slope)
            found = residuals(trial)
            gain = float(current @ current - found @ found)
            if gain >= 0:
                break
            damping *= 4
        else:
            return vector
        vector, current, damping = trial, found, damping / 3
        if gain < 1e-9:
            return vector
    return vector


def _jacobian(residuals: Callable[[Vector], Vector], vector: Vector) -> npt.NDArray[np.float64]:
    current = residuals(vector)
    return np.stack([(residuals(vector + 1e-5 * unit) - current) / 1e-5 for unit in np.eye(len(vector))], axis=1)


def values(found: Factors) -> dict[str, float]:
    """The fitted factors by the names that facts/latency.yaml has for them, in the order of the fitted vector."""
    named = {f"compute {arch} {name}": found.compute[arch, name] for arch, name in FITTED_COMPUTE}
    named |= {f"memory {arch}": found.memory[arch] for arch in ARCHITECTURES}
    named |= {f"links {kind} share": link.efficiency for kind, link in found.links.items()}
    named |= {"prefill_layer_us": found.prefill_layer_s * 1e6, "decode_layer_us": found.decode_layer_s * 1e6}
    named |= {"dequantization": found.dequantization}
    return named | {f"links {kind} latency_us": link.latency_s * 1e6 for kind, link in found.links.items()}


def summary(errors: Iterable[float]) -> tuple[int, float, float]:
    """(number, median, worst)."""
    found = sorted(errors)
    return len(found), float(np.median(found)), found[-1]


def groups(every: Sequence[Row], using: Factors, key: Callable[[Row], str]) -> dict[str, tuple[int, float, float]]:
    """Summary of the errors for each value of ``key``, in the order of the rows."""
    found: dict[str, list[float]] = {}
    for row in every:
        found.setdefault(key(row), []).append(error(row, using))
    return {name: summary(errors) for name, errors in found.items()}


def _print(title: str, table: Mapping[str, tuple[int, float, float]]) -> None:
    print(f"\n{title:<62} rows  median  worst")
    for name, (count, median, worst) in table.items():
        print(f"{name:<62} {count:4d} {median:6.1%} {worst:6.1%}")


def _model(row: Row) -> str:
    return str(row.table["model"]).split("/")[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="fit again, and show the errors of what comes of it")
    parser.add_argument("--rows", action="store_true", help="every row with its prediction")
    asked = parser.parse_args()
    fitted, held_out = rows(FIT), rows(VALIDATION)
    using = factors()
    if asked.fit:
        found, relative = fit(fitted)
        for (name, value), spread in zip(values(found).items(), relative, strict=True):
            print(f"{name:<24} {value:8.3f} " + ("at its bound" if math.isnan(spread) else f"+- {spread:.0%}"))
        using = replace(_fill(found), compute={**using.compute, **found.compute})
    counted = [row for row in held_out if row.table["engine"] == ENGINE]
    other = [row for row in held_out if row.table["engine"] != ENGINE]
    for title, part in (("fit", fitted), ("validation", counted), ("other engines, not counted", other)):
        _print(title, {"all": summary(error(row, using) for row in part)})
        _print(f"{title}: by metric", groups(part, using, lambda row: row.metric))
        _print(f"{title}: by source", groups(part, using, lambda row: f"{row.table['release']} {_model(row)}"))
        _print(f"{title}: by GPU", groups(part, using, lambda row: str(row.table["gpu"])))
        if asked.rows:
            for row in part:
                table, predicted = row.table, row.predict(using)
                print(
                    f"{table['release']:8} {table['gpu']:10} {_model(row):15} {table['weights']:5} "
                    f"tp{row.deployment.tp} {row.metric:22} {' '.join(f'{value:g}' for value in row.values):22} "
                    f"{row.measured:9.1f} {predicted:9.1f} {predicted / row.measured - 1:+7.1%}"
                )


if __name__ == "__main__":
    main()
