"""A Qwen2 that knows two answers, in the real Triton: ChatML prompts, no BOS, two end ids, biases, a tied head."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from tests.chatml import END, PAD, SPECIAL, START, write_chatml_tokenizer
from tests.e2e.served import Served
from tests.e2e.test_triton_models import make_engine, serving

pytestmark = pytest.mark.timeout(180)
ANSWERS = {"Count!": "one two three four five six", "Sag Hallo!": "Hallo 東京 😀, und mehr"}
ENDS = dict(zip(ANSWERS, (SPECIAL[END], SPECIAL[PAD]), strict=True))
"""Each answer ends with another of the two ids, of which config.json names only the first."""


def prompt_of(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained in seconds, on the ids that transformers' own tokenizer gives for whole conversations."""
    folder = tmp_path_factory.mktemp("qwen2")
    write_chatml_tokenizer(folder, list(ANSWERS.values()))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    names = {"bos_token_id": PAD, "eos_token_id": END, "tie_word_embeddings": True}
    model = Qwen2ForCausalLM(Qwen2Config(**shape, num_key_value_heads=2, vocab_size=323, **names))
    rows = [tokenizer(prompt_of(one) + answer + ENDS[one], return_tensors="pt") for one, answer in ANSWERS.items()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _step in range(200):
        loss = torch.stack([model(**row, labels=row.input_ids).loss for row in rows]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith(".bias")]
    assert all(bool(bias.detach().any()) for bias in biases)
    model.save_pretrained(folder)
    config = {"bos_token_id": PAD, "eos_token_id": [END, PAD], "pad_token_id": PAD, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    work = tmp_path_factory.mktemp("served_qwen2")
    with serving(make_engine(folder, work / "engine"), work) as found:
        yield found


@pytest.mark.parametrize("question", ANSWERS)
@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
def test_chat_is_answered_as_by_transformers_and_ends_at_either_end_id(
    served: Served, folder: Path, model: str, question: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(prompt_of(question), return_tensors="pt")
    assert encoded.input_ids[0, 0] == START
    reference = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = reference.generate(**encoded, max_new_tokens=60)[0, encoded.input_ids.shape[1] :]
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    assert expected == ANSWERS[question]
    assert served.text(model, text_input=prompt_of(question), max_tokens=60) == expected
    assert "".join(served.pieces("tensorrt_llm_bls", text_input=prompt_of(question), max_tokens=60)) == expected
