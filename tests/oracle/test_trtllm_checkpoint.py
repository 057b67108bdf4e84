"""Our TensorRT-LLM checkpoints beside those that NVIDIA ModelOpt 0.47.0 exports, on one rank, of the same models.

FP8 with scales shared by what is fused, weight-only INT8 with an INT8 cache: the same bytes. Three things differ, on
purpose: ModelOpt writes ``k_cache_scaling_factor`` and ``v_cache_scaling_factor`` as well, which releases up to 0.17 do
not know and later ones merge into the one that we write; W8A16 is compared in ModelOpt's own form, which is not our
default, since no loader of TensorRT-LLM takes it; and ``config.json``, see below. `make test-oracle` runs these tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

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


@pytest.mark.parametrize("way", ["fp8", "int8-wo-kv8"])
def test_rank0_has_the_same_bytes(theirs: Path, ours: Ours, tmp_path: Path, way: str) -> None:
    words, choices = WAYS[way]
    found = rank0(export(ours(**words), tmp_path / "out", **choices))
    expected = rank0(theirs / f"{way}-trt")
    apart = {name for name in expected if name.endswith((".k_cache_scaling_factor", ".v_cache_scaling_factor"))}
    assert len(apart) == 2 * 3
    assert set(expected) - apart == set(found)
    assert differing(found, {name: expected[name] for name in found}) == {}


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
