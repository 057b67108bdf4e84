"""What ``preprocessing`` computes: a dictionary of numpy tensors in, one out. It knows nothing of Triton."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detokenizer import Anchor
from tensors import RefusedError, as_text, refuse, scalar, strings
from tokenizer import Tokenizer
from words import flatten, spellings

_TEXT_ONLY = "this model takes text only"
UNSUPPORTED = {
    "DECODER_QUERY": "this model has no encoder (client input decoder_text_input)",
    "IMAGE_BYTES": f"{_TEXT_ONLY} (client input image_bytes_input)",
    "IMAGE_URL": f"{_TEXT_ONLY} (client input image_url_input)",
    "VIDEO_BYTES": f"{_TEXT_ONLY} (client input video_bytes_input)",
    "IMAGES": _TEXT_ONLY,
    "PROMPT_TABLE_EXTRA_ID": "prompt tables are not supported (client input prompt_table_extra_id)",
}


class Prompts:
    """Requests as the tensors of the contract -> the tensors that ``tensorrt_llm`` takes."""

    def __init__(self, tokenizer: Tokenizer, *, max_input_len: int, special: bool, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._anchor = Anchor(tokenizer)
        self._max_input_len = max_input_len
        self._special = special
        self._vocab_size = vocab_size

    def prepare(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """QUERY [b, 1] and its companions -> INPUT_ID int32 [b, longest] (right-padded), REQUEST_INPUT_LEN [b, 1],
        STOP/BAD_WORDS_IDS int32 [b, 2, n], EMBEDDING_BIAS fp32 [b, vocab or 0], OUT_END_ID, OUT_PAD_ID [b, 1].

        Raises RefusedErrorError, naming the tensor.
        """
        refuse(inputs, UNSUPPORTED)
        queries = inputs["QUERY"].reshape(-1)
        batch = len(queries)
        end_id = int(scalar(inputs, "END_ID", self._or_none(self._tokenizer.eos_id)))
        pad_id = int(scalar(inputs, "PAD_ID", self._or_none(self._tokenizer.pad_id)))
        prompts = [self._encode(as_text(query)) for query in queries]
        ids = np.full((batch, max(map(len, prompts))), max(pad_id, 0), dtype=np.int32)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        return {
            "INPUT_ID": ids,
            "REQUEST_INPUT_LEN": np.array([[len(prompt)] for prompt in prompts], dtype=np.int32),
            "REQUEST_OUTPUT_LEN": inputs["REQUEST_OUTPUT_LEN"].reshape(batch, -1).astype(np.int32),
            "STOP_WORDS_IDS": self._words(inputs.get("STOP_WORDS_DICT"), batch),
            "BAD_WORDS_IDS": self._words(inputs.get("BAD_WORDS_DICT"), batch),
            "EMBEDDING_BIAS": self._bias(inputs, batch),
            "OUT_END_ID": np.full((batch, 1), end_id, dtype=np.int32),
            "OUT_PAD_ID": np.full((batch, 1), pad_id, dtype=np.int32),
        }

    def _encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, special=self._special)
        if not ids:
            raise RefusedError("text_input: the prompt is empty, and this tokenizer has no BOS token to begin with")
        if len(ids) > self._max_input_len:
            raise RefusedError(
                f"text_input: the prompt has {len(ids)} tokens, and this engine takes at most {self._max_input_len}"
            )
        return ids

    def _words(self, array: np.ndarray | None, batch: int) -> np.ndarray:
        """BYTES [b, n] -> int32 [b, 2, m], shorter rows padded as TensorRT-LLM pads them (ids 0, ends -1)."""
        rows = [[]] * batch if array is None else [strings(row) for row in array.reshape(batch, -1)]
        tables = [flatten(self._spelled(words)) for words in rows]
        width = max(table.shape[1] for table in tables)
        padded = np.zeros((batch, 2, width), dtype=np.int32)
        padded[:, 1] = -1
        for place, table in zip(padded, tables, strict=True):
            place[:, : table.shape[1]] = table
        return padded

    def _spelled(self, words: Sequence[str]) -> list[list[int]]:
        return [ids for word in words for ids in spellings(self._tokenizer, self._anchor, word)]

    def _bias(self, inputs: dict[str, np.ndarray], batch: int) -> np.ndarray:
        """EMBEDDING_BIAS_WORDS and _WEIGHTS -> fp32 [b, vocab]; [b, 0] when there are none. One token a word."""
        words, weights = inputs.get("EMBEDDING_BIAS_WORDS"), inputs.get("EMBEDDING_BIAS_WEIGHTS")
        if not strings(words):
            return np.zeros((batch, 0), dtype=np.float32)
        if words is None or weights is None or weights.size != words.size:
            raise RefusedError("embedding_bias_weights: one weight is needed for each of embedding_bias_words")
        bias = np.zeros((batch, self._vocab_size), dtype=np.float32)
        rows = zip(bias, words.reshape(batch, -1), weights.reshape(batch, -1), strict=True)
        for row, row_words, row_weights in rows:
            for word, weight in zip(row_words, row_weights, strict=True):
                row[self._single_token(as_text(word))] += weight
        return bias

    def _single_token(self, word: str) -> int:
        for ids in spellings(self._tokenizer, self._anchor, word):
            if len(ids) == 1:
                return ids[0]
        raise RefusedError(f"embedding_bias_words: {word!r} is not a single token of this model")

    @staticmethod
    def _or_none(token: int | None) -> int:
        return -1 if token is None else token
