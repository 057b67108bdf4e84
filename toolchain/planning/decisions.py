"""The rules of a plan: each decides one thing, notes it with its reason and source, or notes why it cannot be. Pure.

A rule joins what a recipe asks and a model is with what a device, a backend and a release can do. It knows nothing of
the order of the rules, nor of the plan that comes of them; whether the whole fits into memory is not decided here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from toolchain import workspace
from toolchain.device import Device
from toolchain.engine import Limits
from toolchain.errors import PlanError
from toolchain.family import LINEARS, LlamaConfig, linear_shape
from toolchain.planning import loader
from toolchain.quantization import KV, METHODS, WEIGHTS, KvScheme, WeightScheme
from toolchain.recipe import Recipe
from toolchain.release import Release, backends, newest_release, pinned_release, within

MAX_NUM_TOKENS = 8192
"""Default of ``trtllm-build --max_num_tokens`` since 0.11 (TensorRT-LLM tensorrt_llm/commands/build.py @0.12)."""

CPU_STEP_TOKENS = 256
"""A step of the openvino backend is never longer, so that a long prompt does not stall the streams: the same number as
STEP_TOKENS of its runtime, and the default of openvino.genai scheduler_config.hpp 2026.4."""

MODEL_CONFIG = "the model's config.json"
"""Source of what the model itself says."""

FUSED_ATTENTION_SM = 80
"""Oldest SM for fused context attention in releases that still know SM 75: fmhaRunner.cpp @0.12.0.dev2024080600 takes
70, 80, 86, 89 and 90 and aborts on 75."""

_SPOKEN = {
    "fp8": "FP8, which begins with SM 8.9",
    "int4": "int4 kernels",
    "w8a8": "INT8 x INT8 kernels of TensorRT-LLM, which begin with SM 8.0",
    "cpu": "32-bit KV cache",
}


@dataclass(frozen=True)
class Decision:
    """One thing that was decided: ``value`` is plain JSON, ``source`` where the rule behind ``reason`` comes from."""

    name: str
    value: Any
    reason: str
    source: str = ""

    @property
    def explained(self) -> str:
        """The reason, with the source of the rule: where none is noted, the rule is ours."""
        if self.reason == "named by the recipe" and not self.source:
            return self.reason
        return f"{self.reason} [{self.source or 'our rule, toolchain/planning/decisions.py'}]"


@dataclass
class Notes:
    """Collects what is found while planning: decisions, warnings, and every reason to refuse with what would help."""

    decisions: list[Decision] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    def decide(self, name: str, value: Any, reason: str, source: str = "") -> None:
        self.decisions.append(Decision(name, value, reason, source))

    def refuse(self, reason: str, hint: str = "") -> None:
        """Note why the recipe cannot run and what to change; planning goes on, so that all reasons are told."""
        self.refusals.append(reason)
        if hint and hint not in self.hints:
            self.hints.append(hint)

    def raise_if_refused(self, name: str) -> None:
        """Raise PlanError with every reason noted so far; ``name`` is the recipe's."""
        if self.refusals:
            many = len(self.refusals) > 1
            reasons = "".join(f"\n  - {reason}" for reason in self.refusals) if many else " " + self.refusals[0]
            hint = "\n".join(self.hints)
            raise PlanError(f"{name}: this recipe cannot run:{reasons}", hint=hint, reasons=self.refusals)


def with_sm(target: Device) -> str:
    """``" (SM 8.9)"`` for a GPU, nothing for a CPU."""
    return "" if target.sm is None else f" (SM {target.sm // 10}.{target.sm % 10})"


def choose_backend(recipe: Recipe, target: Device, notes: Notes) -> str:
    """The recipe's backend, or the device's first; refuses one that does not run there."""
    chosen = recipe.chosen_backend
    if chosen not in target.backends:
        only = " or ".join(target.backends)
        reason = f"backend {chosen} does not run on the {target.title}; {only} does{_why_one_backend(target)}"
        notes.refuse(reason, f"Use backend: {only}")
    elif recipe.backend:
        notes.decide("backend", chosen, "named by the recipe")
    else:
        reason = f"the default for the {target.title}{_why_one_backend(target)}"
        notes.decide("backend", chosen, reason, target.sources.get("backends", "facts/devices.yaml"))
    return chosen


