"""What several test files need: small random Llamas and kin by transformers, and ``scalellm`` as a process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCALELLM = Path(sys.executable).parent / "scalellm"


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def random_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``random_llama(**config)`` -> the folder of a random two-layer Llama in the HF layout, made once per config.

    ``architecture="Qwen2ForCausalLM"`` makes another class of the family. Biases, which transformers begins with zero,
    are as large as the rest of their products, so that one forgotten changes everything.
    """
    made: dict[str, Path] = {}

    def make(**overrides: object) -> Path:
        import torch
        import transformers

        values = {
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 320,
            "max_position_embeddings": 512,
            "dtype": "float16",
            "architecture": "LlamaForCausalLM",
        } | overrides
        name = repr(sorted(values.items()))
        if name not in made:
            torch.manual_seed(0)
            kind = getattr(transformers, str(values["architecture"]))
            model = kind(kind.config_class(**{key: value for key, value in values.items() if key != "architecture"}))
            for parameter in (one for full, one in model.named_parameters() if full.endswith(".bias")):
                torch.nn.init.normal_(parameter)
            dtype = getattr(torch, str(values["dtype"]))
            folder = tmp_path_factory.mktemp("llama")
            model.to(dtype).save_pretrained(folder, max_shard_size="1MB")
            _byte_tokenizer().save_pretrained(folder)
            made[name] = folder
        return made[name]

    return make


def _byte_tokenizer() -> Any:
    """A tokenizer of 256 bytes and two special tokens; ``<s>`` comes first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=258, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def scalellm() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``scalellm("plan", "--recipe", "t4")`` -> the finished process, with its output as text."""

    def run(*argv: object, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(SCALELLM), *map(str, argv)],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            cwd=ROOT,
            env={**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1", **env},
        )

    return run


def unused_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on just now."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def free_ports() -> list[int]:
    """Three unused ports, for HTTP, gRPC and metrics."""
    return unused_ports(3)
