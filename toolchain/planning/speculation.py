"""Speculative decoding with a draft model: the rule of the plan, and the recipe of the draft. Pure.

The draft writes up to N tokens, the model checks them in one step and adds one of its own, so that the text stays the
model's. This knows what that needs of a release, an engine and a pair of models. It does not know how tokens go back
and forth (``model_repo_templates/common/tensorrt_llm_bls``), nor how much memory there is.
"""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.engine import Limits
from toolchain.family import LlamaConfig
from toolchain.planning.decisions import Notes, paged_context_excluded, positions
from toolchain.planning.kv_window import KvWindow
from toolchain.planning.memory import parameters
from toolchain.quantization import KvScheme, WeightScheme
from toolchain.recipe import KvCache, Recipe, RecipeLimits

BACKEND = "tensorrt_engine"
"""The one that serves a model with a draft."""

MODE = "draft_tokens_external"
"""Of ``trtllm-build --speculative_decoding_mode``; a release's own list of modes is in facts/build_flags.yaml."""

SOURCE = (
    "TensorRT-LLM examples/draft_target_model/README.md; tensorrtllm_backend docs/model_config.md @v0.13.0 to v0.19.0"
)


@dataclass(frozen=True)
class Speculation:
    """A draft model beside the model."""

    draft: LlamaConfig
    tokens: int
    """Drafted for one step, at most: ``max_draft_len``, by which the builder makes max_seq_len longer."""
    max_seq_len: int
    """Of the draft's engine: the model's own, or the positions that the draft knows. Beyond it nothing is drafted."""


def choose_speculation(
    recipe: Recipe,
    config: LlamaConfig,
    draft: LlamaConfig | None,
    limits: Limits,
    backend: str,
    notes: Notes,
) -> Speculation | None:
    """The draft model that the recipe asks for; refuses what its backend, release or draft cannot do.

    Raises ValueError where the recipe names a draft and its config is not given.
    """
    asked = recipe.speculative
    if asked is None:
        return None
    if backend != BACKEND:
        _refuse_backend(backend, notes)
        return None
    if draft is None:
        raise ValueError(f"the config of {asked.draft} is needed")
    if recipe.parallel.pp > 1:
        reason = f"speculative with parallel.pp {recipe.parallel.pp}: TensorRT-LLM lists tensor parallelism only"
        notes.refuse(f"{reason} ({SOURCE})", "Leave out speculative, or use tp instead of pp")
    if draft.vocab_size > config.vocab_size:
        reason = f"speculative.draft {asked.draft} has {draft.vocab_size} token ids, the model {config.vocab_size}"
        notes.refuse(f"{reason}: it would draft ids that the model does not know", "Use a draft with its tokenizer")
    longest = min(limits.max_seq_len, positions(draft))
    reason = f"each step checks so many tokens of {asked.draft} and adds one; it must have the model's own tokenizer"
    notes.decide("draft_tokens", asked.tokens, reason, SOURCE)
    if longest < limits.max_seq_len:
        reason = "all positions that the draft knows; longer sequences go on without it"
        notes.decide("draft_max_seq_len", longest, reason)
    _warn(recipe, config, draft, notes)
    return Speculation(draft, asked.tokens, longest)


def check_reuse(
    weights: WeightScheme, kv: KvScheme, window: KvWindow | None, *, fused: bool, fp8_fused: bool, notes: Notes
) -> None:
    """Every step sends the sequence anew, so the engine must be able to look up the keys and values that it has."""
    needs = "speculative needs KV reuse and so paged-context attention"
    excluded = paged_context_excluded(weights, kv, fused=fused, fp8_fused=fp8_fused)
    if not fused:
        notes.refuse(f"{needs}, which does not exist on this GPU ({SOURCE})", "Leave out speculative")
    elif excluded:
        hint = "Use kv_cache dtype: fp16" + (" or fp8" if weights.name == "fp8" and fp8_fused else "")
        notes.refuse(f"{needs} ({SOURCE}): {excluded}", hint)
    if window:
        notes.refuse(
            f"{needs}, and kv_cache.window excludes KV reuse", "Leave out kv_cache.window, or leave out speculative"
        )


def _refuse_backend(backend: str, notes: Notes) -> None:
    if backend == "openvino":
        notes.refuse("speculative: the openvino backend cannot do this yet", "Leave out speculative")
        return
    notes.refuse(
        "speculative: scalellm does not set up a draft model in TensorRT-LLM's PyTorch runtime",
        "Use backend: tensorrt_engine, where the GPU has one, or leave out speculative",
    )


def _warn(recipe: Recipe, config: LlamaConfig, draft: LlamaConfig, notes: Notes) -> None:
    """What to expect, and what nobody confirmed."""
    if parameters(draft) >= parameters(config):
        notes.warnings.append("the draft model is not smaller than the model: speculative decoding would be slower")
    if draft.vocab_size < config.vocab_size:
        notes.warnings.append(
            f"the draft has {draft.vocab_size} token ids and the model {config.vocab_size}: the tokenizers "
            "are compared when both are here, at the latest when the repository is made"
        )
    if recipe.quantization.weights not in ("none", "fp8"):
        notes.warnings.append(
            "TensorRT-LLM lists draft models with FP16, BF16 and FP8 only "
            f"({SOURCE}); {recipe.quantization.weights} is not confirmed"
        )
    notes.warnings.append(
        "speculative decoding shortens answers under low load only, where the draft is often right "
        "(tensorrtllm_backend issue 498 measured no gain): compare with num_draft_tokens: 0"
    )


def draft_recipe(recipe: Recipe, found: Speculation, limits: Limits, *, kv_tokens: int, release: str) -> Recipe:
    """The recipe of the draft's own checkpoint and engine: the same but for the model, its limits and its cache."""
    assert recipe.speculative is not None
    longest = found.max_seq_len
    return recipe.model_copy(
        update={
            "name": "draft",
            "description": f"the draft model of {recipe.name}",
            "model": recipe.speculative.draft,
            "speculative": None,
            "tensorrt_llm": release,
            "services": 1,
            "kv_cache": KvCache(dtype=recipe.kv_cache.dtype, max_tokens=kv_tokens),
            "limits": RecipeLimits(
                max_batch_size=limits.max_batch_size,
                max_seq_len=longest,
                max_input_len=min(limits.max_input_len, longest),
                max_num_tokens=limits.max_num_tokens,
            ),
        }
    )
