"""What OpenVINO GenAI needs beside the model to keep answers to a grammar: the bytes of all tokens, and a judge.

``openvino_detokenizer.xml``: GenAI reads the vocabulary of its grammars (xgrammar) from the detokenizer's VocabDecoder
(openvino.genai 2026.4 src/cpp/src/tokenizer/tokenizer_impl.cpp, ``read_vocab_from_detokenizer_model``).

``guides/``: a model of the same vocabulary with a layer of 16 zeros, which answers within a millisecond. GenAI compiles
a grammar inside ``step``, where an error ends the whole engine, and Python has no other way to try one; so each grammar
is tried on this model in a process of its own first. It knows nothing of requests.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from toolchain import token_bytes, workspace
from toolchain.backends.openvino.graph import write_llama
from toolchain.backends.openvino.ir import IrWriter, Port
from toolchain.backends.openvino.weights import Matrix
from toolchain.family import LlamaConfig

DETOKENIZER = "openvino_detokenizer.xml"
FOLDER = "guides"
_WIDTH = 16


def write_guides(source: Path, config: LlamaConfig, out: Path, copies: int = 1) -> None:
    """Write both for the tokenizer in ``source`` into the engine ``out``.

    ``copies``: how many times the logits hold the vocabulary, one after the other. Raises ArtifactError for a tokenizer
    whose bytes are not known.
    """
    raw = token_bytes.parse(token_bytes.tokenizer_text(source))
    vocabulary = token_bytes.token_bytes(raw, config.vocab_size) * copies
    judge = out / FOLDER
    judge.mkdir(parents=True, exist_ok=True)
    small = dataclasses.replace(
        config,
        hidden_size=_WIDTH,
        intermediate_size=_WIDTH,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=_WIDTH,
        vocab_size=len(vocabulary),
        tied_embeddings=True,
        biased=(),
    )
    with IrWriter(judge / "openvino_model.xml", "judge") as ir:
        write_llama(ir, small, _Zeros(ir, len(vocabulary)))
    for folder in (out, judge):
        _write_detokenizer(vocabulary, folder / DETOKENIZER)
    workspace.write_durably(judge / "config.json", json.dumps({"model_type": "llama"}).encode())


class _Zeros:
    """The tensors of a model in which nothing happens."""

    def __init__(self, ir: IrWriter, vocabulary: int) -> None:
        self._ir, self._vocabulary = ir, vocabulary

    def has(self, name: str) -> bool:
        return False

    def floats(self, name: str) -> Port:
        if "norm" in name:
            return self._ir.values("f32", np.ones(_WIDTH))
        size = self._vocabulary * _WIDTH * 2
        table = self._ir.constant("f16", (self._vocabulary, _WIDTH), [bytes(size)], name=name)
        return self._ir.decompressed(table)

    def linear(self, name: str) -> Matrix:
        return Matrix(self._ir.values("f32", np.zeros((_WIDTH, _WIDTH))))


def _write_detokenizer(vocabulary: list[bytes], file: Path) -> None:
    """Ids i64 [batch, n] -> texts [batch]. Special tokens have no bytes, so that they are left out."""
    import openvino
    from openvino import opset13 as ops
    from openvino_tokenizers import _get_factory

    ends = np.cumsum([len(token) for token in vocabulary], dtype=np.int32)
    begins = np.concatenate([[0], ends[:-1]]).astype(np.int32)
    letters = np.frombuffer(b"".join(vocabulary), np.uint8)
    create: Any = _get_factory().create
    ids = ops.parameter([-1, -1], openvino.Type.i64, name="ids")
    table = [ops.constant(one).output(0) for one in (begins, ends, letters)]
    decoder = create("VocabDecoder", [ops.convert(ids, "i32").output(0), *table], {})
    decoder.set_friendly_name("VocabDecoder")
    *ragged, letters_out = decoder.outputs()
    texts = create("StringTensorPack", [*create("FuzeRagged", ragged, {}).outputs(), letters_out], {})
    model = openvino.Model([ops.result(texts.output(0))], [ids], "detokenizer")
    model.set_rt_info(openvino.get_version(), "openvino_tokenizers_version")
    openvino.save_model(model, file, compress_to_fp16=False)
    for part in (file, file.with_suffix(".bin")):
        workspace.write_durably(part, part.read_bytes())
