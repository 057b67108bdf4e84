"""The flags of ``trtllm-build`` by release (``facts/build_flags.yaml``), and a plan as its exact command line. Pure.

It knows which release takes which flag with which values, and what the builder refuses or changes in silence, so that a
combination that cannot work is told before anything runs. What is decided comes from the plan; nothing is decided here.
It starts nothing: this release of scalellm does not run ``trtllm-build``, and these commands were checked against
TensorRT-LLM's source text, not against a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from toolchain import workspace
from toolchain.errors import PlanError
from toolchain.planning.decisions import FUSED_ATTENTION_SM, paged_context_excluded
from toolchain.planning.lora import MAX_RANK, MODULES
from toolchain.planning.memory import TOKENS_PER_BLOCK
from toolchain.planning.plan import Plan
from toolchain.planning.speculation import MODE
from toolchain.release import Release, releases, within

PROGRAM = "trtllm-build"

Setting = str | int | bool
"""The value of a flag; True and False are on and off, whether a release says that with a switch or with a word."""

_WORDS = {True: "enable", False: "disable"}


@dataclass(frozen=True)
class Flag:
    """One flag as one release takes it."""

    name: str
    value: str
    """``"path"``, ``"int"``, ``"word"`` (one of ``choices``), ``"words"`` or ``"switch"`` (takes no value)."""
    choices: tuple[str, ...]
    """Of a word; empty where they are not known."""
    default: Setting | None
    """The builder's own; None: none, or from the checkpoint's config."""
    unconfirmed: frozenset[str]
    """What no source states for this release: ``"from"``, ``"to"``, ``"default"``, ``"choices"``."""
    note: str


@functools.cache
def flags(version: str) -> Mapping[str, Flag]:
    """Name (without dashes) -> flag, of every flag that this release's builder is known to take.

    Raises PlanError for a release that has no builder or no row in the table of releases.
    """
    known = releases().get(version)
    if known is None or not known.engine:
        builders = [release.version for release in releases().values() if release.engine]
        raise PlanError(
            f"TensorRT-LLM {version} has no {PROGRAM} that scalellm knows", hint=f"Releases: {', '.join(builders)}"
        )
    found: dict[str, Flag] = {}
    for name, row in workspace.facts("build_flags")["flags"].items():
        for span in row.get("spans", [{}]):
            merged = {**row, **span}
            if within(version, merged):
                found[name] = _flag(name, merged)
    return MappingProxyType(found)


def _flag(name: str, row: Mapping[str, Any]) -> Flag:
    return Flag(
        name=name,
        value=row["value"],
        choices=tuple(row.get("choices", ())),
        default=row["default"],
        unconfirmed=frozenset(row.get("unconfirmed", ())),
        note=row.get("note", ""),
    )


def settings(plan: Plan) -> dict[str, Setting]:
    """What the plan asks of the builder, without the folders: flag -> value.

    Every flag whose default differs between releases is in it, so that an engine depends on the plan alone.
    """
    known = flags(_release(plan).version)
    paged: dict[str, Setting] = {"kv_cache_type": "paged"} if "kv_cache_type" in known else {"paged_kv_cache": True}
    both_fp8 = plan.weights.name == plan.kv.name == "fp8"
    found: dict[str, Setting] = {
        "workers": plan.tp * plan.pp,
        "max_batch_size": plan.limits.max_batch_size,
        "max_input_len": plan.limits.max_input_len,
        "max_seq_len": plan.limits.max_seq_len,
        "max_num_tokens": plan.limits.max_num_tokens,
        "max_beam_width": 1,
        **paged,
        "tokens_per_block": TOKENS_PER_BLOCK,
        "remove_input_padding": True,
        "gpt_attention_plugin": "auto" if plan.context_fmha else plan.dtype,
        "gemm_plugin": _gemm_plugin(plan),
        "context_fmha": plan.context_fmha,
        "use_paged_context_fmha": plan.paged_context_fmha,
        "use_fp8_context_fmha": plan.paged_context_fmha and both_fp8,
    }
    if plan.window and plan.window.sinks:
        found["streamingllm"] = True
    if plan.speculation:
        found |= {"speculative_decoding_mode": MODE, "max_draft_len": plan.speculation.tokens}
    if plan.recipe.lora:
        found |= {"lora_plugin": plan.dtype, "lora_target_modules": MODULES, "max_lora_rank": MAX_RANK}
    if plan.weights.name == "fp8" and plan.recipe.quantization.fp8_scales == "separate":
        found["use_fused_mlp"] = False  # it would round gate and up a second time, to one scale
    return found


def _gemm_plugin(plan: Plan) -> str:
    """What multiplies the matrices that keep 16 bits beside int4 weights: cuBLASLt, else TensorRT itself.

    The plugin reaches unquantized and FP8 matrices only (help text of tensorrt_llm/plugin/plugin.py, 2026-11-22).
    """
    if not plan.context_fmha:
        return plan.dtype
    return "auto" if plan.weights.name == "int4" else "disable"


def command(plan: Plan, checkpoint: Path, out: Path) -> tuple[str, ...]:
    """The exact argv that builds the engine of a TensorRT-LLM checkpoint with the plan's release. Starts nothing.

    Raises PlanError, with every reason at once, for another backend, for a combination that the builder refuses or
    would change in silence, and for a flag or value that the release does not know.
    """
    wanted: dict[str, Setting] = {"checkpoint_dir": str(checkpoint), "output_dir": str(out), **settings(plan)}
    found = list(conflicts(plan, wanted))
    if found:
        listed = "".join(f"\n  - {reason}" for reason in found)
        raise PlanError(
            f"{plan.recipe.name}: {PROGRAM} would not build what the plan says:{listed}",
            hint=f"scalellm plan --recipe {plan.recipe.name}",
        )
    return (PROGRAM, *arguments(wanted, _release(plan).version))


def arguments(wanted: Mapping[str, Setting], version: str) -> tuple[str, ...]:
    """Flags and values as this release's builder takes them. Raises PlanError for what it does not know."""
    known, gone = flags(version), workspace.facts("build_flags")["gone"]
    argv: list[str] = []
    for name, value in wanted.items():
        if name not in known:
            since = f": gone since {gone[name]}" if name in gone else ""
            raise PlanError(f"{PROGRAM} of TensorRT-LLM {version} has no --{name}{since}", hint=f"{PROGRAM} --help")
        argv += _words(known[name], value, version)
    return tuple(argv)


