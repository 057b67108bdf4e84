"""Our TensorRT-LLM checkpoints beside those that NVIDIA ModelOpt 0.47.0 exports, by rank, of the same models.

The same bytes: FP8 with scales shared by what is fused, on one rank, on two and in three pipeline stages; weight-only
INT8 with an INT8 cache; INT4 AWQ with an INT8 cache, on one rank and on two, written from ModelOpt's unified export.

What differs, on purpose. ModelOpt writes ``k_cache_scaling_factor`` and ``v_cache_scaling_factor`` as well, which
releases up to 0.17 do not know and later ones merge into the one that we write. It cuts the embedding by rows on two
ranks (``use_parallel_embedding``), where ours is whole on each, the format's default. W8A16 is compared in ModelOpt's
own form, which is not our default, since no loader of TensorRT-LLM takes it. AWQ's folded scales: see the test.
``config.json``: see below. `make test-oracle` runs these tests.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.oracle.conftest import as_bytes, differing
from tests.oracle.test_same_bits import as_tensorrt_llm, rank0
from tests.quantizers.unified_folder import dense_of
from toolchain.backends.tensorrt_llm import CODES, TensorRtLlmCheckpoint, write
from toolchain.checkpoint import Checkpoint

Ours = Callable[..., Path]
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fp8": ({"weights": "fp8", "fp8_scales": "shared", "kv": "fp8"}, {"kv": "fp8"}),
    "int8-wo-kv8": ({"weights": "int8", "kv": "int8"}, {"kv": "int8", "int8_form": CODES}),
    "int8-sq": ({"weights": "int8_sq"}, {}),
}
"""ModelOpt's way -> how we quantize, and how we export."""
OWN_SCALES = ("fc", "gate")
"""SmoothQuant: in its TensorRT-LLM export ModelOpt leaves these two their own channel scales, in its unified one, which
we follow, they share their mean. One for each is as legal: they are two matrices."""
ONLY_THEIRS = {
    "decoder",  # informative
    "rank",
    "rmsnorm",
    "bias",  # ours: attn_bias and mlp_bias
    "lm_head_bias",
    "rotary_pct",  # 1.0 is the default
    "share_embedding_table",  # false; the key was dropped in 0.16
}
ONLY_OURS = {
    "attn_bias",
    "mlp_bias",
    "disable_weight_only_quant_plugin",
    "rotary_scaling",  # null where there is none
}
CHOSEN = {
    "producer": None,
    "logits_dtype": ("float32", "float16"),  # ours: the format's default
    "use_parallel_embedding": (False, True),  # the same bytes on one rank; ours is the format's default
}


def export(folder: Path, out: Path, **choices: Any) -> Path:
    write(Checkpoint.open(folder), out, **choices)
    return out


SPLIT_CACHE = (".k_cache_scaling_factor", ".v_cache_scaling_factor")
EMBEDDING = "transformer.vocab_embedding.weight"


@pytest.mark.parametrize("way", ["fp8", "int8-wo-kv8"])
def test_rank0_has_the_same_bytes(theirs: Path, ours: Ours, tmp_path: Path, way: str) -> None:
    words, choices = WAYS[way]
    found = rank0(export(ours(**words), tmp_path / "out", **choices))
    expected = rank0(theirs / f"{way}-trt")
    apart = {name for name in expected if name.endswith(SPLIT_CACHE)}
    assert len(apart) == 2 * 3
    assert set(expected) - apart == set(found)
    assert differing(found, {name: expected[name] for name in found}) == {}


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 3)])
def test_fp8_has_the_same_bytes_on_every_rank(theirs: Path, ours: Ours, tmp_path: Path, tp: int, pp: int) -> None:
    words, choices = WAYS["fp8"]
    out = export(ours(**words), tmp_path / "out", tp=tp, pp=pp, **choices)
    same_ranks(out, theirs / f"fp8-trt-{tp}-{pp}", set())


