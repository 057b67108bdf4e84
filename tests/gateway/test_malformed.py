"""A thousand malformed bodies, and what is no HTTP at all: each is refused with a reason, and the next is answered."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import random
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.e2e.served import Served
from tests.e2e.test_triton_models import CAPITAL, Reference
from tests.gateway.behind_gateway import Gateway, gateway, settings_for
from tests.gateway.test_doors import until_ready
from tests.gateway.test_safety import until

pytestmark = pytest.mark.timeout(180)
COUNT = 1000
VALID: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "parrot", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "/v1/completions": {"model": "parrot", "prompt": "Hi", "max_tokens": 2, "temperature": 0},
    "/predict": {"text": "Hi", "max_tokens": 2},
}
WHAT = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", "/predict": "text"}
"""The field that nobody may leave out."""
NUMBERS = ("max_tokens", "temperature", "top_p", "top_k")
KINDS = ("application/json", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "\\\\")
Malform = Callable[[random.Random, str, dict[str, Any]], bytes]


def cut_short(chance: random.Random, path: str, body: dict[str, Any]) -> bytes:
    text = json.dumps(body).encode()
    return text[: chance.randrange(len(text) - 1)]


def a_sign_missing(chance: random.Random, path: str, body: dict[str, Any]) -> bytes:
    text = json.dumps(body)
    place = chance.choice([number for number, sign in enumerate(text) if sign in '{}":'])
    return (text[:place] + text[place + 1 :]).encode()


def more_behind_it(chance: random.Random, path: str, body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode() + chance.choice([b"}", b"{}", b"\0", b",", b"data: [DONE]"])


def no_object(chance: random.Random, path: str, body: dict[str, Any]) -> bytes:
    return json.dumps(chance.choice([None, True, 7, 1e300, "", "Hi", [], [body], [[body]]])).encode()


def another_type(chance: random.Random, path: str, body: dict[str, Any]) -> bytes:
    field = chance.choice([WHAT[path], *NUMBERS, "stream", "seed", "stop"])
    return json.dumps({**body, field: chance.choice([{}, {"a": 1}, [[]], [None], [{"x": []}]])}).encode()


def a_number_out_of_range(chance: random.Random, path: str, body: dict[str, Any]) -> bytes:
    value = chance.choice(
        ["-1", "-7", "1e400", "-1e400", "NaN", "Infinity", "-Infinity", "1" * 5000, str(2**63), "1e99"]
    )
    return json.dumps({**body, chance.choice(NUMBERS): 4711}).replace("4711", value).encode()


def no_tokens(chance: random.Random, path: str, body: dict[str, Any]) -> bytes:
    return json.dumps({**body, "max_tokens": chance.choice([0, -1, -(2**31), 2**31, 2.5, "3", 100_000])}).encode()


def nested(chance: random.Random, path: str, body: dict[str, Any]) -> bytes:
    depth = chance.choice([500, 10_000, 100_000])
    inner = chance.choice(["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "[" * depth])
    return json.dumps({**body, WHAT[path]: 4711}).replace("4711", inner).encode()


def no_unicode(chance: random.Random, path: str, body: dict[str, Any]) -> bytes:
    text = json.dumps({**body, WHAT[path]: "4711"})
    wrong = chance.choice([b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\x80"])
    return chance.choice([text.encode().replace(b"4711", wrong), text.encode("utf-16"), text.encode("utf-32")])


def half_a_character(chance: random.Random, path: str, body: dict[str, Any]) -> bytes:
    half = chance.choice(["\\ud800", "\\udfff", "a\\uDBFF b", "\\ude00\\ud83d"])
    return json.dumps({**body, chance.choice([WHAT[path], "stop"]): "4711"}).replace("4711", half).encode()


def nothing_asked(chance: random.Random, path: str, body: dict[str, Any]) -> bytes:
    without = {name: value for name, value in body.items() if name != WHAT[path]}
    return chance.choice([b"", b" ", b"\n\n", json.dumps(without).encode(), b"{}"])


def unknown(chance: random.Random, path: str, body: dict[str, Any]) -> bytes:
    name = "".join(chance.choices("abc_.$\u00e9\U0001f600 ", k=chance.randint(1, 30))) + "x"
    return json.dumps({**body, name: chance.choice([None, 1, "x", []])}).encode()


def far_too_long(chance: random.Random, path: str, body: dict[str, Any]) -> bytes:
    words = chance.choice(["word ", "x", "\u00e9", "\U0001f600"]) * chance.choice([20_000, 100_000])
    asked = [{"role": "user", "content": words}] if WHAT[path] == "messages" else words
    return json.dumps({**body, WHAT[path]: asked, "max_tokens": 5}).encode()


def too_large(chance: random.Random, path: str, body: dict[str, Any]) -> bytes:
    return json.dumps({**body, WHAT[path]: "x" * (5 * 2**20)}).encode()


def packed(chance: random.Random, path: str, body: dict[str, Any]) -> bytes:
    return chance.choice([gzip.compress(json.dumps(body).encode()), chance.randbytes(200), b"\0" * 100])


def a_form(chance: random.Random, path: str, body: dict[str, Any]) -> bytes:
    return chance.choice([b"text=Hi&max_tokens=2", b"--x\r\nContent-Disposition: form-data\r\n\r\nHi\r\n--x--"])


def wrong_turns(chance: random.Random, path: str, body: dict[str, Any]) -> bytes:
    turns: list[Any] = [[], [{}], [None], ["Hi"], [{"role": "user"}], [{"role": "robot", "content": "Hi"}],
             [{"role": "user", "content": None}], [{"role": "user", "content": [{"type": "image_url"}]}]]  # fmt: skip
    stops: list[Any] = [[""], "", ["x"] * 17, [1], {"a": "b"}]
    wrong = {"messages": chance.choice(turns)} if WHAT[path] == "messages" else {"stop": chance.choice(stops)}
    return json.dumps({**body, **wrong}).encode()


COMMON: tuple[Malform, ...] = (
    cut_short, a_sign_missing, more_behind_it, no_object, another_type, a_number_out_of_range, no_tokens, nested,
    no_unicode, half_a_character, nothing_asked, unknown, packed, a_form, wrong_turns,
)  # fmt: skip
RARE: tuple[Malform, ...] = (far_too_long, too_large)
"""Large ones, of which a few say as much as many."""


@pytest.fixture(scope="module")
def door(parrot: Path, served: Served) -> Iterator[Gateway]:
    with gateway(settings_for(parrot, served.http_port)) as found:
        until_ready(found)
        yield found


class Client:
    """One kept connection to each address; a new one where the server has closed it."""

    def __init__(self, door: Gateway) -> None:
        self._ports = {"/predict": door.listen.predict_port or 0}
        self._other = door.listen.port
        self._open: dict[int, http.client.HTTPConnection] = {}

    def post(self, path: str, body: bytes, kind: str, *, pieces: bool = False) -> tuple[int, bytes]:
        port = self._ports.get(path, self._other)
        connection = self._open.setdefault(port, http.client.HTTPConnection("127.0.0.1", port, timeout=30))
        sent = iter([body[:1], body[1:]]) if pieces and len(body) > 1 else body
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a body that is too large is not read
            connection.request("POST", path, sent, {"Content-Type": kind} if kind else {})
        response = connection.getresponse()
        answer = response.status, response.read()
        if answer[0] == 413:
            connection.close()
        return answer


def test_a_thousand_malformed_bodies_are_each_refused_with_a_reason(door: Gateway, reference: Reference) -> None:
    chance, client = random.Random(6), Client(door)
    seen: Counter[int] = Counter()
    for number in range(COUNT):
        path = chance.choice(list(VALID))
        malform = chance.choice(RARE) if number % 50 == 0 else chance.choice(COMMON)
        body = malform(chance, path, VALID[path])
        code, answer = client.post(path, body, chance.choice(KINDS), pieces=chance.random() < 0.2)
        seen[code] += 1
        assert 400 <= code < 500, (code, malform.__name__, path, body[:300], answer[:300])
        error = json.loads(answer)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert len(error["message"]) > 10, (error, malform.__name__)
        assert "Traceback" not in error["message"]
    assert {400, 413} <= seen.keys()
    assert not [line for line in door.log if line["event"] != "request"]
    asked = {"prompt": CAPITAL, "model": "parrot", "max_tokens": 60, "temperature": 0}
    code, answer = client.post("/v1/completions", json.dumps(asked).encode(), "application/json")
    assert (code, json.loads(answer)["choices"][0]["text"]) == (200, reference.text(CAPITAL, 60))


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, id="TLS to a plain port"),
        pytest.param(b"GET\r\n\r\n", 400, id="no request line"),
        pytest.param(HEAD + b"no colon\r\n\r\n", 400, id="no header"),
        pytest.param(HEAD + b"X: " + b"x" * 70_000, 431, id="a huge header that goes on"),
        pytest.param(HEAD + b"X: x\r\n" * 12_000, 431, id="headers without an end"),
        pytest.param(HEAD + b"Content-Length: -5\r\n\r\n", 400, id="negative length"),
        pytest.param(HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef", 400, id="two lengths"),
        pytest.param(HEAD + b"Transfer-Encoding: gzip\r\n\r\nabc", 400, id="an unknown transfer encoding"),
        pytest.param(CHUNKED + b"zz\r\nabc\r\n0\r\n\r\n", 400, id="a chunk of no size"),
        pytest.param(CHUNKED + b"3\r\nabcdef\r\n0\r\n\r\n", 400, id="a chunk longer than it says"),
        pytest.param(HEAD + b"\r\n", 400, id="no body"),
    ],
)
def test_what_is_no_http_gets_an_error_object_too(door: Gateway, raw: bytes, status: int) -> None:
    with socket.create_connection(("127.0.0.1", urlsplit(door.url).port or 0), timeout=30) as sent:
        sent.sendall(raw)
        response = http.client.HTTPResponse(sent)
        response.begin()
        assert response.status == status
        assert json.loads(response.read())["error"]["message"]
    until_ready(door)


@pytest.mark.parametrize("raw", [CHUNKED + b'2\r\n{"\r\n', HEAD + b'Content-Length: 100\r\n\r\n{"model"'])
def test_a_body_that_is_cut_off_ends_its_connection_and_nothing_else(door: Gateway, raw: bytes) -> None:
    with socket.create_connection(("127.0.0.1", urlsplit(door.url).port or 0), timeout=30) as sent:
        sent.sendall(raw)
        sent.shutdown(socket.SHUT_WR)
        assert sent.recv(1) == b""
    until_ready(door)
    until(lambda: door.log[-1].get("ended") == "client gone")
    assert door.log[-1]["status"] == 499
