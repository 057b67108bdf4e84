"""``services: 2`` on a CPU, as a person would: build, serve, ask both, lose one, stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.parrot import SENTENCES, write_parrot
from tests.servers.generator_repository import processes_of, wait_for
from tests.stages.test_serve_services import ports_for
from toolchain.endpoint import Endpoint
from toolchain.repository import Repository

pytestmark = pytest.mark.timeout(300)
RECIPE = """
device: cpu
services: 2
quantization: {weights: none}
kv_cache: {dtype: fp32, max_tokens: 512}
limits: {max_batch_size: 2, max_seq_len: 128}
"""
SENTENCE = SENTENCES[0]
PROMPT, REST = SENTENCE[:24], SENTENCE[24:]


def scalellm(*words: object) -> list[str]:
    return [sys.executable, "-m", "toolchain.cli", *map(str, words)]


def documents(process: subprocess.Popen[str], count: int) -> list[dict[str, Any]]:
    """The next JSON objects of its output, which follow one another."""
    assert process.stdout is not None
    found, text = [], ""
    while len(found) < count:
        line = process.stdout.readline()
        assert line, text
        text += line
        if line.startswith("}"):
            found.append(json.loads(text))
            text = ""
    return found


def test_two_services_answer_and_a_crash_takes_one(tmp_path: Path) -> None:
    model, recipe, work = write_parrot(tmp_path / "parrot"), tmp_path / "pair.yaml", tmp_path / "work"
    recipe.write_text(f"model: {model}{RECIPE}")
    built = subprocess.run(
        scalellm("build", "--recipe", recipe, "--work", work), capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    repository = work / "pair" / "repository"
    assert Repository.open(repository).services == 2
    assert 'key: "services" value { string_value: "2" }' in (repository / "tensorrt_llm/config.pbtxt").read_text()
    ports = ports_for(2)
    where = [f"--{name}-port={port}" for name, port in ports.named().items()]
    argv = scalellm("serve", "--recipe", recipe, "--work", work, "--json", *where)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            infos = documents(process, 2)
            assert [info["service"] for info in infos] == ["1 of 2", "2 of 2"]
            assert infos[1]["http_url"] == f"http://127.0.0.1:{ports.http + 10}"
            doors = [Endpoint(info["http_url"], info["grpc_url"]) for info in infos]
            assert [said(door) for door in doors] == [REST, REST]
            os.killpg(infos[0]["pid"], signal.SIGKILL)
            assert said(doors[1]) == REST
            wait_for(lambda: answers(doors[0]))
            assert psutil.pid_exists(infos[1]["pid"])
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert processes_of(repository) == []


def said(door: Endpoint) -> str:
    return "".join(chunk.text for chunk in door.generate(PROMPT, max_tokens=60, protocol="grpc"))


def answers(door: Endpoint) -> bool:
    """Not before the server is there again."""
    return door.ready() and said(door) == REST
