"""A model's whole life on the real Triton: create, package, push, delete, pull elsewhere, deploy, ask, stop."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.conftest import unused_ports
from tests.e2e.parrot import RECIPE, SENTENCES, write_parrot
from tests.servers.generator_repository import processes_of
from toolchain import workspace

pytestmark = pytest.mark.timeout(600)
PROMPT, REST = SENTENCES[0][:24], SENTENCES[0][24:]
Verb = Callable[..., Any]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("life")


@pytest.fixture(scope="module")
def at_home(scalellm: Callable[..., subprocess.CompletedProcess[str]], places: Path) -> Callable[[str], Verb]:
    """``at_home("home2")("list")`` -> what ``scalellm model list --json`` prints there."""

    def home(name: str) -> Verb:
        def verb(*words: object) -> Any:
            done = scalellm("model", *words, "--home", places / name, "--json", timeout=300)
            assert done.returncode == 0, done.stdout + done.stderr
            return json.loads(done.stdout)

        return verb

    return home


@pytest.fixture(scope="module")
def there(at_home: Callable[[str], Verb], places: Path) -> Iterator[tuple[Verb, dict[str, Any]]]:
    """The model, pulled into another home and deployed there; the first home has no model any more."""
    here, there = at_home("home1"), at_home("home2")
    (places / "small.yaml").write_text(RECIPE)
    here("create", "-n", "parrot", "-m", write_parrot(places / "model"), "-r", places / "small.yaml")
    digest = here("package", "parrot")["digest"]
    here("push", "parrot", "--registry", places / "registry")
    here("delete", "parrot", "--artifacts", "--yes")
    assert there("pull", "-n", "parrot", "--registry", places / "registry")["digest"] == digest
    try:
        deployed = there("deploy", "parrot", "--local", "--detach", "--port", unused_ports(1)[0])
        yield there, deployed
    finally:
        there("undeploy", "parrot")
    assert processes_of(places / "home2" / "models" / "parrot" / "repository") == []


def test_predict_answers_curl_as_the_blogs_users_know_it(there: tuple[Verb, dict[str, Any]]) -> None:
    _, deployed = there
    body = json.dumps({"text": PROMPT, "temperature": 0})
    done = subprocess.run(["curl", "-s", deployed["predict"], "-d", body], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"generated_text": REST}
    with urllib.request.urlopen(deployed["predict"].replace("/predict", "/ready")) as answer:
        assert (answer.status, json.load(answer)) == (200, {"status": "Success"})


def test_the_openai_client_is_answered_at_the_same_port(there: tuple[Verb, dict[str, Any]]) -> None:
    _, deployed = there
    assert deployed["openai"] == deployed["predict"].replace("/predict", "/v1")
    with urllib.request.urlopen(deployed["predict"].removesuffix("predict")) as page:
        assert page.headers["content-type"].startswith("text/html")
    client = openai.OpenAI(base_url=deployed["openai"], api_key="none is asked for")
    assert [one.id for one in client.models.list()] == ["parrot"]
    assert client.completions.create(model="parrot", prompt=PROMPT, temperature=0).choices[0].text == REST


def test_run_asks_it_and_delete_and_pull_and_deploy_refuse_meanwhile(
    there: tuple[Verb, dict[str, Any]], scalellm: Callable[..., subprocess.CompletedProcess[str]], places: Path
) -> None:
    verb, deployed = there
    assert verb("run", "-n", "parrot", PROMPT, "--temperature", 0)["text"] == REST
    assert verb("run", "-n", "parrot", PROMPT, "--temperature", 0, "--max-tokens", 3)["text"] != REST
    listed = verb("list")
    assert [(one["state"], one["deployed"]["pid"]) for one in listed] == [("deployed", deployed["pid"])]
    home, registry = ["--home", places / "home2"], ["--registry", places / "registry"]
    for words in (("delete", "parrot", "--yes"), ("deploy", "parrot", "--local"), ("pull", "-n", "parrot", *registry)):
        done = scalellm("model", *words, *home)
        assert done.returncode == 5
        assert f"parrot is deployed (pid {deployed['pid']})" in done.stderr
        assert "scalellm model undeploy" in done.stderr


def test_what_was_pulled_was_served_as_it_came(there: tuple[Verb, dict[str, Any]], places: Path) -> None:
    repository = places / "home2" / "models" / "parrot" / "repository"
    stamp = workspace.read_stamp(repository)
    assert stamp is not None
    assert workspace.damage(repository, stamp) is None
    assert not (places / "home1" / "work" / "parrot").exists()
