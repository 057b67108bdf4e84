"""A Llama of random weights and a tokenizer of its own, in the formats of all peers of `bench_peers.py`.

The weights are those of `bench_quantize.py` (TinyLlama's shape for "1b"), the tokenizer is byte-level BPE over the
sources of Python's standard library: 32,000 words, so that prompts have their lengths and answers are text. Written as
Hugging Face's folder, and as GGUF in 16 bits with what `llama-quantize` makes of it. It measures nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import bench_quantize, make_tiny_llama
from toolchain.quantizers.foreign.gguf import gguf_name


def make(folder: Path, shape: str) -> None:
    """Weights, config and tokenizer, unless they are there already."""
    bench_quantize.make(folder, shape)
    if not (folder / "tokenizer.json").exists():
        vocab = bench_quantize.SHAPES[shape][5]
        bench_quantize.say(f"training a tokenizer of {vocab} words")
        library = Path(sysconfig.get_path("stdlib"))
        files = [*sorted(library.glob("*.py")), *sorted(library.glob("[a-t]*/*.py"))]
        texts = [file.read_text(encoding="utf-8", errors="ignore") for file in files]
        tokenizer = make_tiny_llama.train_tokenizer(texts, vocab)
        tokenizer.model_max_length = 4096
        tokenizer.save_pretrained(str(folder))
        make_tiny_llama.edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def write_gguf(model: Path, target: Path, llama_quantize: str, scheme: str) -> Path:
    """-> the quantized file, made by llama.cpp's own program from a GGUF in 16 bits, unless it is there already."""
    whole, made = target / "f16.gguf", target / f"{scheme}.gguf"
    if not made.exists():
        target.mkdir(parents=True, exist_ok=True)
        _write_f16(model, whole)
        subprocess.run([llama_quantize, str(whole), str(made), scheme], check=True, stdout=subprocess.DEVNULL)
        whole.unlink()
    return made


def _write_f16(model: Path, file: Path) -> None:
    import gguf
    import numpy as np
    from safetensors import safe_open

    config = json.loads((model / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _add_tokenizer(writer, model, config["vocab_size"])
    for shard in sorted(model.glob("*.safetensors")):
        with safe_open(str(shard), "numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                values = tensors.get_tensor(name)
                if name.endswith(("q_proj.weight", "k_proj.weight")):
                    values = _interleaved(values, heads if ".q_proj" in name else kv_heads)
                writer.add_tensor(gguf_name(name), values.astype(np.float32) if values.ndim == 1 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(values: Any, heads: int) -> Any:
    """Rows of a rotated projection in llama.cpp's order: pairs beside each other instead of in two halves."""
    size = values.shape[0] // heads
    return values.reshape(heads, 2, size // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _add_tokenizer(writer: Any, model: Path, vocab: int) -> None:
    import gguf

    raw = json.loads((model / "tokenizer.json").read_text())
    words = {number: word for word, number in raw["model"]["vocab"].items()}
    special = {one["id"]: one["content"] for one in raw["added_tokens"]}
    merges = [one if isinstance(one, str) else " ".join(one) for one in raw["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([(words | special).get(number, f"[unused{number}]") for number in range(vocab)])
    kinds = gguf.TokenType
    writer.add_token_types(
        [
            kinds.CONTROL if number in special else kinds.NORMAL if number in words else kinds.UNUSED
            for number in range(vocab)
        ]
    )
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
