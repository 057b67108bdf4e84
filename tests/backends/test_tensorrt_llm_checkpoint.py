"""TensorRT-LLM checkpoints: the same numbers as the unified folder that they are made from, on any number of ranks.

What a folder stands for is read by ``tests.quantizers.unified_folder``, which shares no code with the toolchain; the
slices, names and shapes of ranks are said again here, from the format's description. ``tests/oracle`` compares the
files with ModelOpt's own export.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.backends.trtllm_folders import (
    MODELS,
    SPLITS,
    WAYS,
    Folders,
    changed,
    equal_scales,
    quantization,
    rank,
    refused,
    same_numbers,
    written,
)
from tests.quantizers.unified_folder import logits_of, model_of, tensors_of
from toolchain.backends.tensorrt_llm import CODES, TensorRtLlmCheckpoint, write
from toolchain.backends.tensorrt_llm.numbers import narrow, unpack_int4
from toolchain.checkpoint import Checkpoint
from toolchain.errors import ArtifactError, PlanError

EVERY_WAY = [("gqa", way) for way in WAYS] + [
    (model, way) for model in ("mha", "tied", "biased", "qwen2") for way in ("none", "fp8", "int4", "int8")
]


ROUND_TRIPS = [(model, way) for model in ("mha", "gqa") for way in ("none", "fp8", "int4", "awq", "int8", "int8-sq")]
ROUND_TRIPS += [("tied", "int4"), ("biased", "fp8")]


@pytest.mark.parametrize(("tp", "pp"), SPLITS)
@pytest.mark.parametrize(("model", "way"), EVERY_WAY)
def test_all_ranks_together_are_the_unified_folder(
    unified: Folders, tmp_path: Path, model: str, way: str, tp: int, pp: int
) -> None:
    folder = unified(model, way)
    if way == "w4a8" and tp == 4:
        with pytest.raises(PlanError, match="needs multiples of 128 and 512"):
            written(folder, tmp_path / "out", tp=tp, pp=pp)
        return
    same_numbers(written(folder, tmp_path / "out", tp=tp, pp=pp, int8_form=CODES), folder)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)])
@pytest.mark.parametrize(("model", "way"), ROUND_TRIPS)
def test_logits_of_what_is_read_back_are_those_of_the_quantized_folder(
    unified: Folders, tmp_path: Path, model: str, way: str, tp: int, pp: int
) -> None:
    """Through transformers, which knows nothing of either layout: every rank and stage has its part in them."""
    folder = unified(model, way)
    ids = torch.arange(40).view(2, 20) * 7 % 320
    kv = {"fp8": "fp8", "awq": "int8"}.get(way, "fp16")
    read = TensorRtLlmCheckpoint.open(written(folder, tmp_path / "out", tp=tp, pp=pp, kv=kv, int8_form=CODES))
    reference = model_of(folder)
    expected = logits_of(reference, ids)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.zero_()
    reference.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in read.dense()})
    assert expected.abs().max() > 0.01
    assert torch.equal(logits_of(reference, ids), expected)


@pytest.mark.parametrize(("model", "way"), EVERY_WAY)
def test_two_ranks_have_the_halves_of_one(unified: Folders, tmp_path: Path, model: str, way: str) -> None:
    """Heads of q, k and v are split before they are joined; one key and value head is on both ranks."""
    folder = unified(model, way)
    whole = rank(written(folder, tmp_path / "one", kv="fp8" if way == "fp8" else "fp16", int8_form=CODES), 0)
    out = written(folder, tmp_path / "two", tp=2, kv="fp8" if way == "fp8" else "fp16", int8_form=CODES)
    kv_heads = MODELS[model].get("num_key_value_heads", 2)
    for number in (0, 1):
        found = rank(out, number)
        assert sorted(found) == sorted(whole)
        for name, tensor in whole.items():
            expected = half(name, tensor, number, kv_heads)
            assert found[name].dtype == tensor.dtype, name
            assert torch.equal(bits(found[name]), bits(expected)), name


def half(name: str, tensor: torch.Tensor, number: int, kv_heads: int) -> torch.Tensor:
    """What one of two ranks has of a tensor of the only rank."""
    kind = name.rpartition(".")[2]
    if tensor.numel() == 1 or "layernorm" in name or "ln_f" in name or "vocab_embedding" in name:
        return tensor
    if name == "lm_head.weight":
        rows = -(-len(tensor) // 2)
        padded = torch.cat([tensor, tensor.new_zeros(2 * rows - len(tensor), tensor.shape[1])])
        return padded[number * rows : (number + 1) * rows]
    row_parallel = "dense" in name or "mlp.proj" in name
    if row_parallel:
        if kind == "bias" or (kind == "weights_scaling_factor" and tensor.ndim == 1):
            return tensor
        return tensor.chunk(2, dim=tensor.ndim - 1)[number]
    if kind == "prequant_scaling_factor":
        return tensor
    if "qkv" not in name:
        return tensor.chunk(2)[number]
    one = len(tensor) // (4 + 2 * kv_heads)
    data = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor  # torch joins no fp8
    q, k, v = data.split([4 * one, kv_heads * one, kv_heads * one])
    mine = [q.chunk(2)[number], *((k, v) if kv_heads == 1 else (k.chunk(2)[number], v.chunk(2)[number]))]
    return torch.cat(mine).view(tensor.dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_key_and_value_heads_are_repeated_over_more_ranks(unified: Folders, tmp_path: Path) -> None:
    """Two heads on four ranks: the first on ranks 0 and 1, the second on 2 and 3."""
    folder = unified("gqa", "none")
    out, stored = written(folder, tmp_path / "out", tp=4), tensors_of(folder)
    for number in range(4):
        qkv = rank(out, number)["transformer.layers.1.attention.qkv.weight"]
        for place, (linear, head) in enumerate((("q", number), ("k", number // 2), ("v", number // 2))):
            whole = stored[f"model.layers.1.self_attn.{linear}_proj.weight"]
            assert torch.equal(qkv[place * 64 : (place + 1) * 64], whole[head * 64 : (head + 1) * 64])


def test_pipeline_stages_number_their_layers_from_zero_and_only_the_ends_have_the_vocabulary(
    unified: Folders, tmp_path: Path
) -> None:
    folder = unified("mha", "none")
    out, stored = written(folder, tmp_path / "out", tp=2, pp=2), tensors_of(folder)
    for number in range(4):
        found, stage = rank(out, number), number // 2
        assert {name.split(".")[2] for name in found if ".layers." in name} == {"0"}
        norm = stored[f"model.layers.{stage}.post_attention_layernorm.weight"]
        assert torch.equal(found["transformer.layers.0.post_layernorm.weight"], norm)
        assert ("transformer.vocab_embedding.weight" in found) == (stage == 0)
        assert ("transformer.ln_f.weight" in found) == ("lm_head.weight" in found) == (stage == 1)


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_has_the_tensors_that_the_loader_asks_for(unified: Folders, tmp_path: Path, way: str) -> None:
    """Names, dtypes and shapes of one layer on one of two ranks, from the description of the format."""
    kv = {"fp8": "fp8", "awq": "int8"}.get(way, "fp16")
    out = written(unified("gqa", way), tmp_path / "out", tp=2, kv=kv)
    prefix = "transformer.layers.1."
    found = {name[len(prefix) :]: one for name, one in rank(out, 0).items() if name.startswith(prefix)}
    sixteen = torch.bfloat16
    expected: dict[str, Any] = {f"{norm}.weight": (sixteen, (256,)) for norm in ("input_layernorm", "post_layernorm")}
    sizes = {"attention.qkv": (256, 256), "attention.dense": (256, 128), "mlp.proj": (256, 256)}
    for module, (rows, columns) in (sizes | {"mlp.fc": (256, 256), "mlp.gate": (256, 256)}).items():
        group = 128 if way == "w4a8" else 64
        weight = {
            "fp8": (torch.float8_e4m3fn, (rows, columns)),
            "int8-sq": (torch.int8, (rows, columns)),
        } | dict.fromkeys(("int4", "awq", "w4a8"), (torch.int8, (rows // 2, columns)))
        scale = {"fp8": (1,), "int8-sq": (rows,)} | dict.fromkeys(("int4", "awq", "w4a8"), (rows, columns // group))
        expected[f"{module}.weight"] = weight.get(way, (sixteen, (rows, columns)))
        if way in scale:
            expected[f"{module}.weights_scaling_factor"] = (torch.float32, scale[way])
        if way in ("fp8", "int8-sq", "w4a8"):
            expected[f"{module}.activation_scaling_factor"] = (torch.float32, (1,))
        if way == "w4a8":
            expected[f"{module}.weights_scaling_factor_2"] = (torch.float32, (1,))
        if way in ("awq", "int8-sq", "w4a8"):
            expected[f"{module}.prequant_scaling_factor"] = (sixteen, (columns,))
    if kv != "fp16":
        expected["attention.kv_cache_scaling_factor"] = (torch.float32, (1,))
    assert {name: (one.dtype, tuple(one.shape)) for name, one in found.items()} == expected


def test_fc_is_the_matrix_before_the_activation(unified: Folders, tmp_path: Path) -> None:
    folder = unified("mha", "none")
    found, stored = rank(written(folder, tmp_path / "out"), 0), tensors_of(folder)
    for new, old in (("fc", "gate"), ("gate", "up"), ("proj", "down")):
        matrix = stored[f"model.layers.0.mlp.{old}_proj.weight"]
        assert torch.equal(found[f"transformer.layers.0.mlp.{new}.weight"], matrix)


def test_int4_keeps_its_bytes_two_rows_in_one_the_even_one_low(unified: Folders, tmp_path: Path) -> None:
    folder = unified("mha", "int4")
    found, stored = rank(written(folder, tmp_path / "out"), 0), tensors_of(folder)
    parts = [stored[f"model.layers.0.self_attn.{one}_proj.weight"] for one in "qkv"]
    assert torch.equal(found["transformer.layers.0.attention.qkv.weight"].view(torch.uint8), torch.cat(parts))


def test_four_rows_of_int4_are_the_bytes_that_the_loader_unpacks(unified: Folders, tmp_path: Path) -> None:
    """Rows [1, -2], [3, -4], [5, -6], [7, -8] are the bytes [49, -50], [117, -118] of a rank's file, and back."""
    rows = torch.tensor([[1, -2], [3, -4], [5, -6], [7, -8]], dtype=torch.int8)

    def plant(name: str, one: torch.Tensor) -> torch.Tensor:
        if name == "model.layers.1.self_attn.o_proj.weight":
            one = one.clone()
            one[:2, :2] = (rows[0::2] & 15 | (rows[1::2] & 15) << 4).view(torch.uint8)
        return torch.ones_like(one) if name == "model.layers.1.self_attn.o_proj.weight_scale" else one

    out = written(changed(unified("mha", "int4"), tmp_path / "planted", plant), tmp_path / "out", tp=2)
    dense = "transformer.layers.1.attention.dense"
    assert rank(out, 0)[f"{dense}.weight"][:2, :2].tolist() == [[49, -50], [117, -118]]
    read = dict(TensorRtLlmCheckpoint.open(out).dense())["model.layers.1.self_attn.o_proj.weight"]
    assert read[:4, :2].tolist() == rows.tolist()
    assert unpack_int4(np.array([[0x31, 0xCE], [0x75, 0x8A]], np.uint8)).tolist() == rows.tolist()


