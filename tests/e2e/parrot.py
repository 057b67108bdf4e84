"""A Llama that knows four sentences by heart, with its own byte-level BPE: trained in seconds, surely right or wrong.

Some sentences hold CJK and emoji, whose bytes are spread over several tokens.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SENTENCES = (
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "日本の首都は東京です。 😀🎉 done, and then 北京 too 🚀!",
    "Count with me: one two three four five six seven eight nine ten eleven twelve thirteen.",
    "Greek letters are alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu.",
)
BOS, EOS = 0, 1
RECIPE = """\
model: some/model
device: cpu
quantization: {weights: none}
kv_cache: {dtype: fp32, max_tokens: 1024}
limits: {max_batch_size: 2, max_seq_len: 256}
cpu: {threads: 1, precision: f32}
"""
"""One that builds it as it is, small, in float32."""


def write_parrot(folder: Path, *, positions: int = 8192, layers: int = 2) -> Path:
    """Train and save: config, float32 weights, tokenizer. Deterministic. About five seconds on an idle core."""
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=positions,
            bos_token_id=BOS,
            eos_token_id=EOS,
            tie_word_embeddings=False,
        )
    )
    batch = tokenizer([f"{sentence}</s>" for sentence in SENTENCES], return_tensors="pt", padding=True)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _step in range(300):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.01:
            break
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The parrot's tokenizer alone, saved and given back."""
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    return tokenizer


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    english = [sentence for sentence in SENTENCES if sentence.isascii()]
    tokenizer.train_from_iterator(english, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="right"
    )