def _why_one_backend(target: Device) -> str:
    special = len(target.backends) == 1 or target.backends[0] != "tensorrt_engine"
    return f". {target.notes}" if special and not target.is_cpu else ""


def check_formats(weights: WeightScheme, kv: KvScheme, target: Device, backend: str, notes: Notes) -> None:
    """A quantization needs dtypes that the device must have, and a backend that takes it."""
    accepts = backends()[backend]
    usable_weights = [n for n in accepts.weights if n != "none" and WEIGHTS[n].needs <= target.dtypes]
    usable_kv = [n for n in accepts.kv if KV[n].needs <= target.dtypes]
    for missing in sorted(weights.needs - target.dtypes):
        use = " or ".join(f"weights: {name}" for name in [*usable_weights, "none"][:2])
        notes.refuse(f"quantization.weights {weights.name}: {_has_no(target, missing)}", f"Use {use}")
    for missing in sorted(kv.needs - target.dtypes):
        use = " or ".join(usable_kv)
        notes.refuse(f"kv_cache.dtype {kv.name}: {_has_no(target, missing)}", f"Use kv_cache dtype: {use}")
    if weights.name not in accepts.weights:
        notes.refuse(f"{accepts.title} takes no {weights.name} weights: it takes {', '.join(accepts.weights)}")
    if kv.name not in accepts.kv and kv.needs <= target.dtypes:
        reason = f"kv_cache.dtype {kv.name}: {accepts.title} has no such cache; it takes {', '.join(accepts.kv)}"
        notes.refuse(f"{reason} ({accepts.source})", f"Use kv_cache dtype: {' or '.join(usable_kv)}")


def _has_no(target: Device, dtype: str) -> str:
    return f"the {target.title}{with_sm(target)} has no {_SPOKEN.get(dtype, dtype)}"


def choose_release(
    recipe: Recipe,
    config: LlamaConfig,
    weights: WeightScheme,
    kv: KvScheme,
    target: Device,
    backend: str,
    notes: Notes,
) -> Release | None:
    """The TensorRT-LLM release: the pinned one, or the newest that lists the SM with the quantization's formats.

    Its loader must read the model's checkpoint; where nobody knows whether it does, that is a warning.
    None for openvino and after a refusal. What the device or the backend lacks ``check_formats`` refuses, not this.
    """
    if target.sm is None or backend == "openvino":
        if recipe.tensorrt_llm:
            notes.refuse(f"tensorrt_llm {recipe.tensorrt_llm}: no TensorRT-LLM runs on the {target.title}")
        return None
    if backend not in target.backends:
        return None
    accepts = backends()[backend]
    taken = [scheme.needs for scheme, known in ((weights, accepts.weights), (kv, accepts.kv)) if scheme.name in known]
    needs = frozenset[str]().union(*taken) & target.dtypes
    read = loader.features(config, weights, engine_dtype(config, target))
    try:
        if recipe.tensorrt_llm:
            release, reason = pinned_release(recipe.tensorrt_llm, target.sm, backend, needs, read)
        else:
            release, reason = newest_release(target.sm, backend, needs, read)
    except PlanError as error:
        notes.refuse(error.message, error.hint)
        return None
    notes.decide("tensorrt_llm", release.version, reason, release.source)
    ships = f"ships TensorRT-LLM {release.version}; driver {release.driver} or newer"
    notes.decide("container", release.container, ships, release.source)
    notes.warnings.extend(
        f"whether TensorRT-LLM {release.version} reads {one.text} is not confirmed; {one.first} does ({one.source})"
        for one in release.unread_of(backend, target.sm, read)
    )
    return release