def same_ranks(out: Path, exported: Path, different: set[str]) -> None:
    """The same bytes in every rank's file, but for the tensors of a layer that are named, and what ModelOpt splits."""
    mapping = json.loads((exported / "config.json").read_text())["mapping"]
    assert json.loads((out / "config.json").read_text())["mapping"].items() <= mapping.items()
    files = sorted(file.name for file in exported.glob("*.safetensors"))
    assert sorted(file.name for file in out.glob("*.safetensors")) == files
    embeddings = []
    for file in files:
        found, expected = load_file(out / file), load_file(exported / file)
        expected = {name: one for name, one in expected.items() if not name.endswith(SPLIT_CACHE)}
        if EMBEDDING in expected:
            embeddings.append((found.pop(EMBEDDING), expected.pop(EMBEDDING)))
        assert set(found) == set(expected)
        layers = {name.split(".")[2] for name in found if ".layers." in name}
        assert set(differing(found, expected)) == {f"transformer.layers.{i}.{one}" for i in layers for one in different}
    whole = torch.cat([one for _, one in embeddings])
    assert all(torch.equal(found, whole) for found, _ in embeddings)


@pytest.mark.parametrize("tp", [1, 2])
def test_awq_with_an_int8_cache_has_the_same_bytes_where_modelopts_two_layouts_agree(
    theirs: Path, tmp_path: Path, tp: int
) -> None:
    """From ModelOpt's unified export and ranges.

    That layout has folded the channel scales of q, k, v and of gate, up into the norms, so ours are ones. There gate
    and up share theirs, while ModelOpt's TensorRT-LLM export leaves them their own, and other codes with them: the same
    matrices, rounded about as well.
    """
    folder = with_ranges(theirs / "awq-kv8", tmp_path / "unified")
    exported = theirs / ("awq-kv8-trt" if tp == 1 else f"awq-kv8-trt-{tp}-1")
    out = export(folder, tmp_path / "out", tp=tp, kv="int8")
    own = {f"mlp.{one}.{kind}" for one in OWN_SCALES for kind in ("weight", "weights_scaling_factor")}
    scaled = {f"{one}.prequant_scaling_factor" for one in ("attention.qkv", "mlp.fc", "mlp.gate")}
    same_ranks(out, exported, own | scaled | {"input_layernorm.weight", "post_layernorm.weight"})
    found, expected = (load_file(one / "rank0.safetensors") for one in (out, exported))
    for layer in range(3):
        norm, scales = f"transformer.layers.{layer}.input_layernorm.weight", expected[qkv_scales(layer)]
        assert torch.equal(found[qkv_scales(layer)], torch.ones_like(scales))
        folded = (expected[norm].float() * scales.float()).to(scales.dtype)
        torch.testing.assert_close(found[norm], folded, rtol=2**-7, atol=0)
    as_good(*(dict(TensorRtLlmCheckpoint.open(one).dense()) for one in (out, exported)), dense_of(theirs / "hf"))


def with_ranges(folder: Path, out: Path) -> Path:
    """A copy with the ranges of K and V that ModelOpt's quantizers saw, in our file for them."""
    shutil.copytree(folder, out)
    ranges = load_file(folder.with_name(f"{folder.name}.ranges.safetensors"))
    layers = [{f"{one}_amax": float(ranges[f"{layer}.{one}"]) for one in "kv"} for layer in range(3)]
    (out / "scalellm_kv_cache.json").write_text(json.dumps({"layers": layers}))
    return out


def qkv_scales(layer: int) -> str:
    return f"transformer.layers.{layer}.attention.qkv.prequant_scaling_factor"


def as_good(found: Any, expected: Any, exact: Any) -> None:
    """gate and up with the norm before them: as far from the unquantized ones, to a tenth."""
    for layer in range(3):
        for linear in ("mlp.gate_proj", "mlp.up_proj"):
            name, norm = (
                f"model.layers.{layer}.{linear}.weight",
                f"model.layers.{layer}.post_attention_layernorm.weight",
            )
            aim = exact[name] * exact[norm]
            errors = [float((torch.from_numpy(one[name] * one[norm]) - aim).norm()) for one in (found, expected)]
            assert errors[0] < 1.1 * errors[1], name


