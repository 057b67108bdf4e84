"""The same questions at every door of one real service; and the suite notices a door that answers otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from tests.e2e.served import Served
from tests.gateway.behind_gateway import TEMPLATE, gateway, settings_for
from tests.gateway.test_doors import until_ready
from toolchain.chat import ChatTemplate
from toolchain.measuring.conformance_doors import Door, Reply
from toolchain.stages.conformance import Beside, conformance

Run = Callable[..., "CompletedProcess[str]"]


def test_every_door_of_a_service_answers_alike(scalellm: Run, parrot: Path, served: Served, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": TEMPLATE}))
    asked = settings_for(parrot, served.http_port)
    asked = replace(asked, upstreams=(replace(asked.upstreams[0], status_file=served.status_file),))
    with gateway(asked) as door:
        until_ready(door)
        done = scalellm(
            "conformance", door.url, "--predict", door.predict_url, "--tokenizer", str(tmp_path),
            "--kserve-http", f"http://127.0.0.1:{served.http_port}",
            "--kserve-grpc", f"127.0.0.1:{served.grpc_port}", "--json",
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["doors"] == ["OpenAI", "/predict", "KServe HTTP", "KServe gRPC"]
    assert len(told["checks"]) >= 17
    assert all(check["passed"] for check in told["checks"]), told
    tried = {check["check"] for check in told["checks"] if not check["detail"].startswith("not tried")}
    assert {"cancelled streams free the KV cache", "a chat is what the model's template writes"} <= tried
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

    def begin(self, prompt: str, max_tokens: int, **sampling: object) -> None:
        pass


def test_a_door_that_differs_is_named() -> None:
    doors: list[Door] = [Canned("one", "Paris it is"), Canned("two", "London it is")]
    found = {finding.check: finding for finding in conformance(doors)}
    assert not found["the greedy answer is the same at every door"].passed
    assert "two: 'London it is'" in found["the greedy answer is the same at every door"].detail
    for check in ("an answer ends before a stop text", "max_tokens 0 is refused", "and ends by length"):
        assert not found[check].passed
    assert found["max_tokens 1 is one token"].passed


@pytest.mark.parametrize(
    ("looks", "passed"),
    [([[3], [3]], True), ([[0, 7], [0, 9], [0, 8]], False), ([[0, 0], [0, 4], [0, 0]], True), ([[5], None], True)],
)
def test_blocks_that_stay_in_use_after_cancelled_streams_are_found(looks: list[Any], passed: bool) -> None:
    seen = iter(looks)
    beside = Beside(kv_blocks=lambda: next(seen), freed_s=0.05 if not passed else 5)
    found = {finding.check: finding for finding in conformance([Canned("one", "Paris it is")], beside)}
    finding = found["cancelled streams free the KV cache"]
    assert finding.passed is passed, finding
    assert ("8] blocks" in finding.detail) is not passed


class CannedChat:
    """A chat that says what it is told, and how many tokens its prompt had."""

    model = "m"

    def __init__(self, text: str, prompt_tokens: int) -> None:
        self._text, self._prompt_tokens = text, prompt_tokens

    def post(self, body: dict[str, Any]) -> dict[str, Any]:
        return {
            "choices": [{"message": {"content": self._text}}],
            "usage": {"prompt_tokens": self._prompt_tokens},
        }


@pytest.mark.parametrize(
    ("text", "prompt_tokens", "passed"), [("Paris it is", 1, True), ("Paris it is", 2, False), ("Rome", 1, False)]
)
def test_a_chat_that_is_not_its_models_template_is_found(text: str, prompt_tokens: int, passed: bool) -> None:
    beside = Beside(chat=CannedChat(text, prompt_tokens), template=ChatTemplate(None))
    found = {finding.check: finding for finding in conformance([Canned("one", "Paris it is")], beside)}
    assert found["a chat is what the model's template writes"].passed is passed