def _words(flag: Flag, value: Setting, version: str) -> list[str]:
    if flag.value == "switch":
        if not isinstance(value, bool):
            raise PlanError(f"--{flag.name} of TensorRT-LLM {version} is a switch and takes no {value!r}")
        return [f"--{flag.name}"] if value else []
    spoken = _WORDS[value] if isinstance(value, bool) else str(value)
    if flag.value == "word" and flag.choices and spoken not in flag.choices:
        raise PlanError(
            f"--{flag.name} of TensorRT-LLM {version} takes no {spoken!r}", hint=f"One of: {', '.join(flag.choices)}"
        )
    if flag.value == "int" and (isinstance(value, bool) or not isinstance(value, int)):
        raise PlanError(f"--{flag.name} of TensorRT-LLM {version} takes a whole number, not {value!r}")
    return [f"--{flag.name}", *(spoken.split() if flag.value == "words" else [spoken])]


def conflicts(plan: Plan, wanted: Mapping[str, Setting]) -> Iterator[str]:
    """Every reason why the builder would refuse these flags, or build something else without saying so.

    TensorRT-LLM tensorrt_llm/builder.py @0.12.0.dev2024080600 to 0.17.0.dev2024121700 and about 0.20;
    cpp/tensorrt_llm/plugins/gptAttentionCommon @0.13.0.dev2024082000.
    """
    yield from _attention(plan, wanted)
    yield from _limits(plan, wanted)
    yield from _fusions(plan, wanted)


