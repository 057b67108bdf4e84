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

ENGINE, CPU = "tensorrt_engine", "openvino"
BACKENDS = (ENGINE, CPU)
"""Those that serve a model with a draft."""

MODE = "draft_tokens_external"
"""Of ``trtllm-build --speculative_decoding_mode``; a release's own list of modes is in facts/build_flags.yaml."""

GENAI = "openvino.genai src/cpp/src/speculative_decoding, src/cpp/src/prompt_lookup @da1db864 (2026-08-21)"

NGRAM = "TensorRT-LLM _torch/pyexecutor/_util.py (instantiate_sampler), llmapi/llm_args.py, read 2026-11-22"
"""NGramDecodingConfig has no sampler of its own: drafts would go to the one that is chosen for its penalties."""

SOURCE = (
    "TensorRT-LLM examples/draft_target_model/README.md; tensorrtllm_backend docs/model_config.md @v0.13.0 to v0.19.0"
)


NO_GAIN = (
    "speculative decoding shortens answers under low load only, where {}; requests with min_tokens or beams are refused"
)


@dataclass(frozen=True)
class Speculation:
    """A draft model beside the model, or prompt lookup."""

    draft: LlamaConfig | None
    """None with prompt lookup."""
    tokens: int
    """Drafted for one step, at most: ``max_draft_len``, by which the builder makes max_seq_len longer."""
    max_seq_len: int
    """Of the draft's engine: the model's own, or the positions that the draft knows. Beyond it nothing is drafted by
    TensorRT-LLM, and hardly anything that is accepted by OpenVINO."""
    lookup: int = 0
    """Tokens that are looked for in the sequence; 0 with a draft model."""


def choose_speculation(
    recipe: Recipe,
    config: LlamaConfig,
    draft: LlamaConfig | None,
    limits: Limits,
    backend: str,
    notes: Notes,
) -> Speculation | None:
    """The draft model or lookup that the recipe asks for; refuses what its backend, release or draft cannot do.

    Raises ValueError where the recipe names a draft and its config is not given.
    """
    asked = recipe.speculative
    if asked is None:
        return None
    if asked.lookup is not None:
        return _choose_lookup(recipe, asked.lookup, asked.tokens, limits, backend, notes)
    if backend not in BACKENDS:
        _refuse_backend(notes)
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
    notes.decide("draft_tokens", asked.tokens, reason, SOURCE if backend == ENGINE else GENAI)
    if longest < limits.max_seq_len:
        further = "longer sequences go on without it" if backend == ENGINE else "beyond them its drafts are guesses"
        notes.decide("draft_max_seq_len", longest, f"all positions that the draft knows; {further}")
    _warn(recipe, config, draft, backend, notes)
    return Speculation(draft, asked.tokens, longest)


def _choose_lookup(
    recipe: Recipe, ngram: int, tokens: int, limits: Limits, backend: str, notes: Notes
) -> Speculation | None:
    if backend == CPU:
        reason = f"each step checks so many tokens that followed its last {ngram}, or fewer, earlier in the sequence"
        notes.decide("draft_tokens", tokens, f"{reason}; empty places are computed too", GENAI)
        reason = "with prompt lookup, requests that were cancelled leave wrong keys in the prefix cache"
        notes.decide("kv_reuse", False, reason, "measured with OpenVINO GenAI 2026.4.1")
        notes.warnings += [NO_GAIN.format("answers repeat the prompt"), *_ties(recipe)]
        return Speculation(None, tokens, limits.max_seq_len, lookup=ngram)
    if backend == ENGINE:
        reason = "no release of Triton's tensorrtllm backend looks tokens up; TensorRT-LLM has an example script only"
        hint = "Use speculative: {draft: FOLDER} with a small model of the same tokenizer, or leave out speculative"
        notes.refuse(f"speculative.lookup: {reason} (TensorRT-LLM examples/prompt_lookup/README.md @51084263)", hint)
        return None
    reason = "the runtime's NGram drafts are checked by a sampler without the penalties that clients are promised"
    hint = "Leave out speculative, or use backend: tensorrt_engine with speculative: {draft: FOLDER}"
    notes.refuse(f"speculative.lookup: {reason} ({NGRAM})", hint)
    return None