def check_llmapi(
    recipe: Recipe, config: LlamaConfig, weights: WeightScheme, release: Release | None, backend: str, notes: Notes
) -> None:
    """What the loader of TensorRT-LLM's PyTorch runtime cannot take, beyond formats (``facts/llmapi.yaml``)."""
    if backend != "tensorrt_llmapi" or release is None:
        return
    since = workspace.facts("llmapi")["loader"]["W4A16_AWQ"]["tensor_parallel"]
    if weights.name == "int4" and recipe.parallel.tp > 1 and not within(release.version, since):
        reason = f"tensorrt_llm {release.version}: it does not split the scales of int4 weights over tp"
        notes.refuse(f"{reason} ({since['source']})", f"Use tensorrt_llm: {since['from']} or newer, or leave it out")
    if weights.name == "int4_fp8" and config.dtype == "float32":
        reason = "int4_fp8 weights: the runtime wants the scales of a 16-bit model, and this model is float32"
        notes.refuse(reason, "Use weights: fp8 or int4")


def check_loader(
    recipe: Recipe, config: LlamaConfig, weights: WeightScheme, group_size: int | None, backend: str, notes: Notes
) -> None:
    """Shapes that ``trtllm-build`` does not take, and what it makes of the weights, where that is more than reading.

    Shapes only where nothing else is wrong: ``check_shapes`` says most of it in better words.
    """
    if backend != "tensorrt_engine":
        return
    if not notes.refusals:
        for reason, hint in loader.misfits(config, weights.quant_algo, group_size or 0, recipe.parallel.tp):
            notes.refuse(reason, hint)
    if weights.name == "int8":
        told = loader.rounds_again(config, recipe.parallel.tp, recipe.parallel.pp)
        notes.decide("int8 rows", "rounded again by trtllm-build", told, loader.ROUNDS_AGAIN_SOURCE)
        notes.warnings.append(told)


def choose_calibration(
    recipe: Recipe, config: LlamaConfig, weights: WeightScheme, kv: KvScheme, backend: str, notes: Notes
) -> bool:
    """Whether text runs through the model when its checkpoint is made, and what for; also notes how int4 is rounded."""
    asked, given = recipe.quantization, recipe.calibration
    _rounding(recipe, weights, notes)
    _activations(recipe, weights, backend, notes)
    needs = []
    if weights.name == "int4":
        needs.append((f"method {asked.method}", METHODS[asked.method].calibration))
    if backend != "openvino" or weights.calibrated_always:
        needs.append((f"{weights.name} weights", weights.calibration))
    if backend != "openvino":
        needs.append((f"{kv.name} KV", kv.calibration))
    told = [f"{what} needs {measured}" for what, measured in needs if measured]
    if not told:
        notes.decide("calibration", None, "nothing in this checkpoint is measured on text")
        if "calibration" in recipe.model_fields_set or "propagate" in asked.model_fields_set:
            notes.warnings.append("nothing here is calibrated: the recipe's keys calibration and propagate do nothing")
        return False
    known = positions(config)
    if given.tokens > known:
        notes.refuse(f"calibration.tokens {given.tokens}: the model knows {known} positions", f"Use tokens: {known}")
    notes.decide("calibration", given.data, f"{given.samples} rows of {given.tokens} tokens; " + "; ".join(told))
    clean = "each layer is calibrated on what the unquantized layers before it give, as ModelOpt does"
    quantized = "each layer is calibrated on what the quantized layers before it give"
    notes.decide("propagate", asked.propagate, clean if asked.propagate == "clean" else quantized)
    return True


def _rounding(recipe: Recipe, weights: WeightScheme, notes: Notes) -> None:
    """How the weights are rounded: what is particular to each scheme."""
    asked = recipe.quantization
    if weights.group_sizes:
        method = METHODS["awq" if weights.name == "int4_fp8" else asked.method]
        notes.decide("method", method.name, method.summary, method.source)
        if asked.clip:
            notes.decide("clip", True, "the clipping of each group is searched by the layer's output")
    if weights.name == "int8_sq":
        reason = "how much of the inputs' outliers the weights take over: 0 none, 1 all; 0.5 shares them evenly"
        notes.decide("smoothquant_alpha", asked.smoothquant_alpha, reason, weights.source)
    if weights.name == "fp8":
        shared = "one weight scale for q, k and v and one for gate and up: TensorRT-LLM multiplies them fused"
        separate = "one weight scale per matrix, as ModelOpt's unified export; a TensorRT-LLM engine rounds them again"
        notes.decide(
            "fp8_scales", asked.fp8_scales, shared if asked.fp8_scales == "shared" else separate, weights.source
        )