def test_smoothquant_has_the_same_tensors_and_the_same_bytes_but_for_modelopts_roundings(
    theirs: Path, ours: Ours, tmp_path: Path
) -> None:
    """The codes and their scales differ as the unified folders do: see ``test_smoothquant``."""
    words, choices = WAYS["int8-sq"]
    found = rank0(export(ours(**words), tmp_path / "out", **choices))
    expected = rank0(theirs / "int8-sq-trt")
    kinds = [{name: (one.dtype, one.shape) for name, one in tensors.items()} for tensors in (found, expected)]
    assert kinds[0] == kinds[1]
    rounded = (".weights_scaling_factor", ".activation_scaling_factor")
    exact = [name for name in expected if not name.endswith(rounded) and expected[name].dtype != torch.int8]
    assert len(exact) == 3 * (5 + 2) + 3
    different = {name for name in exact if not torch.equal(as_bytes(found[name]), as_bytes(expected[name]))}
    assert different == {
        f"transformer.layers.{layer}.mlp.{one}.prequant_scaling_factor" for layer in range(3) for one in OWN_SCALES
    }


def test_plain_int4_is_modelopts_unified_export_under_tensorrt_llms_names(
    theirs: Path, ours: Ours, tmp_path: Path
) -> None:
    """No TensorRT-LLM export of it is made; the bytes are those of the unified one, the parts of qkv joined."""
    found = rank0(export(ours(weights="int4", method="rtn"), tmp_path / "out"))
    expected = as_tensorrt_llm(theirs / "int4", weight_scale=torch.cat)
    expected = {name: one.view(torch.int8) if one.dtype == torch.uint8 else one for name, one in expected.items()}
    assert differing(found, expected) == {}


@pytest.mark.parametrize("way", WAYS)
def test_config_json_says_the_same_but_for_what_is_listed_above(
    theirs: Path, ours: Ours, tmp_path: Path, way: str
) -> None:
    words, choices = WAYS[way]
    out = export(ours(**words), tmp_path / "out", **choices)
    found, expected = (json.loads((one / "config.json").read_text()) for one in (out, theirs / f"{way}-trt"))
    assert expected["quantization"].pop("exclude_modules") == ["lm_head"]  # ours: the loader's default, which has it
    scaling = found["rotary_scaling"]
    if scaling:
        assert scaling.pop("type") == scaling["rope_type"]
    else:
        assert "rotary_scaling" not in expected
        expected["rotary_scaling"] = None
    assert set(expected) - set(found) == ONLY_THEIRS
    assert set(found) - set(expected) == ONLY_OURS - {"rotary_scaling"}
    both = set(found) & set(expected)
    assert {key for key in both if found[key] != expected[key]} == set(CHOSEN)
    for key, values in CHOSEN.items():
        assert values is None or (found[key], expected[key]) == values


@pytest.mark.parametrize(("export_of", "unified"), [("int8-wo-kv8", "int8-wo"), ("int8-sq", "int8-sq")])
def test_reader_takes_modelopts_export_for_the_model_that_its_unified_export_is(
    theirs: Path, export_of: str, unified: str
) -> None:
    expected = dense_of(theirs / unified)
    expected.setdefault("lm_head.weight", expected["model.embed_tokens.weight"])
    found = dict(TensorRtLlmCheckpoint.open(theirs / f"{export_of}-trt").dense())
    assert sorted(found) == sorted(expected)
    different = [name for name in sorted(found) if not np.array_equal(found[name], expected[name].numpy())]
    own = ("gate_proj.weight", "up_proj.weight") if export_of == "int8-sq" else ()
    assert different == [name for name in sorted(found) if name.endswith(own)]
    exact = dense_of(theirs / "hf")
    for name in different:  # another rounding of the same matrix, about as good
        errors = [float((one - exact[name]).norm()) for one in (torch.from_numpy(found[name]), expected[name])]
        assert errors[0] < 1.1 * errors[1], name
