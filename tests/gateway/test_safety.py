"""The gateway under bad clients and bad servers: keys, limits, TLS, slowness, a Triton that dies."""

from __future__ import annotations

import datetime
import http.client
import ipaddress
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.conftest import SCALELLM, unused_ports
from tests.e2e.served import Served
from tests.e2e.test_triton_models import CAPITAL, Reference, make_engine
from tests.gateway.behind_gateway import QUICK, Gateway, gateway, settings_for
from tests.gateway.test_doors import COUNT, LONG, post, status, until_ready
from toolchain import workspace
from toolchain.gateway import keys
from toolchain.gateway.protocol import Patient
from toolchain.gateway.settings import Limits, Settings
from toolchain.progress import Silent
from toolchain.servers.triton.command import Ports
from toolchain.servers.triton.ports import free_ports
from toolchain.stages import serve
from toolchain.stages.package import package

pytestmark = pytest.mark.timeout(180)
COMPLETION = {"model": "parrot", "prompt": CAPITAL, "max_tokens": 60, "temperature": 0}


@contextmanager
def door_to(asked: Settings, **listen: Any) -> Iterator[Gateway]:
    with gateway(asked, **listen) as found:
        if not found.listen.cert:
            until_ready(found)
        yield found


@pytest.fixture
def asked(parrot: Path, served: Served) -> Settings:
    return settings_for(parrot, served.http_port)


def connection(door: Gateway) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", door.listen.port, timeout=60)


def error_of(response: http.client.HTTPResponse) -> dict[str, Any]:
    return dict(json.loads(response.read())["error"])


