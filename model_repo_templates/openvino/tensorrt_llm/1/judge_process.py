"""Tries grammars on a model without meaning, in a process of its own.

    python judge_process.py SOCKET_FD FOLDER

OpenVINO GenAI compiles a grammar inside ``step``: there, an error leaves the request in the pipeline for good, and some
grammars take minutes. Here neither hurts anyone.

Messages in:  (kind, text, end ids)   of ``guides.guide``
Messages out: "ready" before each, then "" or why no answer can be held to it
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from multiprocessing.connection import Connection

import numpy as np
import openvino as ov
import openvino_genai as genai
from grammar import grammar

_PR_SET_PDEATHSIG = 1
"""linux/prctl.h: the signal that this process gets when its parent dies."""
_NOTHING = "no text can be an answer to it"


class Judge:
    """A pipeline that is thrown away after each failure."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._spoiled = True

    def prepare(self) -> None:
        if self._spoiled:
            self._pipeline = self._fresh()
            self._spoiled = False

    def verdict(self, kind: str, text: str, end_ids: list[int]) -> str:
        try:
            token = self._first_token(kind, text, end_ids)
        except Exception as error:
            self._spoiled = True
            return _reason(str(error))
        usable = token in end_ids or self._pipeline.get_tokenizer().decode([token])
        return "" if usable else _NOTHING

    def _first_token(self, kind: str, text: str, end_ids: list[int]) -> int:
        config = genai.GenerationConfig()
        config.max_new_tokens = 1
        config.eos_token_id, config.stop_token_ids = end_ids[0], set(end_ids)
        config.structured_output_config = grammar(kind, text)
        handle = self._pipeline.add_request(0, ov.Tensor(np.zeros((1, 1), np.int64)), config)
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        (output,) = handle.read_all()
        return int(output.generated_ids[0])

    def _fresh(self) -> genai.ContinuousBatchingPipeline:
        scheduler = genai.SchedulerConfig()
        scheduler.num_kv_blocks = 2
        scheduler.enable_prefix_caching = False
        return genai.ContinuousBatchingPipeline(self._folder, scheduler, "CPU", {"INFERENCE_NUM_THREADS": 1})


def _reason(text: str) -> str:
    """The compiler's own words: the last line that has some, without the place in its source."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["the compiler of grammars failed"]
    return lines[-1].rpartition("/cpp/")[2].partition(": ")[2][:300] or lines[-1][:300]


def main(argv: list[str]) -> None:
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    connection = Connection(int(argv[1]))
    judge = Judge(argv[2])
    try:
        while True:
            judge.prepare()
            connection.send("ready")
            connection.send(judge.verdict(*connection.recv()))
    except (EOFError, ConnectionError):
        return


if __name__ == "__main__":
    main(sys.argv)
