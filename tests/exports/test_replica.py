"""What an exported pod runs, run here: its init container's script, then its server's command, with a real Triton.

Only the places differ: /scalellm, the registry's mount and the Secret are folders of the test, and the ports are free.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from click.testing import CliRunner

from tests.conftest import SCALELLM, unused_ports
from tests.e2e.parrot import RECIPE, SENTENCES, write_parrot
from tests.fleet.endpoint import until
from toolchain.cli import verbs

pytestmark = pytest.mark.timeout(600)
DEPLOYMENT = "endpoint: birds\nrecipes: [RECIPE]\nreplicas: {min: 1}\nmax_queue: 5\n"
PROMPT, REST = SENTENCES[0][:24], SENTENCES[0][24:]


@pytest.fixture(scope="module")
def pod(
    scalellm: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, str]]:
    """The manifest's pod, and where its places are on this machine."""
    work = tmp_path_factory.mktemp("pod")
    (work / "small.yaml").write_text(RECIPE)

    def run(*words: object) -> None:
        done = scalellm(*words, timeout=300, SCALELLM_HOME=str(work / "home"))
        assert done.returncode == 0, done.stdout + done.stderr

    run("model", "create", "-n", "parrot", "-m", write_parrot(work / "model"), "-r", work / "small.yaml")
    run("model", "package", "parrot")
    run("model", "push", "parrot", "--registry", work / "registry")
    recipe = work / "home" / "models" / "parrot" / "recipe.yaml"
    (work / "DEPLOYMENT.yaml").write_text(DEPLOYMENT.replace("RECIPE", str(recipe)))
    where = ["-o", work / "out", "--registry", work / "registry", "--claim", "models", "--image", "mine:1"]
    run("deploy", "export", "kubernetes", work / "DEPLOYMENT.yaml", *where, "--install", "none")
    (work / "recipes").mkdir()
    for name, text in yaml.safe_load((work / "out" / "recipes.yaml").read_text())["data"].items():
        (work / "recipes" / name).write_text(text)
    found = yaml.safe_load((work / "out" / "deployment-cpu.yaml").read_text())["spec"]["template"]["spec"]
    places = {
        "/scalellm": str(work / "scalellm"),
        "/registry": str(work / "registry"),
        "/etc/scalellm/recipes": str(work / "recipes"),
        "/etc/scalellm/keys": str(work / "keys"),
    }
    return found, places


def here(words: list[str], places: dict[str, str]) -> list[str]:
    """A command line of the pod with the places of this machine; the longest first, since they lie in each other."""
    found = []
    for word in words:
        for path in sorted(places, key=len, reverse=True):
            at_start = word == path or word.startswith(f"{path}/")
            word = places[path] + word[len(path) :] if at_start else word.replace(f" {path}", f" {places[path]}")
        found.append(word)
    return found


@pytest.fixture(scope="module")
def replica(pod: tuple[dict[str, Any], dict[str, str]]) -> Iterator[tuple[str, str, subprocess.Popen[str]]]:
    """(address of the gateway, a key, the process)"""
    spec, places = pod
    env = {**os.environ, "PATH": f"{SCALELLM.parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    pull = here(spec["initContainers"][0]["command"], places)
    done = subprocess.run(pull, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    keys = ["gateway", "keys", "add", "me", "--keys", f"{places['/etc/scalellm/keys']}/gateway-keys.json", "--json"]
    key = json.loads(CliRunner().invoke(verbs, keys, standalone_mode=False).stdout)["key"]
    argv = here(spec["containers"][0]["command"], places)
    flags = ("--http-port", "--grpc-port", "--metrics-port", "--gateway-port", "--predict-port")
    ports = dict(zip(flags, unused_ports(len(flags)), strict=True))
    for flag, port in ports.items():
        argv[argv.index(flag) + 1] = str(port)
    argv[argv.index("--host") + 1] = "127.0.0.1"  # a test opens no port to other machines
    log = Path(places["/scalellm"]) / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen(argv, env=env, stdout=out, stderr=subprocess.STDOUT, text=True, cwd=log.parent)
    root = f"http://127.0.0.1:{ports['--gateway-port']}"
    try:
        until(lambda: process.poll() is not None or probe(root, "/ready") == 200, timeout_s=240)
        assert process.poll() is None, log.read_text()
        yield root, key, process
    finally:
        process.kill()
        process.wait()


def probe(root: str, path: str) -> int:
    """What the kubelet's httpGet sees; 0 where nobody listens yet."""
    try:
        with urllib.request.urlopen(root + path, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def test_an_exported_replica_pulls_its_engine_and_answers_by_the_endpoints_name(
    pod: tuple[dict[str, Any], dict[str, str]], replica: tuple[str, str, subprocess.Popen[str]]
) -> None:
    root, key, _ = replica
    server = pod[0]["containers"][0]
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert probe(root, server[name]["httpGet"]["path"]) == 200
    client = openai.OpenAI(base_url=f"{root}/v1", api_key=key)
    assert [one.id for one in client.models.list()] == ["birds"]
    assert client.completions.create(model="birds", prompt=PROMPT, temperature=0).choices[0].text == REST
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{root}/v1", api_key="none", max_retries=0).models.list()
    assert probe(root, "/metrics") == 401
    request = urllib.request.Request(f"{root}/status", headers={"Authorization": f"Bearer {key}"})
    with urllib.request.urlopen(request) as answer:
        assert json.load(answer)["max_queue"] == 5


def test_an_exported_replica_ends_in_time_when_it_is_told_to(
    pod: tuple[dict[str, Any], dict[str, str]], replica: tuple[str, str, subprocess.Popen[str]]
) -> None:
    _, _, process = replica
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=pod[0]["terminationGracePeriodSeconds"]) == 0
