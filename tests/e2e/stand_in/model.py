"""A Triton Python model in place of NVIDIA's ``tensorrt_llm``: it checks what arrives, and says a script.

``contract.json`` beside it holds the tensors of one release (inputs: name -> type, dims, req or opt; outputs: names), a
script (token ids), and a file that every request is written to. A tensor of another name, type or shape, or one that is
missing, is an error for the client. Answers are shaped as the C++ backend shapes them (src/model_instance_state.cc
``fillTritonResponse`` and ``sendEnqueueResponse`` @v0.19.0): the last one has tensors and is final, a request to stop
gets an empty one. Only for tests.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

_KINDS = {"INT32": "int32", "INT64": "int64", "UINT64": "uint64", "UINT8": "uint8", "FP32": "float32",
          "FP16": "float16", "BOOL": "bool", "STRING": "object"}  # fmt: skip
_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    def initialize(self, args):
        folder = Path(args["model_repository"]) / args["model_version"]
        contract = json.loads((folder / "contract.json").read_text())
        self._inputs, self._outputs = contract["inputs"], contract["outputs"]
        self._script, self._journal = contract["script"], Path(contract["journal"])
        parameters = json.loads(args["model_config"])["parameters"]
        engine = Path(args["model_repository"]).parent / parameters["gpt_model_path"]["string_value"]
        assert (engine / "config.json").is_file(), engine
        assert (engine / "rank0.engine").is_file(), engine

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            wrong = [*self._wrong_inputs(tensors), *self._wrong_outputs(request)]
            self._write(request, tensors)
            if wrong:
                error = pb_utils.TritonError("contract: " + "; ".join(wrong), pb_utils.TritonError.INVALID_ARG)
                sender.send(pb_utils.InferenceResponse(error=error))
                sender.send(flags=_FINAL)
            elif tensors["request_output_len"].reshape(-1)[0] < 1:
                error = pb_utils.TritonError("request_output_len must be positive", pb_utils.TritonError.INTERNAL)
                sender.send(pb_utils.InferenceResponse(error=error), flags=_FINAL)
            elif np.any(tensors.get("stop", False)):
                sender.send(pb_utils.InferenceResponse([]), flags=_FINAL)
            else:
                self._answer(sender, tensors, set(request.requested_output_names()))

    def _answer(self, sender, tensors, wanted):
        if not {"output_ids", "sequence_length"} <= wanted:
            raise RuntimeError("output_ids and sequence_length must be asked for, or the C++ backend throws")
        said = self._said(tensors)
        streaming = np.any(tensors.get("streaming", False))
        pieces = [[token] for token in said] if streaming and said else [said]
        for index, piece in enumerate(pieces):
            response = pb_utils.InferenceResponse(self._tensors(piece, tensors, wanted))
            sender.send(response, flags=_FINAL if index == len(pieces) - 1 else 0)

    def _wrong_inputs(self, tensors):
        for name, array in tensors.items():
            if name not in self._inputs:
                yield f"there is no input {name}"
                continue
            kind, dims, _need = self._inputs[name]
            if array.dtype != np.dtype(_KINDS[kind]):
                yield f"{name} is {array.dtype}, not {kind}"
            shape = list(array.shape)
            fits = shape[0] == 1 and len(shape) == 1 + len(dims)
            fits = fits and all(dim in (-1, size) for dim, size in zip(dims, shape[1:], strict=False))
            if not fits and not (dims == [1] and shape == [1]):  # reshaped to []
                yield f"{name} has the shape {shape}, not [1, *{dims}]"
        for name, (_kind, _dims, need) in self._inputs.items():
            if (need == "req" or name == "input_ids") and name not in tensors:
                yield f"{name} is missing"

    def _wrong_outputs(self, request):
        return [f"there is no output {name}" for name in request.requested_output_names() if name not in self._outputs]

    def _write(self, request, tensors):
        plain = {name: {"type": str(array.dtype), "shape": list(array.shape), "values": _plain(array)}
                 for name, array in tensors.items()}  # fmt: skip
        line = {"id": request.request_id(), "wanted": sorted(request.requested_output_names()), "inputs": plain}
        with self._journal.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _said(self, tensors):
        """The script up to the end id (not before the least length), the longest length, or a stop word."""
        least = tensors.get("min_length", tensors.get("min_tokens", np.zeros(1))).reshape(-1)[0]
        end, longest = tensors["end_id"].reshape(-1)[0], tensors["request_output_len"].reshape(-1)[0]
        words = _words(tensors["stop_words_list"]) if "stop_words_list" in tensors else []
        said = []
        for token in self._script:
            if len(said) == longest or (token == end and len(said) >= least):
                break
            if token == end:
                continue
            said.append(token)
            if any(said[-len(word) :] == word for word in words):
                break
        return said

    def _tensors(self, ids, tensors, wanted):
        found = {
            "output_ids": np.array([[ids]], dtype=np.int32),
            "sequence_length": np.array([[len(ids)]], dtype=np.int32),
            "cum_log_probs": np.zeros((1, 1), dtype=np.float32),
            "output_log_probs": np.zeros((1, 1, len(ids)), dtype=np.float32),
            "batch_index": np.zeros((1, 1), dtype=np.int32),
            "sequence_index": np.zeros((1, 1), dtype=np.int32),
            "num_input_tokens": tensors["input_lengths"].reshape(1, 1),
            "num_output_tokens": np.array([[len(ids)]], dtype=np.int32),
        }
        return [pb_utils.Tensor(name, array) for name, array in found.items() if name in wanted & set(self._outputs)]


def _words(table):
    rows, words, start = table.reshape(2, -1), [], 0
    for end in rows[1].tolist():
        if end <= start:
            break
        words.append(rows[0, start:end].tolist())
        start = end
    return words


def _plain(array):
    return [item.decode() if isinstance(item, bytes) else item for item in array.reshape(-1)[:64].tolist()]
