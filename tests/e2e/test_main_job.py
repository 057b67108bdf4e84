"""README's first command, whole: ``make demo`` with a small Llama that speaks, a real Triton, HTTP and gRPC."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import unused_ports


def demo(root: Path, place: Path, ports: list[int]) -> str:
    """Run the demo as the Makefile does, in a place of its own; its output."""
    argv = [sys.executable, "scripts/demo.py", "--model", place / "tiny-llama", "--work", place / "work",
            "--http-port", ports[0], "--grpc-port", ports[1], "--metrics-port", ports[2]]  # fmt: skip
    done = subprocess.run(
        [str(word) for word in argv], cwd=root, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def first(root: Path, place: Path) -> str:
    return demo(root, place, unused_ports(3))


@pytest.mark.timeout(900)
def test_the_demo_answers_over_http_and_grpc_streaming(first):
    answers = re.split(r"^\$ scalellm infer .*$", first, flags=re.MULTILINE)[1:]
    assert len(answers) == 2
    over_http, over_grpc = (answer.strip().split("\n[")[0] for answer in answers)
    assert len(over_http.split()) >= 3, first
    assert over_http == over_grpc.split("\nWhere everything lies")[0]
    assert re.search(r"\[grpc, streamed: first token after \d", first)


def test_the_small_llama_really_speaks(place, first):
    training = json.loads((place / "tiny-llama" / "training.json").read_text())
    assert training["held_out_perplexity"] * 5 < training["uniform_perplexity"]


@pytest.mark.timeout(900)
def test_a_second_demo_rebuilds_nothing_and_says_so(root, place, first, free_ports):
    second = demo(root, place, free_ports)
    assert "Nothing to do: everything is up to date." in second
    assert "made in" not in second


def test_readme_names_the_commands_that_the_tests_run(root):
    readme = (root / "README.md").read_text()
    makefile = (root / "Makefile").read_text()
    for command in re.findall(r"^\s*make (\w+)", readme, flags=re.MULTILINE):
        assert re.search(rf"^{command}:", makefile, flags=re.MULTILINE), command
    assert "make demo" in readme
    assert "make test" in readme
    assert "scripts/demo.py" in makefile