def test_awq_has_ones_where_the_norm_has_the_scales(unified: Folders, tmp_path: Path) -> None:
    folder = unified("gqa", "awq")
    out, stored = written(folder, tmp_path / "out"), tensors_of(folder)
    found = rank(out, 0)
    for module in ("attention.qkv", "mlp.fc", "mlp.gate"):
        assert torch.equal(
            found[f"transformer.layers.0.{module}.prequant_scaling_factor"], torch.ones(256, dtype=torch.bfloat16)
        )
    dense = found["transformer.layers.0.attention.dense.prequant_scaling_factor"]
    assert torch.equal(dense, stored["model.layers.0.self_attn.o_proj.pre_quant_scale"])
    assert quantization(out) == {
        "quant_algo": "W4A16_AWQ",
        "kv_cache_quant_algo": None,
        "group_size": 64,
        "has_zero_point": False,
        "pre_quant_scale": True,
    }


def test_plain_int4_says_that_it_has_no_pre_quant_scale(unified: Folders, tmp_path: Path) -> None:
    out = written(unified("mha", "int4"), tmp_path / "out")
    assert quantization(out)["pre_quant_scale"] is False
    assert not any("prequant" in name for name in rank(out, 0))


@pytest.mark.parametrize("way", WAYS)
def test_quantization_has_only_the_keys_that_every_release_reads(unified: Folders, tmp_path: Path, way: str) -> None:
    found = quantization(written(unified("gqa", way), tmp_path / "out"))
    grouped = ("group_size", "has_zero_point", "pre_quant_scale") if way in ("int4", "awq", "w4a8") else ()
    assert tuple(found) == ("quant_algo", "kv_cache_quant_algo", *grouped)


