"""Guided decoding, answers that are held to a JSON schema, a regex or a grammar: a rule of the plan. Pure.

It knows which releases take guides from their clients, and what guides exclude. Which guides an engine can keep is the
servers' business.
"""

from __future__ import annotations

from toolchain.planning.decisions import Notes
from toolchain.recipe import Recipe
from toolchain.release import Release, releases
from toolchain.triton_model import triton_model

SOURCE = "TensorRT-LLM triton_backend/docs/guided_decoding.md (1.x); openvino.genai docs/guides/structured-output.mdx"
TENSOR = "guided_decoding_guide_type"


def choose_guided(recipe: Recipe, backend: str, release: Release | None, notes: Notes) -> None:
    """Note the compiler of grammars that the recipe asks for; refuse what the release or the recipe excludes."""
    if recipe.guided_decoding is None:
        return
    if recipe.speculative:
        reason = "guided_decoding with speculative: a draft's tokens are not held to the grammar"
        notes.refuse(f"{reason} ({SOURCE})", "Leave out guided_decoding, or speculative")
    taking = [one.version for one in releases().values() if one.engine and _takes(one.version)]
    if backend == "tensorrt_engine" and release and release.version not in taking:
        notes.refuse(
            f"guided_decoding: TensorRT-LLM {release.version} takes no guides; {taking[0]} is the first that does",
            f'Leave out guided_decoding, or pin tensorrt_llm: "{taking[0]}" or newer',
        )
    if backend == "tensorrt_llmapi":
        reason = "guided_decoding: scalellm does not set it up in TensorRT-LLM's PyTorch runtime"
        notes.refuse(reason, "Leave out guided_decoding, or use backend: tensorrt_engine")
    reason = "requests may hold answers to a JSON schema, a regex or a grammar"
    notes.decide("guided_decoding", recipe.guided_decoding, reason, SOURCE)


def _takes(version: str) -> bool:
    return triton_model(version).input_named(TENSOR) is not None
