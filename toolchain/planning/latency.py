"""How long a GPU takes: prefill and decode from FLOPs, bytes, launches and links, with the arithmetic floor. Pure.

A roofline whose few factors (shares of the peaks that kernels reach, launch time per layer) were fitted to published
measurements: ``facts/latency.yaml``, made by ``scripts/fit_latency.py``. It knows shapes, number formats and devices.
It does not know recipes, prices or servers: time in queues, tokenizers and networks is not in it, nor is any measured.

The terms are added up, not overlapped: a step computes, reads and launches one after the other. The floor overlaps
everything perfectly at the peaks of the data sheet, so nothing that computes in the same format can be below it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from toolchain import workspace
from toolchain.device import Device
from toolchain.family import LlamaConfig
from toolchain.planning.memory import kv_bytes_per_token, linear_parameters, scale_bytes
from toolchain.quantization import KvScheme, WeightScheme

GB = 1e9
TERA = 1e12

ALL_REDUCES_PER_LAYER = 2
"""Tensor parallelism sums partial results after o_proj and after down_proj (Megatron-LM, arXiv 1909.08053)."""


@dataclass(frozen=True)
class Link:
    """How the GPUs of one model exchange partial sums."""

    efficiency: float
    """Share of the link's bandwidth that an all-reduce reaches."""
    latency_s: float
    """Of one all-reduce, whatever its size."""


@dataclass(frozen=True)
class Factors:
    """What was fitted. Shares are of the data sheet's peak, in (0, 1]."""

    compute: Mapping[tuple[str, str], float]
    """(architecture, format that the kernels compute in) -> share of the dense tensor peak in large GEMMs."""
    memory: Mapping[str, float]
    """Architecture -> share of the memory bandwidth."""
    prefill_layer_s: float
    """Launches and small kernels of one layer in a step with prompts."""
    decode_layer_s: float
    """The same in a step that makes one token per sequence."""
    dequantization: float
    """How many times longer GEMMs over whole prompts take when weights are unpacked to the format of the inputs."""
    links: Mapping[str, Link]
    """``"nvlink"`` or ``"pcie"``."""
    assumed: frozenset[tuple[str, str]] = frozenset()
    """Keys of ``compute`` that no measurement stands behind: taken from another architecture or format, unconfirmed."""


@dataclass(frozen=True)
class Interconnect:
    """What connects several of a device."""

    kind: str
    gb_s: float
    """In one direction, per GPU."""


@dataclass(frozen=True)
class Deployment:
    """One service: a model in its formats on ``tp x pp`` GPUs of one kind."""

    config: LlamaConfig
    weights: WeightScheme
    kv: KvScheme
    device: Device
    tp: int = 1
    pp: int = 1
    group_size: int = 128
    fused_attention: bool = True
    """Whether attention of a prompt is one kernel; else scores of its length squared go through memory."""
    window: int | None = None
    """Tokens that attention sees at most; None: all of a sequence."""
    interconnect: Interconnect = field(default=Interconnect("pcie", 32.0))


@dataclass(frozen=True)
class Terms:
    """Seconds of one step, by what takes them."""

    compute_s: float
    memory_s: float
    launch_s: float
    link_s: float

    @property
    def total_s(self) -> float:
        return self.compute_s + self.memory_s + self.launch_s + self.link_s


@functools.cache
def factors() -> Factors:
    """The fitted factors of ``facts/latency.yaml``."""
    return read_factors(workspace.facts("latency"))


def read_factors(raw: Mapping[str, Any]) -> Factors:
    """The factors in the form of ``facts/latency.yaml``."""
    rows = {(arch, name): row for arch, formats in raw["compute"].items() for name, row in formats.items()}
    return Factors(
        compute=MappingProxyType({key: float(row["share"]) for key, row in rows.items()}),
        memory=MappingProxyType({arch: float(row["share"]) for arch, row in raw["memory"].items()}),
        prefill_layer_s=raw["prefill_layer_us"]["value"] * 1e-6,
        decode_layer_s=raw["decode_layer_us"]["value"] * 1e-6,
        dequantization=float(raw["dequantization"]["value"]),
        links=MappingProxyType(
            {kind: Link(row["share"], row["latency_us"] * 1e-6) for kind, row in raw["links"].items()}
        ),
        assumed=frozenset(key for key, row in rows.items() if row.get("assumed") and not row.get("confirmed")),
    )


def interconnect(name: str) -> Interconnect:
    """What connects several GPUs of a device, by its name: ``interconnects`` of ``facts/latency.yaml``."""
    row = workspace.facts("latency")["interconnects"][name]
    return Interconnect(row["kind"], float(row["gb_s"]))


_linear_parameters = functools.cache(linear_parameters)