def _activations(recipe: Recipe, weights: WeightScheme, backend: str, notes: Notes) -> None:
    """What becomes of the linear layers' inputs, where the scheme, or the recipe for a CPU, means to round them."""
    if backend == "openvino" and recipe.cpu.activations == "int8":
        if not weights.name.startswith("int"):
            reason = f"cpu.activations int8: OpenVINO rounds the inputs of int4 and int8 weights, not of {weights.name}"
            notes.refuse(reason, "Use quantization.weights: int4, or activations: full")
        reason = "rounded at run time, by each token's own scales"
        notes.decide("activations", "int8", reason, backends()[backend].source)
        return
    if not weights.activations:
        return
    if backend == "openvino":
        reason = f"OpenVINO takes {weights.name} as weights and multiplies them with 16- or 32-bit activations"
        notes.decide("activations", "16 or 32 bits", reason, backends()[backend].source)
    else:
        reason = "the engine rounds the input of each linear layer to 8 bits, by a scale that is measured beforehand"
        notes.decide("activations", weights.activations, reason, weights.source)


def _precision(recipe: Recipe, notes: Notes) -> None:
    """The arithmetic of the openvino backend."""
    asked, source = recipe.cpu.precision, backends()["openvino"].source
    if recipe.kv_cache.dtype != "fp32":
        reason = "bf16 where the CPU has instructions for it, else f32" if asked == "auto" else "named by the recipe"
        notes.decide("precision", asked, reason)
    elif asked == "bf16":
        notes.refuse("cpu.precision bf16: OpenVINO loads an fp32 cache with f32 arithmetic only", "Use precision: f32")
    else:
        notes.decide("precision", "f32", "OpenVINO loads an fp32 cache with f32 arithmetic only", source)


def engine_dtype(config: LlamaConfig, target: Device) -> str:
    """What an engine on a GPU computes in: float32 is float16 there, and so is bfloat16 where the GPU has none."""
    has_it = config.dtype == "bfloat16" and "bf16" in target.dtypes
    return "bfloat16" if has_it else "float16"


def choose_dtype(recipe: Recipe, config: LlamaConfig, target: Device, notes: Notes) -> str:
    """What the engine holds embeddings, norms and head in, and on a GPU computes in: ``float16`` or the model's own."""
    if target.is_cpu:
        notes.decide("dtype", config.dtype, "the model's own; embeddings, norms and head keep it", MODEL_CONFIG)
        _precision(recipe, notes)
        return config.dtype
    chosen = engine_dtype(config, target)
    if config.dtype == "bfloat16" and chosen == "float16":
        reason = f"the model is bfloat16, which the {target.title} does not have: the engine computes in float16"
        notes.decide("dtype", "float16", reason, "TensorRT-LLM gptAttentionCommon.cpp refuses bfloat16 below SM 80")
        notes.warnings.append("the model is bfloat16 and its engine computes in float16: values beyond 65504 overflow")
        return "float16"
    if config.dtype == "float32":
        notes.decide("dtype", "float16", "the model is float32; the engine computes in float16")
        return "float16"
    notes.decide("dtype", config.dtype, "the model's own", MODEL_CONFIG)
    return config.dtype


def fused_attention(target: Device) -> bool:
    """Whether a prompt's attention runs in one kernel, without a workspace of its length squared."""
    return target.sm is None or target.sm >= FUSED_ATTENTION_SM


