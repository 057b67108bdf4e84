"""``scalellm endpoint`` as a person meets it, with processes that hold an endpoint's folder in place of endpoints."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from tests.conftest import ROOT
from toolchain.cli import verbs
from toolchain.errors import EndpointError

HOLDER = """
import json, sys, time
from pathlib import Path
from toolchain.running import Place
folder = Path(sys.argv[1])
folder.mkdir(parents=True)
with Place(folder).hold(RuntimeError) as record:
    record(json.loads(sys.argv[2]))
    print("held", flush=True)
    time.sleep(60)
"""
Verb = Callable[..., Any]


@pytest.fixture
def verb(tmp_path: Path) -> Verb:
    """``verb("list")`` -> what ``scalellm endpoint list --json`` prints; its errors are raised."""

    def run(*words: object, text: bool = False, **more: Any) -> Any:
        places = ["--home", str(tmp_path / "home"), "--work", str(tmp_path / "work")]
        argv = ["endpoint", *map(str, words), *([] if "--help" in words else places), *([] if text else ["--json"])]
        done = CliRunner().invoke(verbs, argv, standalone_mode=False, **more)
        if done.exception:
            raise done.exception
        return done.output if text else json.loads(done.stdout)

    return run


@contextmanager
def holder(folder: Path, **state: Any) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-c", HOLDER, str(folder), json.dumps(state)]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


class Predict(BaseHTTPRequestHandler):
    """Says what it was asked."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        told = json.dumps({"generated_text": f"{asked['text']} {asked['max_tokens']} {self.headers['Authorization']}"})
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(told.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def predict() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Predict)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/predict"
    server.shutdown()
    thread.join()
    server.server_close()


def test_where_nothing_runs_that_is_said(verb: Verb) -> None:
    assert verb("list") == []
    assert "No endpoint runs here." in verb("list", text=True)
    for words in (("run", "a", "Hello"), ("delete", "a", "--yes")):
        with pytest.raises(EndpointError, match="no endpoint a runs on this machine") as caught:
            verb(*words)
        assert "scalellm endpoint list" in str(caught.value.hint)


@pytest.mark.parametrize("root", ["home", "work"])
def test_an_endpoint_is_listed_asked_and_ended(verb: Verb, tmp_path: Path, predict: str, root: str) -> None:
    replicas = [{"replica": 1, "state": "ready"}, {"replica": 2, "state": "starting"}]
    state = {"endpoint": "a", "state": "running", "replicas": replicas, "doors": {"/predict": predict}}
    with holder(tmp_path / root / "endpoints" / "a", **state) as process:
        (found,) = verb("list")
        assert (found["name"], found["state"], found["pid"], found["kind"]) == ("a", "running", process.pid, "replicas")
        assert "1 of 2 ready" in verb("list", text=True)
        said = verb("run", "a", "Hello", "--max-tokens", 7, "--key", "secret")
        assert (said["name"], said["text"]) == ("a", "Hello 7 Bearer secret")
        with pytest.raises(click.UsageError, match="--yes"):
            verb("delete", "a")
        assert verb("delete", "a", "--yes")["deleted"] == "a"
        assert process.wait(10) != 0
    assert verb("list") == []


def test_an_endpoint_that_is_not_open_yet_cannot_be_asked(verb: Verb, tmp_path: Path) -> None:
    with holder(tmp_path / "work/endpoints/a", state="starting"), pytest.raises(EndpointError, match="not open yet"):
        verb("run", "a", "Hello")


def test_two_endpoints_of_one_name_are_told_apart_by_their_folders(verb: Verb, tmp_path: Path) -> None:
    with (
        holder(tmp_path / "work/endpoints/a"),
        holder(tmp_path / "home/endpoints/a"),
        pytest.raises(EndpointError, match=r"there are 2 endpoints named a: .*home.*work"),
    ):
        verb("delete", "a", "--yes")


@pytest.mark.parametrize("name", ["list", "run", "delete"])
def test_every_verb_has_help_with_an_example(verb: Verb, name: str) -> None:
    assert f"scalellm endpoint {name}" in verb(name, "--help", text=True).split("Example")[1]
