"""The plan: every decision that a recipe leaves open, made and explained; or every reason why it cannot be. Pure.

Holds the order of the rules of ``decisions``, the check against the device's memory, and what each stage's key depends
on. It reads no weights, looks at no machine and starts nothing; what it knows comes from the recipe, the model's config
and the facts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from toolchain.device import Device, Price, device, prices
from toolchain.engine import Limits
from toolchain.family import LlamaConfig
from toolchain.planning import decisions as rules
from toolchain.planning.capacity import Cache, capacity
from toolchain.planning.decisions import Decision, Notes
from toolchain.planning.forecast import Forecast, forecast
from toolchain.planning.gate import Gate, choose_gate
from toolchain.planning.guided import choose_guided
from toolchain.planning.kv_window import KvWindow, choose_window
from toolchain.planning.latency import Deployment, interconnect
from toolchain.planning.lora import choose_lora
from toolchain.planning.memory import MemoryPlan
from toolchain.planning.speculation import CPU, Speculation, check_reuse, check_window, choose_speculation
from toolchain.quantization import KV, WEIGHTS, KvScheme, WeightScheme
from toolchain.recipe import Recipe
from toolchain.release import Release, backends
from toolchain.variant import settle


@dataclass(frozen=True)
class Plan:
    """A recipe with nothing left open."""

    recipe: Recipe
    config: LlamaConfig
    device: Device
    backend: str
    release: Release | None
    """TensorRT-LLM; None for openvino."""
    weights: WeightScheme
    group_size: int | None
    """Input channels per scale; None where scales are not per group."""
    kv: KvScheme
    dtype: str
    """Of the engine's embeddings, norms and head, on a GPU of its activations; a checkpoint keeps the model's own."""
    limits: Limits
    tp: int
    pp: int
    services: int
    context_fmha: bool
    paged_context_fmha: bool
    """Needed for KV reuse and chunked context; only tensorrt_engine has a choice."""
    window: KvWindow | None
    """Of attention over the cache; None: every token stays."""
    speculation: Speculation | None
    """Decoding with a draft model; None: without."""
    calibrates: bool
    """Whether making the checkpoint takes text: for a method, or for static scales of a TensorRT-LLM engine."""
    gate: Gate | None
    """Whether the engine's answers must be verified before it serves: ``"required"``, ``"advised"`` or not."""
    memory: MemoryPlan
    deployment: Deployment | None
    """What the estimates are of; None on a CPU."""
    latency: Forecast | None
    """What it will probably take; None on a CPU, of which nobody published factors that hold elsewhere."""
    prices: tuple[Price, ...]
    decisions: tuple[Decision, ...]
    warnings: tuple[str, ...]

    @property
    def max_kv_tokens(self) -> int:
        """Tokens in the paged cache of one service."""
        return self.memory.max_kv_tokens

    @property
    def kv_reuse(self) -> bool:
        """Whether the runtime may take keys and values of earlier requests with the same beginning."""
        looks_up = self.speculation is not None and self.speculation.lookup > 0
        return self.recipe.kv_cache.reuse and self.chunked_context and not looks_up

    @property
    def activation_group(self) -> int:
        """On a CPU: channels of a token whose activations share one 8-bit scale; 0 where they are not rounded.

        As many as share a scale of the weights; 128, the usual group, where a whole output channel does.
        """
        rounded = self.device.is_cpu and self.recipe.cpu.activations == "int8"
        return (self.group_size or 128) if rounded else 0

    @property
    def chunked_context(self) -> bool:
        """Whether a prompt may be computed in several pieces."""
        return self.paged_context_fmha and self.window is None

    @property
    def engine_max_seq_len(self) -> int:
        """What ``trtllm-build`` makes of limits.max_seq_len: the drafted tokens are added to it."""
        return self.limits.max_seq_len + (self.speculation.tokens if self.speculation else 0)

    @property
    def sparse(self) -> dict[str, Any]:
        """Window, sinks, drafted tokens, rounded activations and a prefix cache that is off, as plain JSON, if any."""
        found: dict[str, Any] = {"window": self.window.tokens, "sinks": self.window.sinks} if self.window else {}
        if self.speculation:
            found["draft_tokens"] = self.speculation.tokens
        if self.speculation and self.speculation.lookup:
            found["lookup"] = self.speculation.lookup
        if self.activation_group:
            found["activation_group"] = self.activation_group
        return found if self.recipe.kv_cache.reuse else {**found, "kv_reuse": False}

    @property
    def checkpoint_kv(self) -> str:
        """The KV format that the quantized checkpoint states; openvino makes its scales while running, so none."""
        return "fp16" if self.backend == "openvino" else self.kv.name

    def slice(self, stage: str) -> dict[str, Any]:
        """The plain-JSON inputs that the key of ``quantize``, ``convert``, ``build`` or ``package`` depends on.

        ``quantize`` has no dtype: a checkpoint keeps the model's own; how it is calibrated is in it only where it is.
        ``package`` is short because its key also holds the engine's, which carries the rest. Raises ValueError for
        another stage.
        """
        weights = {"weights": self.weights.name, "group_size": self.group_size}
        if stage == "quantize":
            scales = self.recipe.quantization.scales if self.group_size else None
            return {**weights, "scales": scales, "kv": self.checkpoint_kv, **self._how()}
        if stage == "convert":
            return {"tp": self.tp, "pp": self.pp, "kv": self.kv.name, "dtype": self.dtype}
        runtime = {
            "recipe": self.recipe.name,
            "backend": self.backend,
            "release": self.release.version if self.release else None,
            "kv": self.kv.name,
            "limits": asdict(self.limits),
            "max_kv_tokens": self.max_kv_tokens,
            "threads": self.recipe.cpu.threads,
            "precision": self.recipe.cpu.precision if self.device.is_cpu else None,
        }
        if stage == "build":
            parallel = {"tp": self.tp, "pp": self.pp}
            fmha = {"context_fmha": self.context_fmha, "paged_context_fmha": self.paged_context_fmha}
            place = {"device": self.device.name, "sm": self.device.sm, "dtype": self.dtype}
            return {**runtime, **weights, **parallel, **fmha, **place, **self.sparse}
        if stage == "package":
            return {"recipe": self.recipe.name, "services": self.services}
        raise ValueError(f"no stage {stage!r}: quantize, convert, build or package")

    def _how(self) -> dict[str, Any]:
        """What the bits of the checkpoint depend on beyond the scheme; empty for what needs no text and no choice."""
        asked, given = self.recipe.quantization, self.recipe.calibration
        fp8_scales = asked.fp8_scales if self.weights.name == "fp8" else None
        alpha = {"smoothquant_alpha": asked.smoothquant_alpha} if self.weights.name == "int8_sq" else {}
        if not self.calibrates:
            return {"fp8_scales": fp8_scales} if fp8_scales == "separate" else {}
        return {
            "method": asked.method if self.weights.name == "int4" else None,
            "clip": asked.clip if self.group_size else None,
            "fp8_scales": fp8_scales,
            "propagate": asked.propagate,
            **alpha,
            "calibration": given.model_dump(),
        }

    def to_json(self) -> dict[str, Any]:
        """The whole plan as plain JSON."""
        return {
            **self.slice("build"),
            **self._how(),
            "model": self.recipe.model,
            "services": self.services,
            "container": self.release.container if self.release else None,
            "gate": self.gate,
            "memory": {**asdict(self.memory), "free_bytes": self.memory.free_bytes},
            "latency": asdict(self.latency) if self.latency else None,
            "prices": [asdict(price) for price in self.prices],
            "decisions": [asdict(decision) for decision in self.decisions],
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class _Shape:
    """What is decided before memory and speed are looked at."""

    recipe: Recipe
    target: Device
    backend: str
    release: Release | None
    weights: WeightScheme
    kv: KvScheme
    group_size: int | None
    dtype: str
    limits: Limits
    fused: bool
    paged: bool
    window: KvWindow | None
    speculation: Speculation | None


def make_plan(
    recipe: Recipe,
    config: LlamaConfig,
    *,
    draft: LlamaConfig | None = None,
    host_memory_bytes: int | None = None,
    advise: bool = True,
) -> Plan:
    """Decide everything that the recipe leaves open. Raises PlanError with all reasons at once when it cannot run.

    ``draft``: the config of the draft model, where the recipe names one. ``host_memory_bytes``: what a CPU may use;
    without it, a CPU's memory counts as enough. ``advise``: whether a refusal of what is too large says what would
    fit, which takes longer than the plan.
    """
    notes = Notes()
    shape = _shape(recipe, config, draft, notes)
    recipe, target, backend, release = shape.recipe, shape.target, shape.backend, shape.release
    weights, kv, limits, window = shape.weights, shape.kv, shape.limits, shape.window
    memory = _memory(shape, config, host_memory_bytes, notes, advise=advise)
    _explain(recipe, weights, kv, target, memory, notes)
    calibrates = rules.choose_calibration(recipe, config, weights, kv, backend, notes)
    gate = choose_gate(weights, kv, target, backend, release, notes)
    notes.raise_if_refused(recipe.name)
    notes.warnings.extend(_warnings(recipe, weights, kv, target, backend, release))
    made = _deployment(recipe, config, weights, kv, target, window, fused=shape.fused)
    drafted = shape.speculation is not None
    return Plan(
        recipe=recipe,
        config=config,
        device=target,
        backend=backend,
        release=release,
        weights=weights,
        group_size=shape.group_size,
        kv=kv,
        dtype=shape.dtype,
        limits=limits,
        tp=recipe.parallel.tp,
        pp=recipe.parallel.pp,
        services=recipe.services,
        context_fmha=shape.fused,
        paged_context_fmha=shape.paged,
        window=window,
        speculation=shape.speculation,
        calibrates=calibrates,
        gate=gate,
        memory=memory,
        deployment=made,
        latency=forecast(made, limits, memory.sequences_at_full_length, drafted=drafted) if made else None,
        prices=prices(target.name),
        decisions=tuple(notes.decisions),
        warnings=tuple(notes.warnings),
    )


def memory_of(
    recipe: Recipe, config: LlamaConfig, *, draft: LlamaConfig | None = None, host_memory_bytes: int | None = None
) -> MemoryPlan:
    """The memory that ``make_plan`` looks at, whether it fits or not. Raises PlanError for what is refused before."""
    notes = Notes()
    shape = _shape(recipe, config, draft, notes)
    notes.raise_if_refused(recipe.name)
    return _memory(shape, config, host_memory_bytes, notes, advise=False)


def _memory(shape: _Shape, config: LlamaConfig, host: int | None, notes: Notes, *, advise: bool) -> MemoryPlan:
    cache = Cache(shape.window, shape.speculation)
    known = (shape.weights, shape.kv, shape.limits, shape.target)
    return capacity(shape.recipe, config, *known, notes, cache, fused=shape.fused, host=host, advise=advise)


def _shape(recipe: Recipe, config: LlamaConfig, draft: LlamaConfig | None, notes: Notes) -> _Shape:
    target = device(recipe.device)
    recipe, chosen = settle(recipe)
    about = f"{target.title}{rules.with_sm(target)}, {target.arch}"
    notes.decide("device", target.name, about, target.sources.get("sm", "facts/devices.yaml"))
    backend = rules.choose_backend(recipe, target, notes)
    for choice in chosen:
        notes.decide(choice.key, choice.value, choice.reason, backends()[backend].source)
    weights, kv = WEIGHTS[recipe.quantization.weights], KV[recipe.kv_cache.dtype]
    rules.check_formats(weights, kv, target, backend, notes)
    release = rules.choose_release(recipe, config, weights, kv, target, backend, notes)
    rules.check_llmapi(recipe, config, weights, release, backend, notes)
    group_size = recipe.quantization.group_size if weights.group_sizes else None
    dtype = rules.choose_dtype(recipe, config, target, notes)
    fused = rules.fused_attention(target)
    limits = rules.choose_limits(recipe, config, notes, fused=fused, cpu=target.is_cpu)
    window = choose_window(recipe, config, limits, backend, release, notes)
    if not recipe.kv_cache.reuse:
        notes.decide("kv_reuse", False, "named by the recipe")
    sinks = window is not None and window.sinks > 0
    paged = rules.paged_context(backend, weights, kv, fused, release, target, notes, sinks=sinks)
    speculation = choose_speculation(recipe, config, draft, limits, backend, notes)
    if backend == CPU and speculation:
        check_window(window, notes)
    elif speculation:
        fp8_fused = release is None or target.sm in release.fp8_context_sms
        check_reuse(weights, kv, window, fused=fused, fp8_fused=fp8_fused, notes=notes, asked=recipe.kv_cache.reuse)
    choose_guided(recipe, backend, release, notes)
    choose_lora(recipe, weights, backend, release, dtype, notes)
    rules.check_shapes(recipe, config, group_size, target, notes)
    rules.check_loader(recipe, config, weights, group_size, backend, notes)
    return _Shape(
        recipe, target, backend, release, weights, kv, group_size, dtype, limits, fused, paged, window, speculation
    )


def _deployment(
    recipe: Recipe,
    config: LlamaConfig,
    weights: WeightScheme,
    kv: KvScheme,
    target: Device,
    window: KvWindow | None,
    *,
    fused: bool,
) -> Deployment | None:
    """One service of the plan as ``latency`` sees it; None on a CPU."""
    if target.is_cpu:
        return None
    return Deployment(
        config,
        weights,
        kv,
        target,
        tp=recipe.parallel.tp,
        pp=recipe.parallel.pp,
        group_size=recipe.quantization.group_size,
        fused_attention=fused,
        window=window.tokens if window else None,
        interconnect=interconnect(target.name),
    )


def _explain(
    recipe: Recipe, weights: WeightScheme, kv: KvScheme, target: Device, memory: MemoryPlan, notes: Notes
) -> None:
    """The decisions that the recipe made itself, with what they mean, and what the memory gave."""
    notes.decide("weights", weights.name, weights.summary, weights.source)
    if weights.group_sizes:
        notes.decide("group_size", recipe.quantization.group_size, "input channels that share one scale")
        how = "least squared error after clipping" if recipe.quantization.scales == "mse" else "amax / 7, as ModelOpt"
        notes.decide("scales", recipe.quantization.scales, how)
    if target.is_cpu and kv.name == "int8":
        reason = "OpenVINO's u8 cache: scales are made while running, per token (values) and per channel (keys)"
        notes.decide("kv_cache", kv.name, reason, backends()["openvino"].source)
    else:
        notes.decide("kv_cache", kv.name, kv.summary, kv.source)
    if recipe.kv_cache.max_tokens or recipe.kv_cache.size:
        reason = "named by the recipe"
    else:
        reason = "what the limits can use, within 90 % of what is left" + (
            " per service" if recipe.services > 1 else ""
        )
    notes.decide("max_kv_tokens", memory.max_kv_tokens, reason, "toolchain/planning/memory.py")
    if recipe.services > 1:
        notes.decide(
            "services", recipe.services, "each gets its own fixed cache: shares of free memory depend on start order"
        )


def _warnings(
    recipe: Recipe, weights: WeightScheme, kv: KvScheme, target: Device, backend: str, release: Release | None
) -> Iterator[str]:
    """What a user should know before building, with the source."""
    if target.is_cpu:
        if weights.calibrated_always:
            yield (
                f"{weights.name} also rounds the inputs of the linear layers to 8 bits, and the CPU engine does not: "
                "the quality and speed that are measured here are those of the weights alone"
            )
        return
    if kv.name == "int8":
        yield "INT8 KV is a common cause of bad text (TensorRT-LLM issues 967, 453): check quality"
    if weights.name == "int4":
        yield "int4 weights save memory and speed up decoding, not the first token (TensorRT-LLM issues 1565, 2487)"
    rebuild = release.rebuild_for(backend, target.sm, weights.name) if release else None
    if rebuild:
        yield rebuild.told(weights.name)
    if recipe.services > 1 and backend != "openvino":
        yield "NVIDIA advises against several engines on one GPU (tensorrtllm_backend docs/llama_multi_instance.md)"
