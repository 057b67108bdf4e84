"""A Triton Python model in place of NVIDIA's ``tensorrt_llm``, or of its draft: an engine that knows answers by heart.

``script.json`` beside it holds the inputs of one release (name -> type, dims, need), the cases (prompt ids, answer ids,
the places where this engine is wrong, and whether it is slow), the end id, the longest draft, and a file that every
request is written to. A draft is checked as an engine built with ``draft_tokens_external`` does it: the tokens that it
would have written itself, and then one of its own. It is asked through Triton, or over the private line of
``channel.py``. Only for tests.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import channel
import numpy as np
import triton_python_backend_utils as pb_utils

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
_PAUSE_S = 0.02
_WRONG = 5
"""The token of a wrong place."""


class TritonPythonModel:
    def initialize(self, args):
        folder = Path(args["model_repository"]) / args["model_version"]
        self._script = json.loads((folder / "script.json").read_text())
        self._stopped, self._lock = set(), threading.Lock()
        listener = channel.listen(channel.name_of(args["model_name"]))
        threading.Thread(target=self._listen, args=(listener,), daemon=True).start()
        parameters = json.loads(args["model_config"])["parameters"]
        engine = Path(args["model_repository"]).parent / parameters["gpt_model_path"]["string_value"]
        assert (engine / "rank0.engine").is_file(), engine

    def execute(self, requests):
        for request in requests:
            tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            self._begin(_Sender(request.get_response_sender()), request.request_id(), tensors)

    def _listen(self, listener):
        while True:
            connection, lock = channel.accept(listener), threading.Lock()
            threading.Thread(target=self._read, args=(connection, lock), daemon=True).start()

    def _read(self, connection, lock):
        while True:
            verb, request_id, *rest = connection.recv()
            tensors = {"stop": np.array([[True]])} if verb == "stop" else rest[0]
            self._begin(_Line(connection, lock, request_id), request_id, tensors)

    def _begin(self, sender, request_id, tensors):
        if np.any(tensors.get("stop", False)):
            self._stopped.add(request_id)
            self._write({"id": request_id, "stop": True})
            sender.end_of_stop()
            return
        threading.Thread(target=self._serve, args=(sender, request_id, tensors), daemon=True).start()

    def _serve(self, sender, request_id, tensors):
        try:
            self._check(tensors)
            self._answer(sender, request_id, tensors)
        except Exception as error:  # the client must hear of it
            sender.fail(f"stand-in: {type(error).__name__} {error}")

    def _check(self, tensors):
        for name, array in tensors.items():
            kind, dims, _need = self._script["inputs"][name]
            assert array.dtype == np.dtype({"FP32": "float32", "BOOL": "bool"}.get(kind, kind.lower())), name
            assert array.shape[0] == 1, name
            assert len(array.shape) == 1 + len(dims) or list(dims) == [1], (name, array.shape)
        draft = tensors.get("draft_input_ids")
        if draft is not None:
            assert 0 < draft.shape[1] <= self._script["longest_draft"], draft.shape
            assert tensors["request_output_len"].item() == draft.shape[1] + 1
            assert not np.any(tensors["streaming"])
        longest, length = self._script["max_seq_len"], tensors["input_lengths"].item()
        assert length == tensors["input_ids"].size
        assert length + tensors["request_output_len"].item() <= longest + (0 if draft is None else draft.shape[1])

    def _answer(self, sender, request_id, tensors):
        ids, most = tensors["input_ids"].reshape(-1).tolist(), tensors["request_output_len"].item()
        case = next(one for one in self._script["cases"] if ids[: len(one["prompt"])] == one["prompt"])
        place, draft = len(ids) - len(case["prompt"]), tensors.get("draft_input_ids", np.zeros(0)).reshape(-1).tolist()
        plain = {name: array.reshape(-1)[:8].tolist() for name, array in tensors.items()}
        self._write({"id": request_id, "place": place, "draft": draft, "asked": most, "tensors": plain})
        least = tensors.get("min_tokens", tensors.get("min_length", np.zeros(1))).item()
        streaming, said = np.any(tensors["streaming"]), []
        while len(said) < most:
            if case["slow"]:
                time.sleep(_PAUSE_S)
            if request_id in self._stopped:
                self._write({"id": request_id, "gone": True})
                sender.send(None, final=True)
                return
            token = self._token(case, place + len(said), ends=len(said) >= least)
            if token is None:
                break
            said.append(token)
            if streaming:
                sender.send([token], final=False)
            if draft and (len(said) > len(draft) or token != draft[len(said) - 1]):
                break
        sender.send([] if streaming else said, final=True)

    @staticmethod
    def _token(case, place, *, ends):
        """The token at a place of the answer; None at its end."""
        if place in case["wrong"]:
            return _WRONG
        if place < len(case["answer"]):
            return case["answer"][place]
        return None if ends else _WRONG

    def _write(self, line):
        with self._lock, Path(self._script["journal"]).open("a") as file:
            file.write(json.dumps(line) + "\n")


def _outputs(ids):
    return {
        "output_ids": np.array(ids, dtype=np.int32).reshape(1, 1, -1),
        "sequence_length": np.array([[len(ids)]], dtype=np.int32),
    }


class _Sender:
    """Answers through Triton."""

    def __init__(self, sender):
        self._sender = sender

    def send(self, ids, *, final):
        tensors = [] if ids is None else [pb_utils.Tensor(name, array) for name, array in _outputs(ids).items()]
        self._sender.send(pb_utils.InferenceResponse(tensors), flags=_FINAL if final else 0)

    def fail(self, text):
        self._sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(text)), flags=_FINAL)

    def end_of_stop(self):
        self.send(None, final=True)


class _Line:
    """Answers over the private line, as ``doors.LineDoor`` reads them."""

    def __init__(self, connection, lock, request_id):
        self._connection, self._lock, self._id = connection, lock, request_id

    def send(self, ids, *, final):
        with self._lock:
            self._connection.send(("tensors", self._id, _outputs(ids or []), final))

    def fail(self, text):
        with self._lock:
            self._connection.send(("failed", self._id, text, "INTERNAL"))

    def end_of_stop(self):
        pass