def _attention(plan: Plan, wanted: Mapping[str, Setting]) -> Iterator[str]:
    sm, fused = _sm(plan), bool(wanted["context_fmha"])
    dtype = plan.dtype if wanted["gpt_attention_plugin"] == "auto" else wanted["gpt_attention_plugin"]
    if fused and sm < FUSED_ATTENTION_SM:
        yield f"context_fmha enable: the fused kernel aborts on SM {sm}"
    if dtype == "bfloat16" and sm < FUSED_ATTENTION_SM:
        yield f"gpt_attention_plugin bfloat16: the attention plugin refuses it on SM {sm}"
    if wanted["use_fp8_context_fmha"] and plan.weights.name != "fp8":
        yield f"use_fp8_context_fmha enable: it does nothing with {plan.weights.name} weights"
    if not wanted["use_paged_context_fmha"]:
        if "speculative_decoding_mode" in wanted:
            yield "speculative_decoding_mode: drafts are checked with KV reuse, which needs use_paged_context_fmha"
        return
    if wanted.get("streamingllm"):
        yield "use_paged_context_fmha enable: the builder turns it off for streamingllm"
    fp8_fused = sm in _release(plan).fp8_context_sms
    excluded = paged_context_excluded(plan.weights, plan.kv, fused=fused, fp8_fused=fp8_fused)
    if excluded:
        yield f"use_paged_context_fmha enable: {excluded}"
    elif plan.kv.name == "fp8" and not wanted["use_fp8_context_fmha"]:
        yield "use_fp8_context_fmha disable: with paged context attention over FP8 KV the builder turns it on"


def _limits(plan: Plan, wanted: Mapping[str, Setting]) -> Iterator[str]:
    batch, tokens = int(wanted["max_batch_size"]), int(wanted["max_num_tokens"])
    prompt, longest = int(wanted["max_input_len"]), int(wanted["max_seq_len"])
    if prompt > longest:
        yield f"max_input_len {prompt}: the builder clips it to max_seq_len {longest}"
    if tokens > batch * longest:
        yield f"max_num_tokens {tokens}: the builder lowers it to max_batch_size x max_seq_len, {batch * longest}"
    checked = batch * (int(wanted.get("max_draft_len", 0)) + 1)
    if checked > batch and tokens < checked:
        yield f"max_num_tokens {tokens}: the builder raises it to max_batch_size x (max_draft_len + 1), {checked}"
    if wanted["context_fmha"]:
        return
    if tokens < prompt:
        yield f"max_num_tokens {tokens}: without context_fmha the builder raises it to max_input_len {prompt}"
    if not any(line.name == "attention workspace" for line in plan.memory.lines):
        yield f"context_fmha disable: the memory plan leaves out the workspace of prompts of {prompt} tokens"


def _fusions(plan: Plan, wanted: Mapping[str, Setting]) -> Iterator[str]:
    default = flags(_release(plan).version)["use_fused_mlp"].default
    if _on(wanted.get("gemm_swiglu_plugin", False)) and not _on(wanted.get("use_fused_mlp", default)):
        yield "gemm_swiglu_plugin: it needs use_fused_mlp"
    if _on(wanted.get("reduce_fusion", False)) and (plan.tp == 1 or plan.pp > 1):
        yield f"reduce_fusion enable: the builder turns it off with tp {plan.tp} and pp {plan.pp}"
    if _on(wanted.get("user_buffer", False)) and not _on(wanted.get("reduce_fusion", False)):
        yield "user_buffer enable: it needs reduce_fusion"


def _on(value: Setting | None) -> bool:
    return value not in (None, False, "disable")


def _release(plan: Plan) -> Release:
    if plan.backend != "tensorrt_engine" or plan.release is None:
        raise PlanError(f"backend {plan.backend} builds without {PROGRAM}", hint="Use backend: tensorrt_engine")
    return plan.release


def _sm(plan: Plan) -> int:
    assert plan.device.sm is not None  # a plan for TensorRT-LLM has a GPU
    return plan.device.sm
