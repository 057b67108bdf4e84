"""LoRA adapters beside the model: a rule of the plan. Pure: it opens no adapter.

It knows what adapters exclude. Whether their matrices fit the model, ``adapters`` looks at when the engine is built.
"""

from __future__ import annotations

from collections.abc import Mapping

from toolchain.planning.decisions import Notes
from toolchain.quantization import WeightScheme
from toolchain.recipe import Recipe
from toolchain.release import Release, releases
from toolchain.triton_model import triton_model

SOURCE = "toolchain/backends/openvino/lora.py; TensorRT-LLM examples/hf_lora_convert.py, triton_backend docs/lora.md"
MODULES = "attn_q attn_k attn_v attn_dense mlp_h_to_4h mlp_gate mlp_4h_to_h"
"""Of ``trtllm-build --lora_target_modules``: every linear layer, so that an engine takes any adapter."""
MAX_RANK = 64
"""The builder's default, said so that an engine depends on the plan alone."""
_PREFETCH = "lora_prefetch_dir"


def choose_lora(
    recipe: Recipe, weights: WeightScheme, backend: str, release: Release | None, dtype: str, notes: Notes
) -> None:
    """Note the adapters that requests may name; refuse what cannot be combined with them."""
    if not recipe.lora:
        return
    if backend == "tensorrt_llmapi":
        reason = "lora: scalellm does not set up adapters in TensorRT-LLM's PyTorch runtime"
        notes.refuse(reason, "Leave out lora, or use backend: tensorrt_engine")
    elif backend == "tensorrt_engine":
        _check_release(release, dtype, notes)
    if recipe.speculative:
        reason = "lora with speculative: the draft model has no adapters, and its ids none of theirs"
        notes.refuse(reason, "Leave out lora, or speculative")
    folded = recipe.quantization.method == "awq" or weights.name in ("int8_sq", "int4_fp8")
    if folded:
        how = "method awq" if weights.name == "int4" else f"weights {weights.name}"
        reason = "activations are scaled, with the scales folded into the norms, so an adapter would read other inputs"
        notes.refuse(f"lora with {how}: {reason}", "Use method rtn or gptq, or weights int8, fp8 or none")
    names = ", ".join(one.name for one in recipe.lora)
    notes.decide("lora", names, "requests may name one; all of them share each step with the model itself", SOURCE)


def _check_release(release: Release | None, dtype: str, notes: Notes) -> None:
    """Adapters are read from files when the server starts, which hold f16."""
    taking = [one.version for one in releases().values() if one.engine and _PREFETCH in _parameters(one.version)]
    if release and release.version not in taking:
        notes.refuse(
            f"lora: TensorRT-LLM {release.version} reads no adapters from a folder; {taking[0]} is the first that does",
            f'Leave out lora, or pin tensorrt_llm: "{taking[0]}" or newer',
        )
    if dtype != "float16":
        notes.refuse(f"lora: the files of adapters hold float16, and the engine's dtype is {dtype}", "Leave out lora")
    notes.warnings.append("lora: files and flags follow TensorRT-LLM's source; no GPU has run them")


def _parameters(version: str) -> Mapping[str, object]:
    return triton_model(version).parameters
