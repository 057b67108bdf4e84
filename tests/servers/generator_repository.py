"""A Triton repository without an engine: ``tensorrt_llm_bls`` as a Python generator of tokens, and ways to break it.

What the model does is said by the prompt; see ``MODEL``. It answers through the real Python backend of a real Triton.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil

CONFIG = """
name: "%(name)s"
backend: "python"
max_batch_size: %(max_batch_size)d
model_transaction_policy { decoupled: true }
input [
  { name: "text_input" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "max_tokens" data_type: TYPE_INT32 dims: [ 1 ] },
  { name: "stream" data_type: TYPE_BOOL dims: [ 1 ] optional: true },
  { name: "temperature" data_type: TYPE_FP32 dims: [ 1 ] optional: true },
  { name: "top_k" data_type: TYPE_INT32 dims: [ 1 ] optional: true },
  { name: "seed" data_type: TYPE_UINT64 dims: [ 1 ] optional: true },
  { name: "stop_words" data_type: TYPE_STRING dims: [ -1 ] optional: true }
]
output [
  { name: "text_output" data_type: TYPE_STRING dims: [ -1 ] },
  { name: "num_output_tokens" data_type: TYPE_INT32 dims: [ 1 ] }
]
instance_group [ { kind: KIND_CPU count: 1 } ]
"""

MODEL = """
import json, os, threading, time
from pathlib import Path
import numpy as np
import triton_python_backend_utils as pb

INPUTS = ("text_input", "max_tokens", "stream", "temperature", "top_k", "seed", "stop_words")

def received(request):
    found = {}
    for name in INPUTS:
        tensor = pb.get_input_tensor_by_name(request, name)
        if tensor is not None:
            found[name] = [v.decode() if isinstance(v, bytes) else v.item() for v in tensor.as_numpy().ravel()]
    return found

def tokens(given, sender):
    verb, _, rest = given["text_input"][0].partition(" ")
    if verb == "echo":
        yield json.dumps(given)
        return
    if verb == "fail":
        raise ValueError(rest)
    if verb == "die":
        os._exit(9)
    if verb == "stall":
        yield " t0"
        time.sleep(600)
    pause = 0.02 if verb == "slowly" else 0.0
    for i in range(given["max_tokens"][0]):
        if verb == "cancel" and sender.is_cancelled():
            Path(rest).touch()
            return
        yield f" t{i}"
        time.sleep(0.02 if verb == "cancel" else pause)

class TritonPythonModel:
    def initialize(self, args):
        self.hung = False
        exec(INITIALIZE)

    def execute(self, requests):
        for request in requests:
            if received(request)["text_input"] == ["explode"]:
                raise RuntimeError("the engine is gone")
            threading.Thread(target=self.answer, args=(request.get_response_sender(), received(request))).start()

    def answer(self, sender, given):
        if given["text_input"][0] == "hang":
            self.hung = True
        while self.hung:
            time.sleep(1)
        try:
            stream, count = given.get("stream", [False])[0], 0
            pieces = []
            for piece in tokens(given, sender):
                count += 1
                pieces.append(piece)
                if stream:
                    sender.send(self.response(piece, count))
            if not stream:
                sender.send(self.response("".join(pieces), count))
        except ValueError as error:
            sender.send(pb.InferenceResponse(error=pb.TritonError(str(error), pb.TritonError.INVALID_ARG)))
        sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def response(self, text, count):
        shape = (1, 1) if BATCHED else (1,)
        return pb.InferenceResponse([
            pb.Tensor("text_output", np.array([text.encode()], dtype=object).reshape(shape)),
            pb.Tensor("num_output_tokens", np.array([count], dtype=np.int32).reshape(shape)),
        ])
"""


def write_repository(
    folder: Path, *, name: str = "tensorrt_llm_bls", initialize: str = "", max_batch_size: int = 0
) -> Path:
    """``initialize`` is Python that the model runs while it is loaded."""
    version = folder / name / "1"
    version.mkdir(parents=True)
    values = {"name": name, "max_batch_size": max_batch_size}
    (folder / name / "config.pbtxt").write_text(CONFIG % values)
    (version / "model.py").write_text(f"INITIALIZE = {initialize!r}\nBATCHED = {max_batch_size > 0}\n{MODEL}")
    return folder


def processes_of(repository: Path) -> list[psutil.Process]:
    """The living processes with the repository on their command line: server, stubs, and whoever started them."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(repository) in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def stub_of(repository: Path) -> psutil.Process:
    """The one process that runs the model's Python."""
    (stub,) = [one for one in processes_of(repository) if "triton_python_backend_stub" in one.cmdline()[0]]
    return stub


def server_of(repository: Path) -> psutil.Process:
    """The one tritonserver."""
    (server,) = [one for one in processes_of(repository) if one.cmdline()[0].endswith("tritonserver")]
    return server


def shared_memory_of(pid: int) -> list[Path]:
    """The shared memory regions of the server that a supervisor in process ``pid`` started."""
    return list(Path("/dev/shm").glob(f"scalellm-{pid}-*"))


def wait_for(condition: Callable[[], object], deadline_s: float = 30.0) -> None:
    """Waits until the condition is true, and fails when that takes too long."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
