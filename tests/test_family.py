"""Which models we take: what transformers writes, what is published, and what is refused, by its key and value."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.quantizers.calibrated import ROPES
from toolchain import workspace
from toolchain.errors import PlanError
from toolchain.family import LlamaConfig, RopeScaling, expected_tensors, published, read_config
from toolchain.planning.memory import parameters

ARCHITECTURES = ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"]
BASE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 323,
}
QWEN2 = BASE | {"num_key_value_heads": 2, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
MISTRAL = BASE | {
    "num_key_value_heads": 2,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": None,
}


def refused(config: dict[str, Any], *words: str) -> None:
    with pytest.raises(PlanError) as caught:
        read_config(config, "here/config.json")
    for word in ("here/config.json", *words):
        assert word in caught.value.message


# --- what transformers writes ----------------------------------------------------------------------------------------


def written_by_5(architecture: str) -> dict[str, Any]:
    """``to_dict`` of the class's defaults; Mistral's default window is not one that we compute."""
    kind = getattr(transformers, architecture).config_class
    config = kind(sliding_window=None) if kind is transformers.MistralConfig else kind()
    return dict(config.to_dict()) | {"architectures": [architecture]}


_GENERATION = {
    "max_length": 20, "min_length": 0, "do_sample": False, "early_stopping": False, "num_beams": 1,
    "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0,
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "num_return_sequences": 1,
    "output_scores": False, "return_dict_in_generate": False, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "remove_invalid_values": False, "exponential_decay_length_penalty": None,
    "suppress_tokens": None, "begin_suppress_tokens": None, "num_beam_groups": 1, "diversity_penalty": 0.0,
}  # fmt: skip
_COMMON_4_57 = {
    "return_dict": True, "output_hidden_states": False, "torchscript": False, "dtype": None, "pruned_heads": {},
    "tie_word_embeddings": False, "chunk_size_feed_forward": 0, "is_encoder_decoder": False, "is_decoder": False,
    "cross_attention_hidden_size": None, "add_cross_attention": False, "tie_encoder_decoder": False,
    "architectures": None, "finetuning_task": None, "id2label": {0: "LABEL_0", 1: "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "task_specific_params": None, "problem_type": None,
    "tokenizer_class": None, "prefix": None, "pad_token_id": None, "sep_token_id": None,
    "decoder_start_token_id": None, "_name_or_path": "", "transformers_version": "4.57.6", "tf_legacy_loss": False,
    "use_bfloat16": False, "output_attentions": False, "num_hidden_layers": 32, "num_attention_heads": 32,
    "hidden_size": 4096, "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-06, "use_cache": True,
    "rope_theta": 10000.0, "attention_dropout": 0.0, **_GENERATION,
}  # fmt: skip
WRITTEN_BY_4_57: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {
        "model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 2048, "intermediate_size": 11008,
        "num_key_value_heads": 32, "pretraining_tp": 1, "rope_scaling": None, "attention_bias": False,
        "mlp_bias": False, "head_dim": 128, "bos_token_id": 1, "eos_token_id": 2,
    },
    "MistralForCausalLM": {
        "model_type": "mistral", "vocab_size": 32000, "max_position_embeddings": 131072, "intermediate_size": 14336,
        "sliding_window": 4096, "head_dim": None, "num_key_value_heads": 8, "bos_token_id": 1, "eos_token_id": 2,
    },
    "Qwen2ForCausalLM": {
        "model_type": "qwen2", "vocab_size": 151936, "max_position_embeddings": 32768, "intermediate_size": 22016,
        "use_sliding_window": False, "sliding_window": None, "max_window_layers": 28, "num_key_value_heads": 32,
        "rope_scaling": None, "layer_types": ["full_attention"] * 32, "bos_token_id": None, "eos_token_id": None,
    },
}  # fmt: skip
"""``to_dict()`` of LlamaConfig(), MistralConfig() and Qwen2Config() as transformers 4.57.6 printed them."""


def written_by_4(architecture: str) -> dict[str, Any]:
    config = _COMMON_4_57 | WRITTEN_BY_4_57[architecture] | {"architectures": [architecture]}
    return config | ({"sliding_window": None} if architecture == "MistralForCausalLM" else {})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("written", [written_by_4, written_by_5])
def test_defaults_of_transformers_classes_are_accepted(
    architecture: str, written: Callable[[str], dict[str, Any]]
) -> None:
    raw = written(architecture)
    config = read_config(json.loads(json.dumps(raw)), "config.json")
    assert config.architecture == architecture
    assert (config.num_kv_heads, config.head_dim) == (raw["num_key_value_heads"], 128)
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)
    assert config.biased == (ATTENTION if architecture == "Qwen2ForCausalLM" else ())


ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keys_that_are_left_out_have_transformers_defaults(architecture: str) -> None:
    """A config.json of the shapes alone means the same to transformers and to us."""
    shapes = {key: value for key, value in BASE.items() if key != "architectures"} | {"num_attention_heads": 32}
    if architecture == "MistralForCausalLM":
        shapes["sliding_window"] = None
    theirs = getattr(transformers, architecture).config_class(**shapes)
    ours = read_config(shapes | {"architectures": [architecture]}, "config.json")
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tied_embeddings == theirs.tie_word_embeddings


@pytest.mark.parametrize("shape", ROPES)
def test_saved_models_are_accepted_as_files_and_as_whole_dictionaries(
    random_llama: Callable[..., Path], shape: str
) -> None:
    folder = random_llama(**ROPES[shape])
    saved = json.loads((folder / "config.json").read_text())
    whole = transformers.AutoConfig.from_pretrained(folder).to_dict()
    assert len(whole) > len(saved)
    assert read_config(saved, "config.json") == read_config(json.loads(json.dumps(whole)), "config.json")


@pytest.mark.parametrize("shape", ROPES)
def test_expected_tensors_are_those_of_transformers(random_llama: Callable[..., Path], shape: str) -> None:
    folder = random_llama(**ROPES[shape])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    config = read_config(json.loads((folder / "config.json").read_text()), "config.json")
    assert expected_tensors(config) == theirs
    assert parameters(config) == sum(tensor.numel() for tensor in model.parameters())


# --- what is published -----------------------------------------------------------------------------------------------

PARAMETERS = {
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "Qwen/Qwen2-7B": 7_615_616_512,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
}
"""As the hub counts them in the safetensors files."""


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_models_have_their_published_number_of_parameters(name: str) -> None:
    config = published(f"hf:{name}")
    assert config is not None
    assert parameters(config) == PARAMETERS[name]


def test_published_models_are_read_as_transformers_reads_them() -> None:
    for name, entry in workspace.facts("models").items():
        ours = published(name)
        assert ours is not None
        theirs = getattr(transformers, ours.architecture).config_class(**entry["config"])
        heads = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
        rope = dict(theirs.rope_parameters)
        assert (ours.num_kv_heads, ours.head_dim) == (theirs.num_key_value_heads, heads), name
        assert ours.rope_theta == rope["rope_theta"], name
        assert ours.max_position_embeddings == theirs.max_position_embeddings, name
        assert (ours.rope_scaling.factor if ours.rope_scaling else None) == rope.get("factor"), name
        assert entry["source"].startswith("https://huggingface.co/")
        assert entry["date"]


def test_llama_3_rope_scaling_is_read_whole() -> None:
    config = published("meta-llama/Llama-3.1-8B")
    assert config is not None
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert config.rope_theta == 500000.0


QWEN2_5_05B = QWEN2 | {"use_mrope": False, "use_sliding_window": False, "max_window_layers": 24, "use_cache": True,
                       "sliding_window": 32768, "max_position_embeddings": 131072, "attention_dropout": 0.0,
                       "tie_word_embeddings": True, "rope_theta": 1000000.0, "torch_dtype": "bfloat16",
                       "initializer_range": 0.02, "hidden_act": "silu", "transformers_version": "4.40.1"}  # fmt: skip


def test_qwen2_has_biases_before_attention_and_no_window_unless_it_says_so() -> None:
    config = read_config(QWEN2_5_05B, "config.json")
    assert config.biased == ATTENTION
    assert config.tied_embeddings
    assert config.head_dim == 16
    refused(QWEN2_5_05B | {"use_sliding_window": True}, "use_sliding_window is true")
    refused(QWEN2_5_05B | {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: sliding_attention")


def test_llama_with_attention_bias_has_four() -> None:
    assert read_config(BASE | {"attention_bias": True}, "").biased == (*ATTENTION, "self_attn.o_proj")
    assert read_config(BASE | {"attention_bias": False}, "").biased == ()


@pytest.mark.parametrize(("eos", "ids"), [(None, ()), (7, (7,)), ([151645, 151643], (151645, 151643))])
def test_end_ids_are_a_number_a_list_or_none(eos: object, ids: tuple[int, ...]) -> None:
    assert read_config(QWEN2 | {"eos_token_id": eos}, "").eos_token_ids == ids


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"embedding_multiplier": 12.0, "logits_scaling": 16.0},
         ["embedding_multiplier: 12.0", "logits_scaling: 16.0"]),
        ({"use_qk_norm": False}, ["use_qk_norm: false"]),
        ({"query_pre_attn_scalar": 256}, ["query_pre_attn_scalar: 256"]),
        ({"clip_qkv": 8}, ["clip_qkv: 8"]),
        ({"num_local_experts": 8}, ["num_local_experts: 8"]),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}, ["auto_map", "modeling_own.Own"]),
        ({"mlp_bias": True}, ["mlp_bias is true"]),
        ({"hidden_act": "gelu"}, ['hidden_act is "gelu"']),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5"]),
        ({"pruned_heads": {"1": [0]}}, ["pruned_heads"]),
        ({"architectures": ["GraniteForCausalLM"], "residual_multiplier": 0.2},
         ["GraniteForCausalLM", "residual_multiplier: 0.2"]),
        ({"architectures": None}, ["no architecture"]),
        ({"model_type": "granite"}, ["model_type granite"]),
        ({"dtype": "float64"}, ["float64"]),
        ({"long": ["x" * 100]}, ["long: [", "..."]),
        ({"num_key_value_heads": 3}, ["4 attention heads", "3 key and value heads"]),
        ({"dual_chunk_attention_config": {"chunk_size": 262144}}, ["dual_chunk_attention_config"]),
    ],
)  # fmt: skip
def test_keys_that_we_do_not_compute_are_refused_by_name_and_value(change: dict[str, Any], words: list[str]) -> None:
    refused(BASE | change, *words)


@pytest.mark.parametrize("key", ["embedding_multiplier", "clip_qkv", "hidden_act", "mlp_bias", "rope_scaling"])
def test_null_is_the_same_as_absent(key: str) -> None:
    assert read_config(BASE | {key: None}, "") == read_config(BASE, "")


@pytest.mark.parametrize("config", [QWEN2, MISTRAL], ids=["qwen2", "mistral"])
def test_attention_bias_of_a_class_that_does_not_read_it_is_refused(config: dict[str, Any]) -> None:
    refused(config | {"attention_bias": True}, "attention_bias: true")
    read_config(config | {"attention_bias": False}, "")


def test_mistrals_window_is_refused_also_where_it_is_only_the_default() -> None:
    refused(MISTRAL | {"sliding_window": 4096, "max_position_embeddings": 32768}, "sliding_window: 4096")
    refused({key: value for key, value in MISTRAL.items() if key != "sliding_window"}, "sliding_window: 4096")
    assert read_config(MISTRAL | {"sliding_window": 4096, "max_position_embeddings": 4096}, "").num_kv_heads == 2


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("rope", "words"),
    [
        (YARN, ["'yarn'"]),
        ({"type": "yarn", "factor": 4.0}, ["'yarn'"]),
        ({"rope_type": "dynamic", "factor": 2.0}, ["'dynamic'"]),
        ({"type": "mrope", "mrope_section": [16, 24, 24]}, ["'mrope'"]),
        ({"rope_type": "linear", "factor": 2.0, "attention_factor": 1.2}, ["attention_factor: 1.2"]),
        ({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"full_attention": {"rope_type": "default"}}, ["full_attention"]),
        ({"rope_type": "llama3", "factor": 8.0}, ["low_freq_factor"]),
    ],
)
def test_rotary_scaling_that_we_do_not_compute_is_refused(key: str, rope: dict[str, Any], words: list[str]) -> None:
    refused(QWEN2 | {key: rope}, *words)


def test_two_spellings_of_rotary_scaling_at_once_are_refused() -> None:
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    refused(BASE | {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": plain}, "both rope_scaling")


@pytest.mark.parametrize("change", [{"hidden_size": "wide"}, {"rope_scaling": "linear"}])
def test_wrong_types_are_no_traceback(change: dict[str, Any]) -> None:
    refused(BASE | change, "missing or has the wrong type")


def test_every_ignored_key_has_its_reason_and_stands_once() -> None:
    table = workspace.facts("config_keys")
    keys = [*table["read"], *table["only"], *(key for group in table["ignored"] for key in group["keys"])]
    assert len(keys) == len(set(keys))
    assert all(group["why"] and "transformers" in group["source"] and group["date"] for group in table["ignored"])


def test_a_quantized_folders_own_key_is_left_to_the_checkpoint() -> None:
    config: LlamaConfig = read_config(BASE | {"quantization_config": {"quant_method": "modelopt"}}, "")
    assert config == read_config(BASE, "")


def test_a_family_with_keys_of_its_own_is_refused_by_its_name() -> None:
    gpt2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12}
    with pytest.raises(PlanError, match="its architecture is GPT2LMHeadModel") as refused:
        read_config(gpt2, "gpt2/config.json")
    assert "LlamaForCausalLM" in refused.value.hint


@pytest.mark.parametrize("size", [0, -5])
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_sizes_below_one_are_named(key: str, size: int) -> None:
    refused(BASE | {key: size}, f"{key}: {size}")
