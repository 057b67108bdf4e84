"""The engine that Triton serves, without a server: token ids in, times of the tokens out. For `bench_doors.py`.

    python scripts/engine_alone.py ENGINE_FOLDER CODE_FOLDER PORT

It opens the engine as the repository's engine process does, with that one's own `pipeline.py` (in CODE_FOLDER), and
calls OpenVINO GenAI's pipeline directly: `add_request`, then `step` until all tokens are there. Times are of
`time.perf_counter()`, one clock for all processes of a Linux machine, taken here: before `add_request`, and after the
read of each step's tokens. Nothing is said until an answer is complete. Between requests it waits in a read, so that it
takes no CPU time. One request at a time; no text, no tokenizer.

In:  (ids, tokens to generate)      Out: (begin, [(time, ids of that step)])
"""

from __future__ import annotations

import json
import sys
import time
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

Answer = tuple[float, list[tuple[float, list[int]]]]


def opened(folder: Path, passport: dict[str, Any]) -> Any:
    """The pipeline, with the scheduler that the passport asks for."""
    from pipeline import open_pipeline  # of the repository, found through CODE_FOLDER

    scheduler = genai.SchedulerConfig()
    for name, value in {
        "max_num_seqs": passport["limits"]["max_batch_size"],
        **passport["runtime"]["scheduler"],
    }.items():
        setattr(scheduler, name, value)
    return open_pipeline(folder, passport, scheduler)


def generate(pipeline: Any, ids: list[int], count: int, ends: list[int]) -> Answer:
    """Greedy, exactly ``count`` tokens: end ids are forbidden until then, as the doors' ``min_tokens`` asks."""
    config = genai.GenerationConfig(max_new_tokens=count, min_new_tokens=count)
    config.eos_token_id, config.stop_token_ids = ends[0], set(ends)
    prompt = np.array([ids], dtype=np.int64)
    steps: list[tuple[float, list[int]]] = []
    begin = time.perf_counter()
    handle = pipeline.add_request(0, ov.Tensor(prompt), config)
    while pipeline.has_non_finished_requests():
        pipeline.step()
        while handle.can_read():
            made = [token for output in handle.read().values() for token in output.generated_ids]
            steps.append((time.perf_counter(), made))
    return begin, steps


def serve(connection: Connection, pipeline: Any, ends: list[int]) -> None:
    """Until the other side is gone."""
    while True:
        try:
            ids, count = connection.recv()
        except (EOFError, ConnectionError):
            return
        connection.send(generate(pipeline, ids, count, ends))


def main(argv: list[str]) -> None:
    folder, code, port = Path(argv[1]), argv[2], int(argv[3])
    sys.path.insert(0, code)
    passport = json.loads((folder / "engine.json").read_text(encoding="utf-8"))
    pipeline, ends = opened(folder, passport), list(passport["eos_token_ids"])
    generate(pipeline, [3] * 24, 4, ends)  # kernels are compiled before it can be asked
    with Listener(("127.0.0.1", port)) as listener:
        while True:
            with listener.accept() as connection:
                serve(connection, pipeline, ends)


if __name__ == "__main__":
    main(sys.argv)