def test_int8_cache_scales_are_the_larger_range_through_127(unified: Folders, tmp_path: Path) -> None:
    folder = unified("gqa", "awq")
    out = written(folder, tmp_path / "out", kv="int8", pp=2)
    layers = json.loads((folder / "scalellm_kv_cache.json").read_text())["layers"]
    expected = [float(np.float32(max(one["k_amax"], one["v_amax"])) / np.float32(127)) for one in layers]
    assert TensorRtLlmCheckpoint.open(out).kv_scales() == expected
    assert quantization(out)["kv_cache_quant_algo"] == "INT8"


@pytest.mark.parametrize("scales", ["shared", "separate"])
def test_fp8_cache_scales_are_never_below_one(unified: Folders, tmp_path: Path, scales: str) -> None:
    """ModelOpt's unified export has them below; its TensorRT-LLM export has not."""
    folder = unified("mha", "fp8", fp8_scales=scales)
    found = TensorRtLlmCheckpoint.open(written(equal_scales(folder, tmp_path / "equal"), tmp_path / "out", kv="fp8"))
    assert found.kv_scales() == [1.0, 1.0]
    stored = float(tensors_of(folder)["model.layers.0.self_attn.k_proj.k_scale"])
    assert (stored < 1) == (scales == "separate")


def test_fp8_cache_scales_come_from_the_ranges_where_the_folder_has_none(unified: Folders, tmp_path: Path) -> None:
    """No range of a sound model is beyond 448; these are made so."""
    folder = changed(unified("mha", "int8"), tmp_path / "changed", lambda _name, one: one)
    ranges = [{"k_amax": 896.0, "v_amax": 3.0}, {"k_amax": 5.0, "v_amax": 447.0}]
    (folder / "scalellm_kv_cache.json").write_text(json.dumps({"layers": ranges}))
    found = TensorRtLlmCheckpoint.open(written(folder, tmp_path / "out", kv="fp8")).kv_scales()
    assert found == [2.0, 1.0]


