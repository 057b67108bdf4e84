"""The same questions at every door of one real service; and the suite notices a door that answers otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

from tests.e2e.served import Served
from tests.gateway.behind_gateway import gateway, settings_for
from tests.gateway.test_doors import until_ready
from toolchain.stages.conformance import Door, Reply, conformance

Run = Callable[..., "CompletedProcess[str]"]


def test_every_door_of_a_service_answers_alike(scalellm: Run, parrot: Path, served: Served) -> None:
    with gateway(settings_for(parrot, served.http_port)) as door:
        until_ready(door)
        done = scalellm(
            "conformance", door.url, "--predict", door.predict_url,
            "--kserve-http", f"http://127.0.0.1:{served.http_port}",
            "--kserve-grpc", f"127.0.0.1:{served.grpc_port}", "--json",
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["doors"] == ["OpenAI", "/predict", "KServe HTTP", "KServe gRPC"]
    assert len(told["checks"]) >= 13
    assert all(check["passed"] for check in told["checks"]), told
    served.idle()


def test_nobody_there_is_told(scalellm: Run) -> None:
    done = scalellm("conformance", "http://127.0.0.1:1/v1")
    assert done.returncode == 6
    assert "lists no model" in done.stderr


class Canned:
    """A door that says what it is told, and never refuses."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self._text = name, text

    def ask(self, prompt: str, max_tokens: int, *, stream: bool, **sampling: object) -> Reply:
        return Reply((self._text,), "stop", 1, 1)

    def begin(self, prompt: str, max_tokens: int) -> None:
        pass


def test_a_door_that_differs_is_named() -> None:
    doors: list[Door] = [Canned("one", "Paris it is"), Canned("two", "London it is")]
    found = {finding.check: finding for finding in conformance(doors)}
    assert not found["the greedy answer is the same at every door"].passed
    assert "two: 'London it is'" in found["the greedy answer is the same at every door"].detail
    for check in ("an answer ends before a stop text", "max_tokens 0 is refused", "and ends by length"):
        assert not found[check].passed
    assert found["max_tokens 1 is one token"].passed
