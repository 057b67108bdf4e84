"""``scalellm bench`` as a person types it, against the real Triton with a small Llama: both of its doors, two loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.parrot import write_parrot
from toolchain.endpoint import Endpoint
from toolchain.measuring.prompts import Tokens, roleplay
from toolchain.progress import Silent
from toolchain.servers.triton.ports import free_ports
from toolchain.servers.triton.supervisor import ServingInfo
from toolchain.stages.serve import background

pytestmark = pytest.mark.timeout(300)
RECIPE = """
device: cpu
quantization: {weights: none}
kv_cache: {dtype: fp32, max_tokens: 2048}
limits: {max_batch_size: 4, max_seq_len: 512}
cpu: {threads: 1}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bench")
    write_parrot(made / "parrot")
    (made / "small.yaml").write_text(f"model: {made / 'parrot'}{RECIPE}")
    return made


@pytest.fixture(scope="module")
def served(folder: Path, root: Path) -> Iterator[ServingInfo]:
    argv = [sys.executable, "-m", "toolchain.cli", "build", "--recipe", "small.yaml", "--work", "work"]
    environ = os.environ | {"PYTHONPATH": str(root)}
    built = subprocess.run(argv, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    with background(folder / "work/small/repository", ports=free_ports(), progress=Silent(), server="bundled") as info:
        yield info


def bench(folder: Path, root: Path, *words: object) -> dict[str, Any]:
    argv = [sys.executable, "-m", "toolchain.cli", "bench", *map(str, words)]
    recipe = ["--recipe", "small.yaml", "--work", "work", "--out", "report.json", "--json"]
    environ = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(argv + recipe, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads((folder / "report.json").read_text()))


@pytest.mark.parametrize("door", ["triton-grpc", "triton-http"])
def test_bench_measures_the_real_triton(served: ServingInfo, folder: Path, root: Path, door: str) -> None:
    url = served.grpc_url if door == "triton-grpc" else served.http_url
    load = ["--lengths", "64,200", "--output-tokens", "16", "--concurrency", "1,3", "--requests", "6", "--warmup", "1"]
    report = bench(folder, root, "--door", door, "--url", url, "--ignore-eos", *load)
    runs = report["runs"]
    asked = [(run["conditions"]["input_tokens"], run["conditions"]["load"]["concurrency"]) for run in runs]
    assert asked == [(64, 1), (64, 3), (200, 1), (200, 3)]
    for run in runs:
        assert run["summary"]["succeeded"] == len(run["requests"]) == 6
        assert {one["server_output_tokens"] for one in run["requests"]} == {16}
        assert {one["input_tokens"] for one in run["requests"]} == {run["conditions"]["input_tokens"]}
        assert all(one["arrivals_s"][0] > one["scheduled_s"] for one in run["requests"])
    assert report["engine"]["backend"] == "openvino"
    assert report["recipe"] == (folder / "small.yaml").read_text()
    assert report["services"][0]["server"]["name"] == "triton"


def test_the_server_counts_as_many_tokens_in_our_prompts_as_we_claim(served: ServingInfo, folder: Path) -> None:
    count = Tokens.load(folder / "parrot").of_prompt
    door = Endpoint(served.http_url, served.grpc_url)
    for length in (33, 200):
        prompt = roleplay(count, length, 1, 2)[0].text
        chunks = list(door.generate(prompt, max_tokens=2, protocol="grpc", return_num_input_tokens=True))
        assert {chunk.outputs["num_input_tokens"] for chunk in chunks if chunk.outputs} == {length}


def test_what_the_server_refuses_is_counted(served: ServingInfo, folder: Path, root: Path) -> None:
    """Prompts that are longer than the engine takes, beside one that is not."""
    prompts = [json.dumps({"prompt": "The capital " * many, "max_tokens": 8}) for many in (1, 400, 1, 400)]
    (folder / "mixed.jsonl").write_text("\n".join(prompts))
    load = ["--prompts", "mixed.jsonl", "--warmup", "1", "--requests", "3", "--rate", "20"]
    run = bench(folder, root, "--url", served.grpc_url, *load)["runs"][0]
    assert run["summary"]["failed"] == 2
    assert sum(run["summary"]["errors"].values()) == 2
    assert any("2 of 3 requests failed" in flag for flag in run["flags"])
