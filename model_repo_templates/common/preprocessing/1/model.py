"""Triton model ``preprocessing``: text -> token ids, stop and bad words as ids, the tokenizer's end and pad ids.

The same file serves the CPU engine and NVIDIA's ``tensorrtllm`` backend. It needs numpy and the tokenizer's library;
it knows nothing of engines.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from prompts import Prompts
from tensors import RefusedError, read, refuse_unsound_numpy, settings
from tokenizer import Tokenizer


class TritonPythonModel:
    """One instance; Triton may run several."""

    def initialize(self, args: dict[str, str]) -> None:
        refuse_unsound_numpy()
        parameters, folder = settings(args)
        self._prompts = Prompts(
            Tokenizer(folder),
            max_input_len=int(parameters["max_input_len"]),
            special=parameters["add_special_tokens"].lower() in {"true", "1", "yes"},
            vocab_size=int(parameters["vocab_size"]),
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response for each request; a refused request gets an error of its own."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            outputs = self._prompts.prepare(read(request))
        except RefusedError as refused:
            error = pb_utils.TritonError(str(refused), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=error)
        wanted = set(request.requested_output_names())
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in outputs.items() if name in wanted]
        )
