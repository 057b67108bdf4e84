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
from toolchain.planning.memory import CPU_BLOCK_TOKENS, TOKENS_PER_BLOCK
from toolchain.recipe import KvCache, Recipe
from toolchain.release import Release, releases, within

SINKS = "TensorRT-LLM tensorrt_llm/commands/build.py (StreamingLLM); pull requests 6379, 14275 (2026-11-22)"

NO_WINDOW = "TensorRT-LLM issue 11244, pull request 12597 (2026-03-30, which mends Mistral)"
"""Where it says that a window of the cache does not reach the attention of Llama, and of Mistral until then."""

EVICTION = (
    "openvino.genai src/cpp/src/continuous_batching/cache/cache_eviction.cpp, pipeline_impl.cpp "
    "(_maybe_evict_cache_blocks) @da1db864 (2026-08-21)"
)
"""Whole blocks only; a start, a recent and an evictable part of at least one block each; nothing is evicted from a
prompt before all of it is computed."""


@dataclass(frozen=True)
class KvWindow:
    """How many tokens of a sequence attention sees."""

    tokens: int
    """The last ones, sinks included: ``max_attention_window_size``."""
    sinks: int
    """The first ones, which stay: ``sink_token_length``."""
    ring: bool
    """Whether older tokens are overwritten, so that a sequence takes no more of the cache than its window."""
    prompt: int | None = None
    """Tokens of the longest prompt, where whole blocks are evicted after it was computed: OpenVINO. None elsewhere."""

    @property
    def start(self) -> int:
        """The sinks in whole blocks of OpenVINO."""
        return -(-self.sinks // CPU_BLOCK_TOKENS) * CPU_BLOCK_TOKENS

    @property
    def recent(self) -> int:
        """The last tokens that OpenVINO never evicts; the block that is left of the window goes by attention scores."""
        return self.tokens - self.start - CPU_BLOCK_TOKENS

    def kept(self, max_seq_len: int) -> int:
        """Tokens that a sequence of ``max_seq_len`` takes in the cache; with a ring, whole blocks of its window.

        Sinks have blocks of their own, filled up with a gap: ceil((window + gap) / 64) x 64, gap = -sinks mod 64
        (TensorRT-LLM cpp/tensorrt_llm/batch_manager/kvCacheManager.cpp, mMaxTokenNum, read 2026-11-22). OpenVINO: the
        prompt and a token, or the window and a block that fills up before another one is evicted.
        """
        if self.prompt is not None:
            most = max(self.prompt + 1, self.tokens + CPU_BLOCK_TOKENS)
            return min(max_seq_len, -(-most // CPU_BLOCK_TOKENS) * CPU_BLOCK_TOKENS)
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
        return _choose_eviction(asked, asked.window, limits, notes)
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


def _choose_eviction(asked: KvCache, window: int, limits: Limits, notes: Notes) -> KvWindow | None:
    """OpenVINO's cache eviction with the smallest evictable part: as near to sinks and a window as it comes."""
    found = KvWindow(window, asked.sinks, ring=True, prompt=limits.max_input_len)
    block, least = CPU_BLOCK_TOKENS, found.start + 2 * CPU_BLOCK_TOKENS
    if not asked.sinks:
        reason = f"kv_cache.window without sinks: OpenVINO's eviction always keeps a first block of {block} tokens"
        notes.refuse(f"{reason} ({EVICTION})", f"Use sinks: 4 (kept as {block}), or leave out window")
    if window % block or window < least:
        nearest = max(least, (window + block // 2) // block * block)
        reason = f"kv_cache.window {window}: OpenVINO evicts whole blocks of {block} tokens"
        told = f"{reason}, and needs one for the sinks, one for the last tokens and one between"
        notes.refuse(f"{told} ({EVICTION})", f"Use window: {nearest}")
    if window >= limits.max_seq_len:
        reason = f"kv_cache.window {window} hides nothing: no sequence is longer than {limits.max_seq_len} tokens"
        notes.refuse(reason, "Leave out window and sinks, or choose a smaller window")
    takes = f"a sequence takes {found.kept(limits.max_seq_len)} tokens of the cache"
    reason = (
        f"after the prompt, which is attended to whole, the first {found.start} and the last {found.recent} tokens "
        f"stay, and between them the {block} with the highest attention scores"
    )
    notes.decide("kv_window", window, f"{reason}; positions stay as they were; {takes}", EVICTION)
    notes.decide("kv_sinks", asked.sinks, f"kept as whole blocks: {found.start} tokens", EVICTION)
    notes.decide("kv_reuse", False, "tokens that were evicted are lost to other prompts", EVICTION)
    notes.warnings.append(
        "kv_cache.window on a CPU is not the window of a TensorRT-LLM engine: prompts are attended to whole, and one "
        "block is chosen by attention scores"
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
