"""Promises about the page's files and about ``/status``, without a browser."""

from __future__ import annotations

import http.client
import json
import re
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import unused_ports
from tests.e2e.served import Served
from tests.gateway.behind_gateway import Gateway, gateway, settings_for
from tests.gateway.test_doors import post, status, until_ready
from toolchain.gateway import keys, page
from toolchain.gateway.settings import Settings


@pytest.fixture(scope="module")
def asked(parrot: Path, served: Served) -> Settings:
    return settings_for(parrot, served.http_port)


@pytest.fixture(scope="module")
def door(asked: Settings) -> Iterator[Gateway]:
    with gateway(asked) as found:
        until_ready(found)
        yield found


def fetch(door: Gateway, path: str, method: str = "GET", **headers: str) -> tuple[int, Any, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", door.listen.port, timeout=20)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, response.headers, body


def state(door: Gateway) -> Any:
    with urllib.request.urlopen(f"{door.root}/status") as answer:
        return json.load(answer)


def paths() -> list[str]:
    return ["/", *(f"/page/{name}" for name in page.FILES if name != page.INDEX)]


def test_every_file_of_the_page_is_listed_and_ships() -> None:
    folder = Path(page.__file__).parent
    assert {file.name for file in folder.iterdir() if file.is_file() and file.suffix != ".py"} == set(page.FILES)


def test_every_file_comes_with_its_type_and_a_policy_that_lets_no_one_else_in(door: Gateway) -> None:
    types = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", "": "text/html"}
    for path in paths():
        code, headers, body = fetch(door, path)
        assert code == 200
        assert body
        assert headers["Content-Type"].startswith(types[Path(path).suffix])
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
        assert "http" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"


def test_no_file_of_the_page_names_another_server_or_holds_a_script_of_its_own() -> None:
    folder = Path(page.__file__).parent
    for name in page.FILES:
        text = (folder / name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(
            r"https?://|\burl\(|@import|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text
        )
    index = (folder / page.INDEX).read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=)", index)
    assert set(re.findall(r'(?:src|href)="(page/[^"]+)"', index)) <= {path.lstrip("/") for path in paths()}


def test_a_file_that_is_known_is_not_sent_again(door: Gateway) -> None:
    for path in paths():
        _code, headers, body = fetch(door, path)
        assert headers["Cache-Control"] == "no-cache"
        code, again, nothing = fetch(door, path, If_None_Match=f'"other", W/{headers["ETag"]}')
        assert (code, nothing, again["ETag"]) == (304, b"", headers["ETag"])
        assert fetch(door, path, If_None_Match='"other"')[::2] == (200, body)
        code, head, nothing = fetch(door, path, method="HEAD")
        assert (code, nothing, head["Content-Length"]) == (200, b"", str(len(body)))


@pytest.mark.parametrize(
    "path",
    ["/page/", "/page/__init__.py", "/page/../page.css", "/page/%2e%2e/app.py", "/page//etc/passwd", "/page/index.html",
     "/page/page.css/", "/page/..%2fapp.py", "//page/page.css", "/page/page.css%00"],
)  # fmt: skip
def test_no_other_path_gives_a_file(door: Gateway, path: str) -> None:
    code, _headers, body = fetch(door, path)
    assert code in (404, 405, 307)
    assert code == 307 or json.loads(body)["error"]["message"]


def test_the_page_can_be_left_out(asked: Settings) -> None:
    with gateway(replace(asked, page=False)) as bare:
        assert status(f"{bare.root}/") == 404
        assert status(f"{bare.root}/page/main.js") == 404
        assert status(f"{bare.root}/status") == 200


def test_the_schema_has_the_status_and_not_the_page(door: Gateway) -> None:
    with urllib.request.urlopen(f"{door.root}/openapi.json") as answer:
        schema = json.load(answer)
    assert {"/status", "/v1/chat/completions", "/metrics"} <= schema["paths"].keys()
    assert not [path for path in schema["paths"] if path == "/" or path.startswith("/page")]
    told = schema["components"]["schemas"]["Status"]
    assert set(told["required"]) == state(door).keys()


def test_the_status_counts_what_was_asked_and_agrees_with_the_metrics(asked: Settings) -> None:
    with gateway(asked) as door:
        until_ready(door)
        before = state(door)
        assert before["ready"] is True
        assert before["last_minute"]["requests"] == 0
        assert before["last_minute"]["ttft_ms_p50"] is None
        body = {"model": "parrot", "prompt": "Count with me: one", "max_tokens": 8, "temperature": 0, "min_tokens": 8}
        for _time in range(3):
            assert post(f"{door.url}/completions", json.dumps({**body, "stream": True}).encode())[0] == 200
        post(f"{door.url}/completions", b"no JSON")
        after = state(door)
        seen = after["last_minute"]
        assert (seen["requests"], seen["failed"]) == (4, 0)
        assert seen["ttft_ms_p50"] > 0
        assert seen["itl_ms_p90"] >= seen["itl_ms_p50"] > 0
        assert sum(after["series"]["tokens_per_s"]) * after["series"]["step_s"] == pytest.approx(24)
        with urllib.request.urlopen(f"{door.root}/metrics") as metrics:
            lines = metrics.read().decode().splitlines()
        assert "scalellm_gateway_completion_tokens_total 24.0" in lines
        assert "Count with me" not in json.dumps(after)


def test_a_look_at_the_status_takes_nothing_of_a_keys_rate(asked: Settings, tmp_path: Path) -> None:
    secret = keys.add(tmp_path / "keys.json", "alice", requests_per_minute=2)
    bearer = f"Bearer {secret}"
    with gateway(replace(asked, keys=tmp_path / "keys.json")) as door:
        until_ready(door)
        assert fetch(door, "/status")[0] == 401
        assert fetch(door, "/status", Authorization="Bearer sk-wrong")[0] == 401
        assert {fetch(door, "/status", Authorization=bearer)[0] for _time in range(10)} == {200}
        models = [fetch(door, "/v1/models", Authorization=bearer)[0] for _time in range(3)]
        assert models == [200, 200, 429]


def test_a_replica_that_is_down_is_told_with_the_reason(asked: Settings) -> None:
    (nobody,) = unused_ports(1)
    dead = replace(asked.upstreams[0], http_url=f"http://127.0.0.1:{nobody}")
    with gateway(replace(asked, upstreams=(*asked.upstreams, dead))) as door:
        until_ready(door)
        alive, lost = state(door)["replicas"]
        assert (alive["ready"], alive["why_down"], alive["restarts"]) == (True, None, 0)
        assert (lost["ready"], lost["name"], lost["kv_blocks"]) == (False, f"127.0.0.1:{nobody}", None)
        assert lost["why_down"]
        assert state(door)["engine"] is None
