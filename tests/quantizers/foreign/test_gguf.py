"""GGUF files of llama.cpp's own package become the numbers that it says they hold."""

from __future__ import annotations

import json
import math
import shutil

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from tests.quantizers.foreign.adopted import adopt, assert_same, dequantized, quantization_of, tensors_of
from tests.quantizers.foreign.folders import LINEARS
from tests.quantizers.foreign.gguf_files import write
from toolchain.checkpoint import Checkpoint
from toolchain.errors import ArtifactError, PlanError
from toolchain.quantizers import foreign

PLAIN = {Type.F16: ("F16", torch.float16), Type.BF16: ("BF16", torch.bfloat16), Type.F32: ("F32", torch.float32)}


def matrices(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in found.items() if name.removesuffix(".weight").endswith(LINEARS)}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_q4_0_is_int4_in_groups_of_32_exactly(tmp_path, kv_heads):
    source = write(tmp_path / "m.gguf", Type.Q4_0, kv_heads=kv_heads)
    target = adopt(source.path, tmp_path / "out")
    assert_same(matrices(dequantized(target)), matrices(source.stands_for))
    assert quantization_of(target)["group_size"] == 32
    opened = Checkpoint.open(target)
    assert {info.dtype for name, info in opened.tensors.items() if "norm" in name} == {"F16"}


def test_embeddings_and_head_of_other_types_become_float16(tmp_path):
    source = write(tmp_path / "m.gguf", Type.Q4_0, embeddings=Type.Q8_0, head=Type.Q6_K)
    found = tensors_of(adopt(source.path, tmp_path / "out"))
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(found[name], source.stands_for[name].half())
    notes = foreign.identify(source.path).notes
    assert "token_embd.weight (Q8_0), output.weight (Q6_K) and the norms" in notes[0]


@pytest.mark.parametrize("kind", PLAIN, ids=lambda kind: kind.name)
def test_float_files_become_plain_checkpoints_of_that_dtype(tmp_path, kind):
    name, dtype = PLAIN[kind]
    source = write(tmp_path / "m.gguf", kind, embeddings=kind, head=kind, kv_heads=2)
    target = adopt(source.path, tmp_path / "out")
    assert_same(tensors_of(target), {name: tensor.to(dtype) for name, tensor in source.stands_for.items()})
    assert not (target / "hf_quant_config.json").exists()
    assert {info.dtype for info in Checkpoint.open(target).tensors.values()} == {name}


def test_q8_0_becomes_float16_within_half_a_unit_of_the_11th_bit(tmp_path):
    source = write(tmp_path / "m.gguf", Type.Q8_0)
    found = tensors_of(adopt(source.path, tmp_path / "out"))
    exact = matrices(source.stands_for)
    worst = 0.0
    for name, wide in exact.items():
        assert torch.equal(found[name], wide.half())
        large = wide.abs() > 2**-14
        worst = max(worst, float(((found[name].float() - wide).abs() / wide.abs())[large].max()))
    assert 2**-13 < worst <= 2**-11
    assert "at most 2^-11" in foreign.identify(source.path).notes[0]


def test_tied_embeddings_have_no_head(tmp_path):
    source = write(tmp_path / "m.gguf", Type.Q4_0, tied=True)
    target = adopt(source.path, tmp_path / "out")
    assert "lm_head.weight" not in tensors_of(target)
    assert Checkpoint.open(target).config.tied_embeddings


def test_transformers_own_reader_of_gguf_gives_the_same_model(tmp_path):
    """An independent reading of names, of the order of rows, and of the configuration."""
    source = write(tmp_path / "m.gguf", Type.Q4_0, kv_heads=2)
    read = load_gguf_checkpoint(str(source.path), return_tensors=True, model_to_load=source.model)
    theirs = transformers.LlamaConfig(**read["config"])
    target = adopt(source.path, tmp_path / "out")
    assert_same(matrices(dequantized(target)), matrices(read["tensors"]))
    ours = transformers.AutoConfig.from_pretrained(target)
    keys = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size"
    for key in [*keys.split(), "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"]:
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.rope_parameters["rope_theta"] == theirs.rope_parameters["rope_theta"]
    assert (ours.bos_token_id, ours.eos_token_id) == (0, 1)