@pytest.mark.parametrize(("model", "dtype"), [("qwen2", "float16"), ("gqa", "bfloat16"), ("biased-bf16", "float16")])
def test_int8_weights_are_stored_as_16_bit_numbers_of_which_the_builder_makes_the_same_codes(
    unified: Folders, tmp_path: Path, model: str, dtype: str
) -> None:
    """``trtllm-build`` in numpy, from its source: amax/128 of each row in float32, nearest, clipped to -128..127."""
    folder = unified(model, "int8")
    out = written(folder, tmp_path / "out", dtype=dtype)
    assert quantization(out)["quant_algo"] == "W8A16"
    read, stored = dict(TensorRtLlmCheckpoint.open(out).dense()), tensors_of(folder)
    names = [name for name in stored if "proj.weight" in name and not name.endswith("_scale")]
    assert len(names) == 2 * 7
    negative = 0
    for name in names:
        codes, scales = rebuilt(read[name])
        expected = stored[name].numpy().astype(np.float32)
        only = (expected.max(axis=1) < 127) & (expected.min(axis=1) == -127)
        negative += only.sum()
        expected[only, expected[only].argmin(axis=1)] = -128
        assert np.array_equal(codes, expected), name
        step = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
        np.testing.assert_allclose(scales, stored[f"{name}_scale"].numpy(), rtol=step, err_msg=name)
    assert negative