def compute_format(weights: WeightScheme) -> str:
    """What the GEMMs of the linears multiply in: the activations' format, else 16 bits, whatever the weights are."""
    return weights.activations or "fp16"


def unpacks(weights: WeightScheme) -> bool:
    """Whether weights are unpacked to a wider format before they are multiplied (W4A16, W8A16, W4A8)."""
    return weights.quant_algo is not None and weights.bits < (8 if weights.activations else 16)


def linear_flops(config: LlamaConfig, tokens: int) -> float:
    """2 x weights of the linears x tokens."""
    return 2.0 * _linear_parameters(config) * tokens


def attention_flops(config: LlamaConfig, tokens: int, window: int | None = None) -> float:
    """QK^T and PV of one prompt, the causal half: layers x 2 x tokens^2 x heads x head_dim; less within a window."""
    seen = min(tokens, window or tokens)
    pairs = seen * tokens - seen**2 / 2
    return 4.0 * config.num_layers * pairs * config.q_size


def head_flops(config: LlamaConfig, rows: int) -> float:
    """Logits of ``rows`` positions: only a prompt's last one needs them."""
    return 2.0 * config.hidden_size * config.vocab_size * rows


def read_bytes(made: Deployment) -> float:
    """Bytes of weights that one rank reads in one step: its linears with their scales, and its share of the head."""
    return _read_bytes(made.config, made.weights, made.group_size) / made.tp


@functools.cache
def _read_bytes(config: LlamaConfig, weights: WeightScheme, group_size: int) -> float:
    bits = weights.bits if weights.quant_algo else 16
    scales = scale_bytes(config, weights, group_size, bytes_per_scale=2)
    return _linear_parameters(config) * bits / 8 + scales + config.hidden_size * config.vocab_size * 2


def activation_traffic(made: Deployment, tokens: int) -> float:
    """Bytes that one rank's kernels read and write between the weights, 16 bits each: our count, not a measurement.

    Per token and layer: two norms with residual 8 h; qkv h + q + 2 kv; attention 2 q + 2 kv; o q + h; gate and up
    h + 2 i; their product 3 i; down i + h. What is h wide is on every rank, the rest is split by tp.
    """
    config = made.config
    split = 4 * config.q_size + 4 * config.kv_size + 6 * config.intermediate_size
    return 2.0 * tokens * config.num_layers * (12 * config.hidden_size + split / made.tp)


def prefill(made: Deployment, tokens: int, batch: int = 1, using: Factors | None = None) -> Terms:
    """The step that reads ``batch`` prompts of ``tokens`` each and gives their first tokens: TTFT without a server.

    With pp its stages run one after the other, so that pp makes no first token faster.
    """
    known = using or factors()
    unfused = 0.0 if made.fused_attention else _score_bytes(made, tokens, batch)
    return Terms(
        compute_s=_prefill_compute_s(made, tokens, batch, known),
        memory_s=(read_bytes(made) + activation_traffic(made, tokens * batch) + unfused) / _bandwidth(made, known),
        launch_s=made.config.num_layers * known.prefill_layer_s,
        link_s=_link_s(made, tokens * batch, known),
    )


def _prefill_compute_s(made: Deployment, tokens: int, batch: int, known: Factors) -> float:
    name, config = compute_format(made.weights), made.config
    times = known.dequantization if unpacks(made.weights) else 1.0
    linears = linear_flops(config, tokens * batch) * times / _rate(made, name, known)
    sixteen_bit = attention_flops(config, tokens, made.window) * batch + head_flops(config, batch)
    return (linears + sixteen_bit / _rate(made, "fp16", known)) / made.tp


def _score_bytes(made: Deployment, tokens: int, batch: int) -> float:
    """Scores of unfused attention, written and read: an fp32 and a 16-bit copy (see memory.unfused_attention_bytes)."""
    return made.config.num_layers * batch * made.config.num_heads / made.tp * tokens**2 * 6.0 * 2


def decode(made: Deployment, batch: int, context: int, using: Factors | None = None) -> Terms:
    """The step that gives ``batch`` sequences of ``context`` tokens one token each: ITL."""
    known = using or factors()
    cache = _cache_bytes(made, batch, context)
    name = compute_format(made.weights)
    flops = linear_flops(made.config, batch) / _rate(made, name, known)
    head = head_flops(made.config, batch) / _rate(made, "fp16", known)
    return Terms(
        compute_s=(flops + head) / made.tp,
        memory_s=(read_bytes(made) + activation_traffic(made, batch) + cache) / _bandwidth(made, known),
        launch_s=made.config.num_layers * known.decode_layer_s,
        link_s=_link_s(made, batch, known),
    )