def choose_limits(recipe: Recipe, config: LlamaConfig, notes: Notes, *, fused: bool, cpu: bool) -> Limits:
    """Sequences, their length, the longest prompt and the tokens of one step."""
    asked = recipe.limits
    known = positions(config)
    longest = asked.max_seq_len or known
    if longest > known:
        notes.refuse(f"limits.max_seq_len {longest}: the model knows {known} positions", f"Use max_seq_len: {known}")
    reason = "named by the recipe" if asked.max_seq_len else "all positions that the model knows"
    notes.decide("max_seq_len", longest, reason, "" if asked.max_seq_len else MODEL_CONFIG)
    prompt = asked.max_input_len or longest
    if prompt > longest:
        notes.refuse(
            f"limits.max_input_len {prompt} is more than max_seq_len {longest}", f"Use max_input_len: {longest}"
        )
    reason = "named by the recipe" if asked.max_input_len else "a prompt may take the whole sequence"
    notes.decide("max_input_len", prompt, reason)
    notes.decide("max_batch_size", asked.max_batch_size, "sequences in flight, per service")
    tokens, reason, source = _step(recipe, longest, cpu)
    if not fused and tokens < prompt:
        tokens, reason = prompt, "raised to max_input_len: without fused attention a prompt is one piece"
    if recipe.kv_cache.window and fused and not cpu and tokens < prompt:
        tokens, reason = prompt, "raised to max_input_len: with a window over the cache a prompt is one piece"
    if recipe.speculative and not cpu and tokens < longest:
        if asked.max_num_tokens:
            needs = "speculative sends the whole sequence in each step"
            notes.refuse(f"limits.max_num_tokens {tokens}: {needs}", f"Use max_num_tokens: {longest}")
        tokens, reason = longest, "raised to max_seq_len: speculative decoding sends the whole sequence in each step"
    if recipe.speculative and cpu:
        tokens, reason = _drafting_step(recipe, prompt, tokens, reason)
    notes.decide("max_num_tokens", tokens, reason, source)
    return Limits(asked.max_batch_size, longest, prompt, tokens)


def _drafting_step(recipe: Recipe, prompt: int, tokens: int, reason: str) -> tuple[int, str]:
    """A step of the openvino backend that never cuts drafts, nor, with a draft model, a prompt.

    OpenVINO GenAI 2026.4.1 gives wrong tokens where prompts are cut while the draft model writes (measured).
    """
    assert recipe.speculative is not None
    drafted = recipe.speculative.tokens + 1
    checked, whole = recipe.limits.max_batch_size * drafted, prompt + drafted
    if recipe.speculative.draft and whole > max(tokens, checked):
        reason = "with a draft model a prompt is one piece, drafts included, and a long one stalls every stream"
        return whole, f"raised to max_input_len + drafted tokens + 1: {reason}"
    if checked > tokens:
        return checked, "raised to max_batch_size x (drafted tokens + 1): a step checks them all"
    return tokens, reason


def _step(recipe: Recipe, longest: int, cpu: bool) -> tuple[int, str, str]:
    """Tokens in one step over all sequences, why, and the source of the rule."""
    asked, most = recipe.limits.max_num_tokens, recipe.limits.max_batch_size * longest
    source = "openvino.genai scheduler_config.hpp 2026.4" if cpu else "TensorRT-LLM tensorrt_llm/commands/build.py"
    if min(asked or MAX_NUM_TOKENS, MAX_NUM_TOKENS if not cpu else CPU_STEP_TOKENS) >= most:
        return most, "max_batch_size x max_seq_len: no step can hold more", source
    if cpu and (asked is None or asked > CPU_STEP_TOKENS):
        return CPU_STEP_TOKENS, "a step cannot be interrupted: longer prompts take several, and nobody waits", source
    if asked:
        return min(asked, most), "named by the recipe", source
    return MAX_NUM_TOKENS, "the builder's default", source


def positions(config: LlamaConfig) -> int:
    """Positions that the model knows: linear rope scaling stretches max_position_embeddings, llama3's is in it."""
    scaling = config.rope_scaling
    stretch = scaling.factor if scaling and scaling.kind == "linear" else 1.0
    return int(config.max_position_embeddings * stretch)


