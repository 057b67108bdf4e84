"""KV sparsification: a window over the last tokens, with the first ones kept as sinks. A rule of the plan. Pure.

It knows what a window leaves in the cache and what it excludes, by backend and release. It does not know how much
memory there is, nor how the runtime is told (``backends``).
"""

from __future__ import annotations

from dataclasses import dataclass

from toolchain import workspace
from toolchain.engine import Limits
from toolchain.family import LlamaConfig
from toolchain.planning.decisions import Notes
from toolchain.planning.memory import TOKENS_PER_BLOCK
from toolchain.recipe import Recipe
from toolchain.release import Release, releases, within

SINKS = "TensorRT-LLM tensorrt_llm/commands/build.py (StreamingLLM); pull requests 6379, 14275 (2026-11-22)"

NO_WINDOW = "TensorRT-LLM issue 11244, pull request 12597 (2026-03-30, which mends Mistral)"
"""Where it says that a window of the cache does not reach the attention of Llama, and of Mistral until then."""


@dataclass(frozen=True)
class KvWindow:
    """How many tokens of a sequence attention sees."""

    tokens: int
    """The last ones, sinks included: ``max_attention_window_size``."""
    sinks: int
    """The first ones, which stay: ``sink_token_length``."""
    ring: bool
    """Whether older tokens are overwritten, so that a sequence takes no more of the cache than its window."""

    def kept(self, max_seq_len: int) -> int:
        """Tokens that a sequence of ``max_seq_len`` takes in the cache; with a ring, whole blocks of its window.

        Sinks have blocks of their own, filled up with a gap: ceil((window + gap) / 64) x 64, gap = -sinks mod 64
        (TensorRT-LLM cpp/tensorrt_llm/batch_manager/kvCacheManager.cpp, mMaxTokenNum, read 2026-11-22).
        """
        if not self.ring:
            return max_seq_len
        gap = -self.sinks % TOKENS_PER_BLOCK
        return -(-(self.tokens + gap) // TOKENS_PER_BLOCK) * TOKENS_PER_BLOCK


def choose_window(
    recipe: Recipe, config: LlamaConfig, limits: Limits, backend: str, release: Release | None, notes: Notes
) -> KvWindow | None:
    """The window that the recipe asks for; refuses where the backend or the release has none. None without one."""
    asked = recipe.kv_cache
    if asked.window is None:
        return None
    if backend == "openvino":
        notes.refuse("kv_cache.window: the openvino backend cannot do this yet", "Leave out window and sinks")
        return None
    if backend == "tensorrt_llmapi":
        reason = "kv_cache.window: TensorRT-LLM's PyTorch runtime gives the attention of these models no window"
        notes.refuse(f"{reason} ({NO_WINDOW})", "Leave out window and sinks, or use backend: tensorrt_engine")
        return None
    if asked.window >= limits.max_seq_len:
        reason = f"kv_cache.window {asked.window} hides nothing: no sequence is longer than {limits.max_seq_len} tokens"
        notes.refuse(reason, "Leave out window and sinks, or choose a smaller window")
    if asked.sinks:
        _check_sinks(config, release, notes)
    if release is None:  # refused already
        return None
    ring = release.window_keeps == "window"
    found = KvWindow(asked.window, asked.sinks, ring)
    row = next(row for row in workspace.facts("releases")["kv_window"] if within(release.version, row))
    takes = f"a sequence takes {found.kept(limits.max_seq_len)} tokens of the cache"
    reason = f"each token attends to the last {asked.window}; {takes}"
    notes.decide("kv_window", asked.window, reason, row["source"])
    if asked.sinks:
        notes.decide("kv_sinks", asked.sinks, "the first tokens stay in the window, in blocks of their own", SINKS)
    notes.decide("kv_reuse", False, "tokens that have left a window are lost to other prompts", row["source"])
    if not ring:
        notes.warnings.append(
            f"TensorRT-LLM {release.version} writes a windowed cache in a row: whether it gives memory back is not "
            "confirmed, so whole sequences are counted (0.21.0 and older keep the window alone)"
        )
    return found


def _check_sinks(config: LlamaConfig, release: Release | None, notes: Notes) -> None:
    """Sinks need StreamingLLM, which is built into an engine, for Llama, by releases that still have it."""
    taking = [one.version for one in releases().values() if one.engine and _has_streamingllm(one.version)]
    pin = f'Leave out sinks, or pin tensorrt_llm: "{taking[-1]}" or older'
    if config.architecture != "LlamaForCausalLM":
        reason = f"kv_cache.sinks: TensorRT-LLM builds attention sinks for Llama only, not {config.architecture}"
        notes.refuse(reason, "Leave out sinks")
    elif release and release.version not in taking:
        notes.refuse(f"kv_cache.sinks: TensorRT-LLM {release.version} refuses to build attention sinks ({SINKS})", pin)


def _has_streamingllm(version: str) -> bool:
    """Whether this release's builder takes ``--streamingllm enable``."""
    spans = workspace.facts("build_flags")["flags"]["streamingllm"]["spans"]
    return any("enable" in span["choices"] for span in spans if within(version, span))
