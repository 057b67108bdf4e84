"""Small Llamas as GGUF files, written and quantized by the package gguf of llama.cpp itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Type

from tests.backends.quantized_folder import random_llama
from tests.quantizers.foreign.folders import Written

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def name_of(name: str) -> str:
    """The name that llama.cpp gives a tensor: https://github.com/ggml-org/ggml docs/gguf.md (2026-06)."""
    module = name.removesuffix(".weight")
    if module in NAMES:
        return f"{NAMES[module]}.weight"
    _, _, layer, inside = module.split(".", 3)
    return f"blk.{layer}.{NAMES[inside]}.weight"


def permuted(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp orders those of q and k: row i of a head's first half before row i of its second half.

    https://github.com/ggml-org/llama.cpp convert_hf_to_gguf.py, LlamaModel.permute (2026-06), row by row.
    """
    size = len(matrix) // heads
    rows = []
    for head in range(heads):
        for i in range(size // 2):
            rows += [matrix[head * size + i], matrix[head * size + size // 2 + i]]
    return np.stack(rows)


def unpermuted(matrix: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of ``permuted``, row by row."""
    size = len(matrix) // heads
    found = np.empty_like(matrix)
    for head in range(heads):
        for i in range(size // 2):
            found[head * size + i] = matrix[head * size + 2 * i]
            found[head * size + size // 2 + i] = matrix[head * size + 2 * i + 1]
    return found


def write(
    file: Path,
    matrices: Type | dict[str, Type],
    *,
    embeddings: Type = Type.F16,
    head: Type = Type.F16,
    keys: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    architecture: str = "llama",
    **model: Any,
) -> Written:
    """A random Llama; ``stands_for`` holds what gguf's own dequantization makes of every tensor, in HF's order.

    ``matrices`` is the type of the decoder layers' matrices, or by llama.cpp's name, with "" for the rest.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    llama = random_llama(**model)
    config = llama.config
    writer = gguf.GGUFWriter(file, architecture)
    metadata(writer, config, keys or {})
    stands_for: dict[str, torch.Tensor] = {}
    for name, tensor in llama.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        array = tensor.numpy() if heads is None else permuted(tensor.numpy(), heads)
        by_name = matrices if isinstance(matrices, dict) else {"": matrices}
        kind = by_name.get(name_of(name), by_name[""])
        kind = {"token_embd.weight": embeddings, "output.weight": head}.get(name_of(name), kind)
        kind = Type.F32 if "norm" in name else kind
        data = stored(array, kind)
        writer.add_tensor(name_of(name), data, raw_dtype=kind)
        wide = gguf.dequantize(data, kind).reshape(array.shape)
        wide = wide if heads is None else unpermuted(wide, heads)
        stands_for[name] = torch.from_numpy(np.ascontiguousarray(wide, np.float32))
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Written(file, stands_for, llama)


def stored(array: np.ndarray, kind: Type) -> np.ndarray:
    """Quantized by gguf; Q6_K and Q4_K, which it can only read, are made of random bytes with sane scales."""
    if kind in (Type.Q6_K, Type.Q4_K):
        return k_quant(array.shape, kind)
    return gguf.quantize(np.ascontiguousarray(array, np.float32), kind)


def k_quant(shape: tuple[int, ...], kind: Type) -> np.ndarray:
    """Random codes of a k-quant whose block scales are small float16 numbers."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (shape[0], shape[1] // block, size), np.uint8)
    where = slice(size - 2, size) if kind == Type.Q6_K else slice(0, 2)
    blocks[..., where] = np.array([2e-5], np.float16).view(np.uint8)
    if kind == Type.Q4_K:
        blocks[..., 2:4] = np.array([1e-5], np.float16).view(np.uint8)
    return blocks.reshape(shape[0], -1)


def metadata(writer: gguf.GGUFWriter, config: transformers.LlamaConfig, keys: dict[str, Any]) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_name("small")
    for key, value in keys.items():
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)](key, value)
    tokens = ["<s>", "</s>", "<unk>", *sorted(set(alphabet().values())), "he", "ll"]
    tokens += [f"<extra{n}>" for n in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)


def alphabet() -> dict[int, str]:
    """The 256 letters that byte-level BPE writes bytes as (GPT-2)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + place) for place, byte in enumerate(others)}
