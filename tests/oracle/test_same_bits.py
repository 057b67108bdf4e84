"""FP8, INT8 weight-only, plain int4 and the scales of the KV cache: the same bytes as NVIDIA ModelOpt's exports.

Every tensor of a folder is compared, names and dtypes too. `make test-oracle` runs these tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.oracle.conftest import differing
from tests.quantizers.unified_folder import tensors_of
from toolchain.checkpoint import Checkpoint

Ours = Callable[..., Path]
UNIFIED: dict[str, dict[str, Any]] = {
    "fp8": {"weights": "fp8", "fp8_scales": "separate", "kv": "fp8"},
    "int8-wo": {"weights": "int8"},
}
FUSED = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": ("self_attn.o_proj",),
    "mlp.fc": ("mlp.gate_proj",),
    "mlp.gate": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}
"""A TensorRT-LLM checkpoint's matrices of a layer, as what they are made of. `fc` is the one before the activation."""


@pytest.mark.parametrize("way", UNIFIED)
def test_unified_export_has_the_same_bytes(theirs: Path, ours: Ours, way: str) -> None:
    assert differing(ours(**UNIFIED[way]), theirs / way) == {}


@pytest.mark.parametrize("way", UNIFIED)
def test_unified_export_has_the_same_documents(theirs: Path, ours: Ours, way: str) -> None:
    same_documents(ours(**UNIFIED[way]), theirs / way)


def test_plain_int4_has_the_same_bytes(theirs: Path, ours: Ours) -> None:
    assert differing(ours(weights="int4", method="rtn"), theirs / "int4") == {}


def test_plain_int4_is_said_to_have_no_pre_quant_scale(theirs: Path, ours: Ours) -> None:
    """ModelOpt says W4A16_AWQ with pre_quant_scale of it, and writes none: there we differ, on purpose."""
    folders = (ours(weights="int4", method="rtn"), theirs / "int4")
    found, expected = (json.loads((one / "hf_quant_config.json").read_text())["quantization"] for one in folders)
    assert (found.pop("pre_quant_scale"), expected.pop("pre_quant_scale")) == (False, True)
    assert found == expected
    assert not any(name.endswith("pre_quant_scale") for name in tensors_of(theirs / "int4"))


def test_fp8_tensorrt_llm_export_has_the_same_bytes(theirs: Path, ours: Ours) -> None:
    made = ours(weights="fp8", fp8_scales="shared", kv="fp8")
    assert differing(as_tensorrt_llm(made, weight_scale=scalar, input_scale=scalar), rank0(theirs / "fp8-trt")) == {}


def test_int8_tensorrt_llm_export_has_the_same_bytes_with_int8_kv_scales_from_the_ranges(
    theirs: Path, ours: Ours
) -> None:
    made = ours(weights="int8", kv="int8")
    ranges = Checkpoint.open(made).kv_ranges
    assert ranges is not None
    found = as_tensorrt_llm(made, weight_scale=torch.cat)
    for layer, amaxes in enumerate(ranges):
        key, value = (torch.tensor([amax]) / 127 for amax in amaxes)
        for one, scale in (("k", key), ("v", value), ("kv", torch.maximum(key, value))):
            found[f"transformer.layers.{layer}.attention.{one}_cache_scaling_factor"] = scale
    assert differing(found, rank0(theirs / "int8-wo-kv8-trt")) == {}


def same_documents(made: Path, theirs: Path) -> None:
    """But for the producer, and what ModelOpt's transformers adds to the model's own configuration."""
    for name in ("hf_quant_config.json", "config.json"):
        found, expected = (json.loads((folder / name).read_text()) for folder in (made, theirs))
        if name == "config.json":
            found, expected = found["quantization_config"], expected["quantization_config"]
        assert found.pop("producer")["name"] == "scalellm"
        assert expected.pop("producer") == {"name": "modelopt", "version": "0.47.0"}
        assert found == expected


def scalar(scales: list[torch.Tensor]) -> torch.Tensor:
    """The one scale that all parts share."""
    assert len({float(scale) for scale in scales}) == 1
    return scales[0].view(1)


def as_tensorrt_llm(made: Path, **joined: Callable[[list[torch.Tensor]], torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of one of our folders under TensorRT-LLM's names. ``joined``: by suffix, how the parts' scales join.

    Written from the description of the checkpoint format, for this comparison alone.
    """
    ours, found = tensors_of(made), {}
    config = json.loads((made / "config.json").read_text())
    names = {"weight_scale": "weights_scaling_factor", "input_scale": "activation_scaling_factor"}
    for layer in range(config["num_hidden_layers"]):
        old, new = f"model.layers.{layer}", f"transformer.layers.{layer}"
        found[f"{new}.input_layernorm.weight"] = ours[f"{old}.input_layernorm.weight"]
        found[f"{new}.post_layernorm.weight"] = ours[f"{old}.post_attention_layernorm.weight"]
        for name, parts in FUSED.items():
            dtype = ours[f"{old}.{parts[0]}.weight"].dtype
            codes = [ours[f"{old}.{part}.weight"].view(torch.uint8) for part in parts]
            found[f"{new}.{name}.weight"] = torch.cat(codes).view(dtype)
            for suffix, join in joined.items():
                found[f"{new}.{name}.{names[suffix]}"] = join([ours[f"{old}.{part}.{suffix}"] for part in parts])
        kv = [ours.get(f"{old}.self_attn.{one}_proj.{one}_scale") for one in "kv"]
        if kv[0] is not None and kv[1] is not None:
            for one, scale in (("k", kv[0]), ("v", kv[1]), ("kv", torch.maximum(kv[0], kv[1]))):
                found[f"{new}.attention.{one}_cache_scaling_factor"] = scale.view(1)
    found["transformer.vocab_embedding.weight"] = ours["model.embed_tokens.weight"]
    found["transformer.ln_f.weight"] = ours["model.norm.weight"]
    found["lm_head.weight"] = ours["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return found


def rank0(folder: Path) -> dict[str, Any]:
    assert [file.name for file in folder.glob("*.safetensors")] == ["rank0.safetensors"]
    return tensors_of(folder)