def test_every_door_but_health_asks_for_the_key(asked: Settings, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    secret = keys.add(file, "alice")
    with door_to(replace(asked, keys=file)) as door:
        good = openai.OpenAI(base_url=door.url, api_key=secret, max_retries=0)
        assert good.completions.create(**COMPLETION).choices[0].finish_reason == "stop"
        assert good.models.list().data
        bad = openai.OpenAI(base_url=door.url, api_key="sk-scalellm-wrong", max_retries=0)
        for ask in (bad.models.list, lambda: bad.completions.create(**COMPLETION)):
            with pytest.raises(openai.AuthenticationError) as caught:
                ask()
            assert caught.value.code == "invalid_api_key"
        body = json.dumps({"text": CAPITAL}).encode()
        assert post(door.predict_url, body)[0] == 401
        assert post(door.predict_url, body, Authorization=f"Bearer {secret}")[0] == 200
        codes = [status(door.root + path) for path in ("/metrics", "/status", "/v1/models", "/health", "/ready", "/")]
        assert codes == [401, 401, 401, 200, 200, 200]
        keys.remove(file, "alice")
        with pytest.raises(openai.AuthenticationError):
            good.models.list()
        assert secret not in json.dumps(door.log)


def test_a_key_has_its_own_rate_and_its_own_number_of_requests_at_work(asked: Settings, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    slow, single = keys.add(file, "slow", requests_per_minute=2), keys.add(file, "single", concurrent=1)
    with door_to(replace(asked, keys=file)) as door:
        client = openai.OpenAI(base_url=door.url, api_key=slow, max_retries=0)
        for _ in range(2):
            client.completions.create(**COMPLETION)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(**COMPLETION)
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 30
        client = openai.OpenAI(base_url=door.url, api_key=single, max_retries=0)
        with client.completions.create(model="parrot", prompt=COUNT, stream=True, **LONG) as stream:  # type: ignore[call-overload]
            next(iter(stream))
            with pytest.raises(openai.RateLimitError, match="at a time"):
                client.completions.create(**COMPLETION)
        until(lambda: door.log[-1].get("ended") == "client gone")
        client.completions.create(**COMPLETION)


def until(condition: Any, timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_body_that_is_too_large_is_refused_however_it_comes(asked: Settings) -> None:
    with door_to(replace(asked, limits=Limits(max_body_bytes=2000))) as door:
        body = json.dumps({**COMPLETION, "prompt": "x" * 3000}).encode()
        assert post(f"{door.url}/completions", body)[0] == 413
        wire = connection(door)
        wire.request("POST", "/v1/completions", iter([body[:1500], body[1500:]]), encode_chunked=True)
        response = wire.getresponse()
        assert response.status == 413
        assert error_of(response)["code"] == "request_too_large"
        assert post(f"{door.url}/completions", json.dumps(COMPLETION).encode())[0] == 200


def test_a_client_that_never_ends_its_body_is_told_so(asked: Settings) -> None:
    with door_to(replace(asked, timeouts=replace(QUICK, body_s=0.3))) as door:
        wire = connection(door)
        wire.putrequest("POST", "/v1/completions")
        wire.putheader("Content-Length", "100")
        wire.endheaders(b'{"model"')
        response = wire.getresponse()
        assert response.status == 408
        assert error_of(response)["code"] == "request_timeout"


def test_a_connection_without_a_request_is_closed(asked: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Patient, "head_s", 0.3)
    with door_to(asked) as door:
        for beginning in (b"", b"GET /health HTTP/1.1\r\nHost: x\r\n"):
            with socket.create_connection(("127.0.0.1", door.listen.port), timeout=20) as wire:
                wire.sendall(beginning)
                assert wire.recv(1) == b""
        wire = connection(door)
        for _ in range(3):
            wire.request("GET", "/health")
            response = wire.getresponse()
            assert (response.status, response.read()) == (200, b'{"status":"ok"}')


def test_a_page_of_another_site_may_not_ask_without_a_key(asked: Settings, tmp_path: Path) -> None:
    body = json.dumps({"text": CAPITAL}).encode()
    with door_to(asked) as door:
        own = door.predict_url.removesuffix("/predict")
        codes = [post(door.predict_url, body, Origin=origin)[0] for origin in ("https://example.org", "null", own)]
        assert codes == [403, 403, 200]
    secret = keys.add(tmp_path / "keys.json", "page")
    with door_to(replace(asked, keys=tmp_path / "keys.json")) as door:
        headers = {"Origin": "https://example.org", "Authorization": f"Bearer {secret}"}
        assert post(door.predict_url, body, **headers)[0] == 200


def test_when_places_and_queue_are_full_the_next_is_told_to_come_again(
    asked: Settings,
    served: Served,
) -> None:
    with door_to(replace(asked, limits=Limits(max_running=1, max_queue=1))) as door:
        client = openai.OpenAI(base_url=door.url, api_key="x", max_retries=0)
        with (
            ThreadPoolExecutor(1) as pool,
            client.completions.create(  # type: ignore[call-overload]
                model="parrot", prompt=COUNT, stream=True, **LONG
            ) as stream,
        ):
            next(iter(stream))
            waiting = pool.submit(client.completions.create, **COMPLETION)
            until(lambda: metric(door, "scalellm_gateway_waiting") == 1)
            with pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(**COMPLETION)
            assert caught.value.code == "overloaded"
            assert caught.value.response.headers["retry-after"] == "1"
            stream.close()
            assert waiting.result().choices[0].finish_reason == "stop"
    served.idle()


def metric(door: Gateway, name: str) -> float:
    with urllib.request.urlopen(f"{door.root}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


def test_a_full_engine_is_waited_for_and_in_the_end_a_429(asked: Settings, served: Served) -> None:
    """The test's engine runs 16 sequences, and as many wait."""
    hasty = replace(asked, limits=Limits(queue_s=0.5))
    with door_to(asked) as door, door_to(hasty) as other, ThreadPoolExecutor(2) as pool:
        client, impatient = (
            openai.OpenAI(base_url=one.url, api_key="x", max_retries=0, timeout=60) for one in (door, other)
        )
        many: dict[str, Any] = {"model": "parrot", "prompt": COUNT, "temperature": 0, "n": 16, "stream": True, **LONG}
        first = client.completions.create(**many)
        next(iter(first))
        waiting = pool.submit(client.completions.create, **many)
        until(lambda: served.status()["active"] == 32)
        with pytest.raises(openai.RateLimitError) as caught:
            impatient.completions.create(**COMPLETION)
        assert caught.value.code == "overloaded"
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert status(f"{other.root}/ready") == 200
        patient = pool.submit(client.completions.create, **COMPLETION)
        until(lambda: metric(door, "scalellm_gateway_running") == 3)
        first.close()
        waiting.result().close()
        assert patient.result().choices[0].finish_reason == "stop"
    served.idle()


def test_a_request_that_takes_too_long_ends_and_frees_the_engine(asked: Settings, served: Served) -> None:
    with door_to(replace(asked, timeouts=replace(QUICK, request_s=0.7))) as door:
        client = openai.OpenAI(base_url=door.url, api_key="x", max_retries=0)
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="parrot", prompt=COUNT, temperature=0, **LONG)  # type: ignore[arg-type]
        assert caught.value.status_code == 504
        stream = client.completions.create(model="parrot", prompt=COUNT, temperature=0, stream=True, **LONG)  # type: ignore[call-overload]
        with pytest.raises(openai.APIError, match="took too long"):
            list(stream)
        until(lambda: door.log[-1]["ended"] == "deadline")
    served.idle()


def test_a_client_that_does_not_read_is_cut_off(asked: Settings, served: Served) -> None:
    with door_to(replace(asked, timeouts=replace(QUICK, write_s=0.5))) as door, socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.connect(("127.0.0.1", door.listen.port))
        body = {"model": "parrot", "prompt": COUNT, "stream": True, "n": 8, "logprobs": 1, "max_tokens": 5500}
        raw = json.dumps({**body, "min_tokens": 5400}).encode()
        wire.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw)
        until(lambda: door.log and door.log[-1].get("ended") == "client too slow", 120)
    served.idle()


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """Self-signed, for 127.0.0.1: (certificate, key)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert_file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return cert_file, key_file


def test_with_a_certificate_the_doors_speak_https_only(
    asked: Settings,
    certificate: tuple[Path, Path],
    reference: Reference,
) -> None:
    cert, key = certificate
    trusting = ssl.create_default_context(cafile=str(cert))
    with door_to(asked, cert=cert, key=key) as door:
        assert door.url.startswith("https://")

        def ask(port: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
            wire = http.client.HTTPSConnection("127.0.0.1", port, context=trusting, timeout=60)
            wire.request("POST", path, json.dumps(body))
            return dict(json.loads(wire.getresponse().read()))

        expected = reference.text(CAPITAL, 60)
        assert ask(door.listen.port, "/v1/completions", COMPLETION)["choices"][0]["text"] == expected
        assert door.listen.predict_port is not None
        assert ask(door.listen.predict_port, "/predict", {"text": CAPITAL})["generated_text"] == expected
        with pytest.raises(ssl.SSLCertVerificationError):
            http.client.HTTPSConnection("127.0.0.1", door.listen.port, timeout=5).request("GET", "/health")
        plain = connection(door)
        plain.request("GET", "/health")
        with pytest.raises((OSError, http.client.HTTPException)):
            plain.getresponse()


def test_without_any_triton_a_request_is_a_503_that_says_when_to_come_again(parrot: Path) -> None:
    asked = settings_for(parrot, *unused_ports(2), timeouts=replace(QUICK, patience_s=0.5))
    with gateway(asked) as door:
        code, headers, body = post(f"{door.url}/completions", json.dumps(COMPLETION).encode())
    assert code == 503
    assert int(headers["retry-after"]) >= 1
    assert "no engine" in json.loads(body)["error"]["message"]


@contextmanager
def supervised(work: Path, repository: Path, ports: Ports) -> Iterator[serve.ServingInfo]:
    with serve.background(
        repository, ports=ports, progress=Silent(), log=work / "triton.log", server="bundled", exit_timeout_s=3
    ) as info:
        yield info


@pytest.fixture(scope="module")
def repository(parrot: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("alone")
    engine = make_engine(parrot, work / "engine")
    with workspace.draft(work / "repository", "repository", {}) as draft:
        package(engine, draft.path)
        draft.commit(versions={}, recipe="")
    return work / "repository"


KILLED = {
    "triton": "tritonserver",
    "text model": "/tensorrt_llm_bls/",
    "engine's model": "/tensorrt_llm/1/model.py",
    "engine": "engine_process.py",
}
"""What each process of a server has in its command line."""


def victim(info: serve.ServingInfo, which: str) -> int:
    """The one process of a server that is called so."""
    server = psutil.Process(info.pid)
    found = {"triton": [info.pid]}.get(which) or [
        process.pid for process in server.children(recursive=True) if KILLED[which] in " ".join(process.cmdline())
    ]
    assert len(found) == 1, found
    return found[0]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("which", KILLED)
def test_a_killed_server_is_restarted_and_nobody_who_has_seen_no_token_loses_an_answer(
    parrot: Path,
    repository: Path,
    reference: Reference,
    tmp_path: Path,
    which: str,
) -> None:
    ports = free_ports()
    asked = settings_for(parrot, ports.http, timeouts=replace(QUICK, patience_s=60))
    with supervised(tmp_path, repository, ports) as info, door_to(asked) as door, ThreadPoolExecutor(9) as pool:
        client = openai.OpenAI(base_url=door.url, api_key="x", max_retries=0)
        stream = client.completions.create(model="parrot", prompt=COUNT, temperature=0, stream=True, **LONG)  # type: ignore[call-overload]
        events = iter(stream)
        next(events)
        whole = [pool.submit(client.completions.create, **COMPLETION, n=1 + n % 2) for n in range(8)]
        os.kill(victim(info, which), signal.SIGKILL)
        with pytest.raises(openai.APIError, match="the answer ends here"):
            list(events)
        late = pool.submit(client.completions.create, **COMPLETION)
        until(lambda: status(f"{door.root}/ready") == 503)
        for answer in [*whole, late]:
            assert answer.result(120).choices[0].text == reference.text(CAPITAL, 60)
        until(lambda: status(f"{door.root}/ready") == 200)
        with urllib.request.urlopen(f"{door.root}/status") as state:
            told = json.load(state)
        assert [replica["restarts"] for replica in told["replicas"]] == [1]
        assert told["last_five_minutes"]["failed"] == 1  # the stream that was cut


@pytest.mark.timeout(300)
def test_of_two_tritons_the_other_one_answers_when_one_is_killed(
    parrot: Path,
    repository: Path,
    reference: Reference,
    tmp_path: Path,
) -> None:
    from toolchain.servers.triton.locate import find_server
    from toolchain.servers.triton.supervisor import Supervisor

    server = find_server("bundled", environ=os.environ)
    first, second = free_ports(), free_ports()
    one, two = (
        Supervisor(server, repository, ports, log=tmp_path / f"{ports.http}.log", exit_timeout_s=3)
        for ports in (first, second)
    )
    try:
        one.start()
        two.start()
        asked = settings_for(parrot, first.http, second.http, timeouts=replace(QUICK, patience_s=2))
        with door_to(asked) as door, ThreadPoolExecutor(16) as pool:
            client = openai.OpenAI(base_url=door.url, api_key="x", max_retries=0)
            until(lambda: metric_all_up(door, 2))
            before = [pool.submit(client.completions.create, **COMPLETION) for _ in range(24)]
            one.kill()
            after = [pool.submit(client.completions.create, **COMPLETION) for _ in range(24)]
            texts = {future.result(60).choices[0].text for future in [*before, *after]}
            assert texts == {reference.text(CAPITAL, 60)}
            assert status(f"{door.root}/ready") == 200
    finally:
        one.kill()
        two.kill()


def metric_all_up(door: Gateway, count: int) -> bool:
    with urllib.request.urlopen(f"{door.root}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(line.startswith("scalellm_gateway_triton_up{") and line.endswith(" 1.0") for line in lines) == count


@pytest.mark.parametrize("knows", ["the tokenizer", "the recipe's repository"])
def test_the_command_serves_until_it_is_told_to_stop_and_ends_well(
    parrot: Path, served: Served, repository: Path, tmp_path: Path, reference: Reference, knows: str
) -> None:
    port, predict_port = unused_ports(2)
    triton = f"http://127.0.0.1:{served.http_port}"
    model = ["--tokenizer", parrot, "--model-name", "parrot"]
    if knows == "the recipe's repository":
        shutil.copytree(repository, tmp_path / "tiny" / "repository")
        model = ["--recipe", "tiny"]
    command = [SCALELLM, "gateway", "--triton", triton, *model, "--port", port, "--predict-port", predict_port,
               "--work", tmp_path]  # fmt: skip
    process = subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    try:
        assert process.stdout is not None
        assert "open for the model parrot" in process.stdout.readline()
        until(lambda: status(f"http://127.0.0.1:{port}/ready") == 200)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x")
        assert client.completions.create(**COMPLETION).choices[0].text == reference.text(CAPITAL, 60)
        process.send_signal(signal.SIGTERM)
        _out, log = process.communicate(timeout=60)
        assert process.returncode == 0, log
        assert [json.loads(line)["event"] for line in log.splitlines()] == ["request"]
    finally:
        process.kill()
        process.wait()


@pytest.mark.timeout(300)
def test_serve_with_a_gateway_opens_both_and_ends_both(
    repository: Path,
    reference: Reference,
    tmp_path: Path,
) -> None:
    """The recipe's address is the gateway's (another one of this machine here): Triton is not reached there."""
    http_port, grpc_port, metrics_port, port, predict_port = unused_ports(5)
    recipe, host = tmp_path / "open.yaml", "127.0.0.2"
    recipe.write_text(f"model: {repository}\ndevice: cpu\nserve: {{host: {host}}}\n")
    flags = {"--recipe": recipe, "--repository": repository, "--http-port": http_port, "--grpc-port": grpc_port,
             "--metrics-port": metrics_port, "--gateway-port": port, "--predict-port": predict_port,
             "--work": tmp_path, "--server": "bundled"}  # fmt: skip
    argv = [str(SCALELLM), "serve", "--gateway", *(str(word) for pair in flags.items() for word in pair)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        seen: list[str] = []
        assert any(seen.append(line) or "open for the model parrot" in line for line in lines), seen  # type: ignore[func-returns-value]
        until(lambda: status(f"http://{host}:{port}/ready") == 200)
        for own in (http_port, grpc_port, metrics_port):
            socket.create_connection(("127.0.0.1", own), timeout=5).close()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((host, own), timeout=5)
        body = json.dumps({"text": CAPITAL}).encode()
        _code, _headers, answer = post(f"http://{host}:{predict_port}/predict", body)
        assert json.loads(answer)["generated_text"] == reference.text(CAPITAL, 60)
        with urllib.request.urlopen(f"http://{host}:{port}/metrics") as metrics:
            assert b"nv_inference_count" in metrics.read()
        with urllib.request.urlopen(f"http://{host}:{port}/status") as state:
            told = json.load(state)
        assert told["replicas"][0]["kv_blocks"]["total"] > 0
        assert (told["engine"]["recipe"], told["engine"]["verdict"]) == ("parrot", "not verified")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=90)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


def test_serve_with_a_gateway_for_others_needs_a_key_before_anything_starts(
    scalellm: Callable[..., subprocess.CompletedProcess[str]], repository: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "open.yaml"
    recipe.write_text(f"model: {repository}\ndevice: cpu\nserve: {{host: 0.0.0.0}}\n")
    done = scalellm("serve", "--gateway", "--recipe", recipe, "--repository", repository, "--work", tmp_path)
    assert done.returncode == 2, done.stderr
    assert "0.0.0.0 can be reached from other machines, and there is no API key" in done.stderr
    assert "ready" not in done.stdout
    assert "--insecure-open" in done.stderr
    assert "--insecure-open" in scalellm("serve", "--help").stdout