def rebuilt(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales that ``symmetric_quantize`` of cutlass_preprocessors.cpp makes of a matrix [out, in]."""
    scales = (np.abs(weight).max(axis=1) * np.float32(1 / 128)).astype(np.float32)
    scaled = (weight / scales[:, None]).astype(np.float32)
    rounded = np.sign(scaled) * np.floor(np.abs(scaled) + np.float32(0.5))  # C's round: halves away from zero
    return rounded.clip(-128, 127), scales


def test_int8_weights_that_are_cut_along_their_inputs_are_rounded_anew_on_each_rank(
    unified: Folders, tmp_path: Path
) -> None:
    """By half a step at most, the largest of a part of a row by a whole one; rows that have a 127 keep their codes."""
    folder = unified("mha", "int8")
    out, stored = written(folder, tmp_path / "out", tp=2), tensors_of(folder)
    name = "model.layers.0.mlp.down_proj.weight"
    scale = stored[f"{name}_scale"].numpy()[:, None]
    for number in (0, 1):
        weight = rank(out, number)["transformer.layers.0.mlp.proj.weight"].float().numpy()
        codes, scales = rebuilt(weight)
        mine = stored[name].chunk(2, dim=1)[number].numpy().astype(np.float32)
        errors = np.abs(codes * scales[:, None] / scale - mine)
        largest = np.abs(mine) == np.abs(mine).max(axis=1, keepdims=True)
        whole = (np.abs(mine) == 127).any(axis=1)
        assert 0 < whole.sum() < len(whole)
        assert errors[~whole][~largest[~whole]].max() < 0.55
        assert errors.max() < 1.07
        assert errors[whole][~largest[whole]].max() < 0.07


def test_numbers_are_narrowed_as_torch_does() -> None:
    numbers = torch.randn(4096, generator=torch.Generator().manual_seed(3)) * 37
    numbers[:4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 0.0, -65504.0])
    for dtype, kind in (("F16", torch.float16), ("BF16", torch.bfloat16)):
        expected = numbers.to(kind).view(torch.uint8).numpy()
        assert np.array_equal(narrow(numbers.numpy(), dtype), expected)


def test_vocabulary_is_padded_with_zeros_in_the_head_alone(unified: Folders, tmp_path: Path) -> None:
    """323 rows on 4 ranks are 81 each; config.json keeps 323. A tied head is the embedding again."""
    folder = unified("tied", "none")
    out, stored = written(folder, tmp_path / "out", tp=4), tensors_of(folder)["model.embed_tokens.weight"]
    heads = [rank(out, number)["lm_head.weight"] for number in range(4)]
    assert [len(head) for head in heads] == [81] * 4
    assert torch.equal(torch.cat(heads)[:323], stored)
    assert not torch.cat(heads)[323:].any()
    for number in range(4):
        assert torch.equal(rank(out, number)["transformer.vocab_embedding.weight"], stored)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 323


def test_config_of_a_llama_with_llama3_rope(random_llama: Callable[..., Path], tmp_path: Path) -> None:
    numbers = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    folder = random_llama(rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **numbers})
    found = json.loads((written(folder, tmp_path / "out", tp=2) / "config.json").read_text())
    assert found.pop("producer")["name"] == "scalellm"
    assert found == {
        "architecture": "LlamaForCausalLM",
        "dtype": "float16",
        "logits_dtype": "float32",
        "vocab_size": 320,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_size": 64,
        "hidden_act": "silu",
        "norm_epsilon": 1e-06,
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": 512,
        "rotary_base": 500000.0,
        "rotary_scaling": {"type": "llama3", "rope_type": "llama3", **numbers},
        "attn_bias": False,
        "mlp_bias": False,
        "residual_mlp": False,
        "disable_weight_only_quant_plugin": False,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
    }


def test_config_of_a_qwen2_says_which_qwen_and_that_it_has_biases(unified: Folders, tmp_path: Path) -> None:
    found = json.loads((written(unified("qwen2", "none"), tmp_path / "out") / "config.json").read_text())
    assert (found["architecture"], found["qwen_type"], found["attn_bias"]) == ("Qwen2ForCausalLM", "qwen2", True)
    assert "residual_mlp" not in found


def test_digests_are_those_of_the_files_and_the_tokenizer_comes_along(unified: Folders, tmp_path: Path) -> None:
    folder, out = unified("gqa", "int4"), tmp_path / "out"
    hashes = write(Checkpoint.open(folder), out, tp=2, pp=2)
    assert sorted(hashes) == [f"rank{number}.safetensors" for number in range(4)]
    for name, digest in hashes.items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_separate_fp8_scales_are_refused_and_shared_ones_named(unified: Folders, tmp_path: Path) -> None:
    error = refused(unified("mha", "fp8", fp8_scales="separate"), tmp_path / "out")
    assert "model.layers.0.self_attn.q_proj" in error.message
    assert "different weight_scales" in error.message
    assert "fp8_scales: shared" in error.hint


def test_separate_fp8_scales_that_are_equal_are_taken(unified: Folders, tmp_path: Path) -> None:
    folder = equal_scales(unified("mha", "fp8", fp8_scales="separate"), tmp_path / "equal")
    same_numbers(written(folder, tmp_path / "out", tp=2), folder)


def test_fp8_without_observed_inputs_is_refused(unified: Folders, tmp_path: Path) -> None:
    error = refused(unified("mha", "fp8", samples=None), tmp_path / "out")
    assert "q_proj.input_scale" in error.message
    assert "calibration:" in error.hint


def test_different_pre_quant_scales_of_q_k_and_v_are_refused(unified: Folders, tmp_path: Path) -> None:
    def double(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * 2 if name == "model.layers.1.self_attn.k_proj.pre_quant_scale" else tensor

    error = refused(changed(unified("gqa", "int8-sq"), tmp_path / "changed", double), tmp_path / "out")
    assert "model.layers.1.self_attn.k_proj" in error.message
    assert "different pre_quant_scales" in error.message


def test_an_int8_cache_without_ranges_is_refused(unified: Folders, tmp_path: Path) -> None:
    error = refused(unified("mha", "none"), tmp_path / "out", kv="int8")
    assert "not calibrated" in error.message


def test_an_fp8_cache_without_scales_is_refused(unified: Folders, tmp_path: Path) -> None:
    assert (
        "k_proj.k_scale is not in this checkpoint"
        in refused(unified("mha", "none"), tmp_path / "out", kv="fp8").message
    )


def test_all_that_does_not_divide_is_said_at_once(unified: Folders, tmp_path: Path) -> None:
    message = refused(unified("gqa", "none"), tmp_path / "out", tp=3, pp=3).message
    for part in ("2 layers do not divide by pp 3", "4 attention heads", "neither of 2 key", "intermediate_size 512"):
        assert part in message


def test_groups_that_have_no_kernel_or_do_not_fit_the_ranks_are_refused(
    unified: Folders, random_llama: Callable[..., Path], tmp_path: Path
) -> None:
    error = refused(unified("mha", "int4", group_size=32), tmp_path / "out")
    assert "groups are of 32" in error.message
    error = refused(unified("mha", "int4", group_size=128), tmp_path / "out", tp=4)
    assert "attention.dense is 64 by 256 on each of 4 ranks" in error.message
    assert "smaller tp" in error.hint


def test_a_missing_or_damaged_rank_is_named(unified: Folders, tmp_path: Path) -> None:
    out = written(unified("mha", "none"), tmp_path / "out", tp=2)
    file = out / "rank1.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match=r"rank1\.safetensors: truncated"):
        TensorRtLlmCheckpoint.open(out)
    file.unlink()
    with pytest.raises(ArtifactError, match=r"rank1\.safetensors: no such file"):
        TensorRtLlmCheckpoint.open(out)


def test_a_full_disk_leaves_no_config_json(unified: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``config.json`` is written last, so that half of a checkpoint is none."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        written(unified("mha", "none"), tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