def test_the_tokenizer_inside_comes_along(tmp_path):
    source = write(tmp_path / "m.gguf", Type.Q4_0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(adopt(source.path, tmp_path / "out"))
    ids = tokenizer("hello there")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[-8:] == ["he", "ll", "o", "Ġ", "t", "he", "r", "e"]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "hello there"


def test_another_tokenizer_can_be_named(tmp_path, random_llama):
    source = write(tmp_path / "m.gguf", Type.Q4_0)
    other = random_llama()
    target = adopt(source.path, tmp_path / "out", tokenizer=other)
    assert (target / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"has no tokenizer\.json"):
        adopt(source.path, tmp_path / "again", tokenizer=tmp_path / "empty")


def llama3_factors(factor: float, theta: float, size: int) -> np.ndarray:
    """As transformers makes them: the plain frequencies over the scaled ones."""
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
    config = transformers.LlamaConfig(hidden_size=4 * size, num_attention_heads=4, rope_parameters=rope)
    scaled = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq.numpy()
    plain = 1 / theta ** (np.arange(0, size, 2) / size)
    return (plain / scaled).astype(np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3s_rotary_factors_become_its_scaling(tmp_path, factor):
    factors = llama3_factors(factor, 500000.0, 64)
    assert factors.max() == pytest.approx(factor)
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    source = write(tmp_path / "m.gguf", Type.Q4_0, extra={"rope_freqs.weight": factors}, rope=rope)
    scaling = Checkpoint.open(adopt(source.path, tmp_path / "out")).config.rope_scaling
    assert scaling.kind == "llama3"
    assert math.isclose(scaling.factor, factor, rel_tol=1e-5)
    other = write(tmp_path / "o.gguf", Type.Q4_0, extra={"rope_freqs.weight": factors[::-1].copy()}, rope=rope)
    with pytest.raises(PlanError, match="rotary factors"):
        adopt(other.path, tmp_path / "other")


def test_linear_scaling_is_kept_and_yarn_refused(tmp_path):
    keys = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    source = write(tmp_path / "m.gguf", Type.Q4_0, keys=keys)
    scaling = Checkpoint.open(adopt(source.path, tmp_path / "out")).config.rope_scaling
    assert (scaling.kind, scaling.factor) == ("linear", 4.0)
    other = write(tmp_path / "o.gguf", Type.Q4_0, keys={"llama.rope.scaling.type": "yarn"})
    with pytest.raises(PlanError, match="'yarn'"):
        adopt(other.path, tmp_path / "other")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"matrices": Type.Q4_K}, r"Q4_K \(blk\.0\.attn_q\.weight\).*all Q4_0"),
        ({"matrices": Type.Q4_1}, "Q4_1"),
        ({"matrices": {"": Type.Q4_0, "blk.1.ffn_down.weight": Type.Q4_1}}, r"Q4_1 \(blk\.1\.ffn_down\.weight\)"),
        ({"matrices": {"": Type.Q4_0, "blk.1.ffn_down.weight": Type.F16}}, r"F16 \(blk\.1\.ffn_down\.weight\), Q4_0"),
        ({"matrices": Type.F16, "architecture": "qwen2"}, "architecture is 'qwen2'"),
        ({"matrices": Type.F16, "keys": {"llama.expert_count": 8}}, "llama.expert_count = 8"),
        ({"matrices": Type.F16, "keys": {"llama.attention.value_length": 32}}, "different sizes"),
        ({"matrices": Type.F16, "keys": {"split.count": 2}}, "one of 2 parts"),
        ({"matrices": Type.F16, "extra": {"blk.0.attn_q.bias": np.ones(256, np.float32)}}, r"blk\.0\.attn_q\.bias"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:20],
)
def test_other_files_are_refused_by_name(tmp_path, arguments, reason):
    source = write(tmp_path / "m.gguf", **arguments)
    found = foreign.identify(source.path)
    assert found.use == "refused"
    with pytest.raises(PlanError, match=reason):
        adopt(source.path, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_truncated_file_is_named(tmp_path):
    source = write(tmp_path / "m.gguf", Type.Q4_0)
    source.path.write_bytes(source.path.read_bytes()[:-5000])
    with pytest.raises(ArtifactError, match=r"m\.gguf: damaged or cut off"):
        adopt(source.path, tmp_path / "out")


def test_a_scale_that_is_not_a_number_is_named(tmp_path):
    source = write(tmp_path / "m.gguf", Type.Q4_0)
    tensor = next(one for one in gguf.GGUFReader(source.path, "r+").tensors if one.name == "blk.1.ffn_up.weight")
    tensor.data[0, :2] = np.array([np.nan], np.float16).view(np.uint8)
    with pytest.raises(ArtifactError, match=r"blk\.1\.ffn_up\.weight holds numbers that float16 cannot"):
        adopt(source.path, tmp_path / "out")


def test_a_folder_with_one_file_is_that_file_and_with_two_asks_which(tmp_path):
    folder = tmp_path / "folder"
    source = write(folder / "a.gguf", Type.Q4_0)
    assert foreign.identify(folder).path == source.path
    shutil.copy(source.path, folder / "b.gguf")
    with pytest.raises(PlanError, match=r"2 GGUF files \(a\.gguf, b\.gguf\)"):
        foreign.open_foreign(folder)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "m.gguf").write_text(json.dumps({}))
    with pytest.raises(ArtifactError, match="not a GGUF file"):
        foreign.open_foreign(tmp_path / "m.gguf")
