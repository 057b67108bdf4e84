"""Triton model ``postprocessing``: token ids -> text, without memory.

Each piece of a stream is decoded by itself, behind an anchor, so that leading spaces are right and the pieces put
together give the whole. A character whose bytes lie in two pieces cannot be mended here: it comes out as U+FFFD. Stream
text through ``tensorrt_llm_bls``, which remembers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from detokenizer import Anchor
from tensors import read, refuse_unsound_numpy, settings
from texts import detokenize
from tokenizer import Tokenizer


class TritonPythonModel:
    """One instance; Triton may run several."""

    def initialize(self, args: dict[str, str]) -> None:
        refuse_unsound_numpy()
        parameters, folder = settings(args)
        self._tokenizer = Tokenizer(folder)
        self._anchor = Anchor(self._tokenizer)
        self._skip_special = parameters["skip_special_tokens"].lower() in {"true", "1", "yes"}

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        inputs = read(request)
        texts = detokenize(
            self._tokenizer,
            self._anchor,
            inputs["TOKENS_BATCH"],
            inputs["SEQUENCE_LENGTH"],
            skip_special=self._skip_special,
        )
        output = np.array([text.encode("utf-8") for text in texts], dtype=object)
        return pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", output)])