def paged_context(
    backend: str,
    weights: WeightScheme,
    kv: KvScheme,
    fused: bool,
    release: Release | None,
    target: Device,
    notes: Notes,
    *,
    sinks: bool = False,
) -> bool:
    """Whether paged-context attention can be on, which KV reuse and chunked context need.

    ``sinks``: the engine keeps attention sinks, for which the builder turns it off (builder.py @0.20).
    """
    if backend != "tensorrt_engine":
        return True
    source = "TensorRT-LLM tensorrt_llm/builder.py, checks @0.12 to 0.20"
    if not fused:
        fmha = "fmhaRunner.cpp @0.12.0.dev2024080600; TensorRT-LLM issues 199, 320, 1515"
        notes.decide("context_fmha", False, "the fused kernel aborts on this SM; attention takes S^2 workspace", fmha)
    fp8_fused = release is None or target.sm in release.fp8_context_sms
    excluded = paged_context_excluded(weights, kv, fused=fused, fp8_fused=fp8_fused)
    if sinks and not excluded:
        excluded = "attention sinks exclude it; so no KV reuse and no chunked context"
    reason = excluded or "KV reuse and chunked context need it, and nothing excludes it"
    notes.decide("paged_context_fmha", not excluded, reason, source)
    return not excluded


def paged_context_excluded(weights: WeightScheme, kv: KvScheme, *, fused: bool, fp8_fused: bool) -> str:
    """Why TensorRT-LLM's builder refuses paged-context attention for these formats; empty where it does not.

    ``fused``: attention of prompts is one kernel; ``fp8_fused``: the release has that kernel in FP8 for this SM.
    """
    if not fused:
        return "needs context_fmha; so no KV reuse and no chunked context"
    if kv.name == "int8":
        return "INT8 KV excludes it; so no KV reuse and no chunked context"
    if kv.name == "fp8" and weights.name != "fp8":
        return "FP8 KV allows it with FP8 weights only; no KV reuse here"
    if kv.name == "fp8" and not fp8_fused:
        return (
            "FP8 weights and FP8 KV force FP8 attention with it, not confirmed for this release on this SM; no KV reuse"
        )
    return ""


def check_shapes(recipe: Recipe, config: LlamaConfig, group_size: int | None, target: Device, notes: Notes) -> None:
    """What the model's shapes exclude: groups that do not divide, splits that do not come out even."""
    tp, pp = recipe.parallel.tp, recipe.parallel.pp
    if target.is_cpu and tp * pp > 1:
        notes.refuse(f"parallel tp {tp} pp {pp}: a CPU service is not split", "Leave out parallel")
    if config.num_heads % tp:
        fits = ", ".join(str(n) for n in range(1, 9) if config.num_heads % n == 0)
        notes.refuse(f"parallel.tp {tp} does not divide the model's {config.num_heads} heads", f"Use tp: {fits}")
    elif config.num_kv_heads % tp and tp % config.num_kv_heads:
        notes.refuse(f"parallel.tp {tp} and the model's {config.num_kv_heads} kv heads do not divide one another")
    if config.num_layers % pp:
        notes.refuse(f"parallel.pp {pp} does not divide the model's {config.num_layers} layers")
    if group_size is None:
        return
    uneven = list(_uneven(config, group_size, tp))
    accepts = backends()[recipe.chosen_backend]
    if group_size not in accepts.group_sizes:
        listed = " or ".join(map(str, accepts.group_sizes))
        notes.refuse(
            f"quantization.group_size {group_size}: {accepts.title} computes groups of {listed} only",
            f"Use group_size: {listed}; weights that are in other groups already run with device: cpu",
        )
    if uneven:
        sizes = WEIGHTS[recipe.quantization.weights].group_sizes
        finer = [size for size in sizes if size in accepts.group_sizes and not list(_uneven(config, size, tp))]
        hint = f"Use group_size: {finer[0]}" if finer else "Use weights: fp8, int8 or none, or another tp"
        notes.refuse(f"quantization.group_size {group_size} does not divide " + "; ".join(uneven), hint)
    odd = [linear for linear in LINEARS if linear_shape(config, linear)[0] % 2]
    if odd:
        notes.refuse(f"int4 packs two output rows in a byte, and {', '.join(odd)} has an odd number of rows")


def _uneven(config: LlamaConfig, group_size: int, tp: int) -> Iterator[str]:
    """The linears whose input features per rank are not whole groups (o_proj and down_proj are split there)."""
    for linear in LINEARS:
        features = linear_shape(config, linear)[1]
        split = tp if linear in ("self_attn.o_proj", "mlp.down_proj") else 1
        if features % (group_size * split):
            yield f"{linear}'s {features} input features" + (f" over tp {tp}" if split > 1 else "")
