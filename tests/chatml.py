"""A tokenizer as Qwen2 has it: no BOS at all, turns between special tokens, an id of its own for padding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

PAD, START, END = 0, 1, 2
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_chatml_tokenizer(folder: Path, corpus: Sequence[str], *, vocab_size: int = 320) -> None:
    """Write ``tokenizer.json`` and a ``tokenizer_config.json`` with the keys that Qwen2.5 publishes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": SPECIAL[END],
        "pad_token": SPECIAL[PAD],
        "additional_special_tokens": list(SPECIAL[1:]),
        "tokenizer_class": "Qwen2Tokenizer",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