def _cache_bytes(made: Deployment, batch: int, context: int) -> float:
    """Keys and values of all layers that one rank (with tp) reads in one step."""
    seen = min(context, made.window or context)
    return batch * seen * kv_bytes_per_token(made.config, made.kv, tp=made.tp)


def _rate(made: Deployment, name: str, known: Factors) -> float:
    """FLOP/s that large GEMMs in this format reach here."""
    return made.device.tflops[name] * TERA * known.compute[made.device.arch, name]


def _bandwidth(made: Deployment, known: Factors) -> float:
    """Bytes per second that kernels reach here."""
    assert made.device.bandwidth_gb_s is not None, made.device.name
    return made.device.bandwidth_gb_s * GB * known.memory[made.device.arch]


def _link_s(made: Deployment, tokens: int, known: Factors) -> float:
    """All-reduces of one step over a ring: each moves 2 (tp - 1) / tp times tokens x hidden x 2 bytes."""
    if made.tp == 1:
        return 0.0
    link = known.links[made.interconnect.kind]
    moved = 2 * (made.tp - 1) / made.tp * tokens * made.config.hidden_size * 2
    each = link.latency_s + moved / (made.interconnect.gb_s * GB * link.efficiency)
    return made.config.num_layers * ALL_REDUCES_PER_LAYER * each


def prefill_floor_s(made: Deployment, tokens: int, batch: int = 1) -> float:
    """The least that arithmetic allows for ``prefill``: the longer of computing and reading, at their peaks, no links.

    Attention counts in the linears' format: newer fused kernels compute it in FP8 too.
    """
    name, ideal = compute_format(made.weights), _ideal(made)
    flops = linear_flops(made.config, tokens * batch) + attention_flops(made.config, tokens, made.window) * batch
    compute_s = flops / _rate(made, name, ideal) / made.tp
    return max(compute_s, read_bytes(made) / _bandwidth(made, ideal))


def decode_floor_s(made: Deployment, batch: int, context: int) -> float:
    """The least that arithmetic allows for ``decode``."""
    ideal = _ideal(made)
    read = read_bytes(made) + _cache_bytes(made, batch, context)
    return max(decode(made, batch, context, ideal).compute_s, read / _bandwidth(made, ideal))


def _ideal(made: Deployment) -> Factors:
    """Factors of a device that reaches its data sheet and launches in no time."""
    arch, free = made.device.arch, Link(1.0, 0.0)
    shares = {(arch, name): 1.0 for name in made.device.tflops}
    return Factors(shares, {arch: 1.0}, 0.0, 0.0, 1.0, {"nvlink": free, "pcie": free})


def static_tokens_per_s(made: Deployment, batch: int, tokens: int, output: int, using: Factors | None = None) -> float:
    """Output tokens per second and GPU of one batch of equal requests, from its start to its end."""
    each = decode(made, batch, tokens + output // 2, using).total_s
    spent = prefill(made, tokens, batch, using).total_s + (output - 1) * each
    return batch * output / spent / (made.tp * made.pp)


def in_flight_tokens_per_s(
    made: Deployment,
    sequences: int,
    tokens: int,
    output: int,
    using: Factors | None = None,
    requests: int | None = None,
) -> float:
    """Output tokens per second of all GPUs, with ``sequences`` requests always in flight, each at its own place.

    A request costs its prompt's computing, which joins steps that run anyway, and its share of ``output`` steps. With
    pp the sequences are in ``pp`` groups, one in each stage. ``requests``: of a run of so many equal ones, all waiting
    at its start: they go through in waves of ``sequences``, and what is left over is a wave with fewer.
    """
    known = using or factors()
    prompt_s = _prefill_compute_s(made, tokens, 1, known)
    prompt_s += activation_traffic(made, tokens) / _bandwidth(made, known)
    if made.tp > 1:
        prompt_s += _link_s(made, tokens, known) - _link_s(made, 0, known)

    def step_s(at_once: int) -> float:
        return decode(made, max(1, at_once // made.pp), tokens + output // 2, known).total_s

    full, rest = divmod(requests or sequences, sequences)
    waves_s = full * step_s(sequences) + (step_s(rest) if rest else 0.0)
    return output / (prompt_s / made.pp + output * waves_s / max(full * sequences + rest, made.pp))


def in_flight_ceiling(made: Deployment, sequences: int, tokens: int, output: int) -> float:
    """The most that arithmetic allows for ``in_flight_tokens_per_s``: each term at its floor."""
    per_stage = max(1, sequences // made.pp)
    flops = linear_flops(made.config, tokens) + attention_flops(made.config, tokens, made.window)
    prompt_s = flops / _rate(made, compute_format(made.weights), _ideal(made)) / made.tp / made.pp
    step_s = decode_floor_s(made, per_stage, tokens + output // 2)
    return output / (prompt_s + output * step_s / max(sequences, per_stage))
