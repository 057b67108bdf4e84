"""TensorRT-LLM checkpoints in another dtype than the model's: torch's casts are the reference.

A T4 has no bfloat16, and no engine computes in float32.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.backends.trtllm_folders import Folders, changed, rank, refused, same_numbers, written
from tests.quantizers.unified_folder import tensors_of
from toolchain.backends.tensorrt_llm import CODES, TensorRtLlmCheckpoint
from toolchain.errors import ArtifactError

KEPT = ("norm.weight", "ln_f.weight", "lm_head.weight", "vocab_embedding.weight", ".bias", ".prequant_scaling_factor")


def cast(folder: Path, out: Path, dtype: torch.dtype) -> Path:
    """The folder with torch's cast of all that has no scale of its own."""
    scaled = {name.removesuffix("_scale") for name in tensors_of(folder) if name.endswith(".weight_scale")}

    def change(name: str, one: torch.Tensor) -> torch.Tensor:
        kept = name.endswith((".weight", ".bias", ".pre_quant_scale")) and name not in scaled
        return one.to(dtype) if kept else one

    return changed(folder, out, change)


@pytest.mark.parametrize("model", ["biased-bf16", "biased-fp32"])
@pytest.mark.parametrize("way", ["none", "fp8", "awq", "int8", "int8-sq", "w4a8"])
def test_what_is_not_quantized_is_cast_to_the_dtype_of_the_engine(
    unified: Folders, tmp_path: Path, model: str, way: str
) -> None:
    folder = unified(model, way)
    out = written(folder, tmp_path / "out", tp=2, dtype="float16", int8_form=CODES)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    same_numbers(out, cast(folder, tmp_path / "cast", torch.float16))
    for number in (0, 1):
        found = rank(out, number)
        for name, one in found.items():
            if name.endswith(KEPT) or way == "none":
                assert one.dtype == torch.float16, name
            elif name.endswith("_factor") or "_factor_" in name:
                assert one.dtype == torch.float32, name
        assert ("transformer.layers.0.attention.dense.prequant_scaling_factor" in found) == (
            way in ("awq", "int8-sq", "w4a8")
        )


def test_codes_and_scales_are_the_same_bytes_whatever_the_dtype(unified: Folders, tmp_path: Path) -> None:
    folder = unified("biased-bf16", "awq")
    found = [rank(written(folder, tmp_path / dtype, dtype=dtype), 0) for dtype in ("float16", "bfloat16")]
    quantized = [name for name in found[0] if name.endswith((".weights_scaling_factor", "proj.weight", "qkv.weight"))]
    assert len(quantized) == 2 * 7
    for name in quantized:
        assert torch.equal(found[0][name], found[1][name]), name


def test_int8_weights_are_restored_in_the_dtype_of_the_engine(unified: Folders, tmp_path: Path) -> None:
    """But for the largest of each row, which stands for its scale."""
    folder = unified("biased-bf16", "int8")
    found = dict(TensorRtLlmCheckpoint.open(written(folder, tmp_path / "out", tp=2, dtype="float16")).dense())
    stored, name = tensors_of(folder), "model.layers.1.mlp.up_proj.weight"
    exact = (stored[name].float() * stored[f"{name}_scale"].half().float()[:, None]).half().float().numpy()
    different = found[name] != exact
    assert (different.sum(axis=1) == 1).all()
    assert (np.abs(stored[name].numpy().astype(int))[different] == 127).all()
    np.testing.assert_allclose(found[name][different] / exact[different], 128 / 127, rtol=2**-9)


def test_float32_becomes_bfloat16_where_that_is_asked_for(unified: Folders, tmp_path: Path) -> None:
    folder = unified("biased-fp32", "none")
    out = written(folder, tmp_path / "out", pp=2, dtype="bfloat16")
    same_numbers(out, cast(folder, tmp_path / "cast", torch.bfloat16))


def test_float32_is_no_dtype_of_an_engine(unified: Folders, tmp_path: Path) -> None:
    error = refused(unified("biased-fp32", "none"), tmp_path / "out")
    assert "its dtype is float32" in error.message
    assert "float16" in error.hint


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.embed_tokens.weight", 70 * 256),
        ("model.layers.1.input_layernorm.weight", 200),
        ("model.layers.0.mlp.down_proj.weight", 255 * 512 + 511),
        ("model.layers.0.self_attn.k_proj.bias", 100),
    ],
)
def test_a_number_beyond_float16_is_refused_by_the_name_of_its_tensor(
    unified: Folders, tmp_path: Path, name: str, place: int
) -> None:
    def enlarge(other: str, one: torch.Tensor) -> torch.Tensor:
        if other == name:
            one = one.clone()
            one.view(-1)[place] = -131072.0
            one.view(-1)[0] = 65504.0  # bfloat16 makes 65536 of it, which is too large as well
        return one

    folder = changed(unified("biased-bf16", "none"), tmp_path / "changed", enlarge)
    with pytest.raises(ArtifactError, match=f"{name} goes up to 131072, and float16 ends at 65504") as caught:
        written(folder, tmp_path / "out", tp=2, dtype="float16")
    assert "bfloat16" in caught.value.hint
    assert not (tmp_path / "out" / "config.json").exists()
    written(folder, tmp_path / "as it is")


def test_the_largest_float16_is_not_refused(unified: Folders, tmp_path: Path) -> None:
    def enlarge(name: str, one: torch.Tensor) -> torch.Tensor:
        return one.fill_(65504.0) if name == "model.norm.weight" else one

    folder = changed(unified("biased-fp32", "none"), tmp_path / "changed", enlarge)
    found = rank(written(folder, tmp_path / "out", dtype="float16"), 0)["transformer.ln_f.weight"]
    assert torch.equal(found, torch.full_like(found, 65504.0))


def test_what_is_no_number_is_refused_where_it_would_be_cast(unified: Folders, tmp_path: Path) -> None:
    def damage(name: str, one: torch.Tensor) -> torch.Tensor:
        return one.fill_(float("nan")) if name == "model.norm.weight" else one

    folder = changed(unified("biased-bf16", "none"), tmp_path / "changed", damage)
    with pytest.raises(ArtifactError, match=r"model\.norm\.weight goes up to nan"):
        written(folder, tmp_path / "out", dtype="float16")