def check_reuse(
    weights: WeightScheme,
    kv: KvScheme,
    window: KvWindow | None,
    *,
    fused: bool,
    fp8_fused: bool,
    notes: Notes,
    asked: bool = True,
) -> None:
    """Every step sends the sequence anew, so the engine must be able to look up the keys and values that it has."""
    needs = "speculative needs KV reuse and so paged-context attention"
    excluded = paged_context_excluded(weights, kv, fused=fused, fp8_fused=fp8_fused)
    if not fused:
        notes.refuse(f"{needs}, which does not exist on this GPU ({SOURCE})", "Leave out speculative")
    elif excluded:
        hint = "Use kv_cache dtype: fp16" + (" or fp8" if weights.name == "fp8" and fp8_fused else "")
        notes.refuse(f"{needs} ({SOURCE}): {excluded}", hint)
    if not asked:
        notes.refuse(f"{needs} ({SOURCE}), and kv_cache.reuse is false", "Leave out kv_cache.reuse, or speculative")
    if window:
        notes.refuse(
            f"{needs}, and kv_cache.window excludes KV reuse", "Leave out kv_cache.window, or leave out speculative"
        )


def _ties(recipe: Recipe) -> list[str]:
    """What 16-bit arithmetic may change: one text of 16 of a small Llama, where two logits were 0.04 apart."""
    if recipe.cpu.precision == "f32" or recipe.kv_cache.dtype == "fp32":
        return []
    return [
        "in bf16 the product of several tokens is rounded otherwise than that of one: where two tokens are nearly as "
        "likely, speculative decoding may choose the other one; cpu.precision: f32 gives the same text, token for token"
    ]


def check_window(window: KvWindow | None, notes: Notes) -> None:
    """On a CPU: what a window evicts depends on the step, so the text would no longer be that of plain decoding."""
    if window:
        reason = "speculative with kv_cache.window: what is evicted depends on how many tokens a step has"
        notes.refuse(f"{reason}, so the text would change", "Leave out kv_cache.window, or leave out speculative")


def _refuse_backend(notes: Notes) -> None:
    notes.refuse(
        "speculative: scalellm does not set up a draft model in TensorRT-LLM's PyTorch runtime",
        "Use backend: tensorrt_engine, where the GPU has one, or leave out speculative",
    )


def _warn(recipe: Recipe, config: LlamaConfig, draft: LlamaConfig, backend: str, notes: Notes) -> None:
    """What to expect, and what nobody confirmed."""
    if parameters(draft) >= parameters(config):
        notes.warnings.append("the draft model is not smaller than the model: speculative decoding would be slower")
    if draft.vocab_size < config.vocab_size:
        notes.warnings.append(
            f"the draft has {draft.vocab_size} token ids and the model {config.vocab_size}: the tokenizers "
            "are compared when both are here, at the latest when the repository is made"
        )
    if backend == CPU:
        notes.warnings += [NO_GAIN.format("the draft is often right"), *_ties(recipe)]
        return
    if recipe.quantization.weights not in ("none", "fp8"):
        notes.warnings.append(
            "TensorRT-LLM lists draft models with FP16, BF16 and FP8 only "
            f"({SOURCE}); {recipe.quantization.weights} is not confirmed"
        )
    notes.warnings.append(
        "speculative decoding shortens answers under low load only, where the draft is often right "
        "(tensorrtllm_backend issue 498 measured no gain): compare with num_draft_tokens: 0"
    )


def draft_recipe(recipe: Recipe, found: Speculation, limits: Limits, *, kv_tokens: int, release: str | None) -> Recipe:
    """The recipe of the draft's own checkpoint and engine: the same but for the model, its limits and its cache."""
    assert recipe.speculative is not None
    longest = found.max_seq_len
    return recipe.model_copy(
        update={
            "name": "draft",
            "description": f"the draft model of {recipe.name}",
            "model": recipe.speculative.draft,
            "speculative": None,
            "guided_decoding": None,
            "lora": [],
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
