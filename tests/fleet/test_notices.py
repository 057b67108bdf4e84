"""Notices of clouds that take a machine away, from metadata servers that answer as the clouds say that theirs do."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from toolchain import workspace
from toolchain.errors import RecipeError
from toolchain.fleet.node.notices import Notices, clouds


class Metadata:
    """A metadata server: path -> what it answers; 404 for the rest."""

    def __init__(self) -> None:
        self.answers: dict[str, str] = {}
        self.needs: dict[str, str] = {}
        self.sessions: list[str] = []
        self.url = ""


@contextmanager
def metadata() -> Iterator[Metadata]:
    found = Metadata()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wrong = [name for name, value in found.needs.items() if self.headers.get(name) != value]
            body = found.answers.get(self.path)
            self.answer(401 if wrong else 404 if body is None else 200, body or "")

        def do_PUT(self) -> None:
            found.sessions.append(self.headers["X-aws-ec2-metadata-token-ttl-seconds"])
            found.needs = {"X-aws-ec2-metadata-token": f"session {len(found.sessions)}"}
            self.answer(200, f"session {len(found.sessions)}")

        def answer(self, status: int, body: str) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.url = f"http://127.0.0.1:{server.server_port}/"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()


def test_aws_tells_the_action_and_its_session_is_renewed() -> None:
    with metadata() as server:
        server.needs = {"X-aws-ec2-metadata-token": "none yet"}
        notices = Notices("aws", server.url)
        assert notices.look() == ""  # 404: nothing is planned
        server.answers["/latest/meta-data/spot/instance-action"] = (
            '{"action": "terminate", "time": "2026-11-22T23:00:00Z"}'
        )
        server.needs = {"X-aws-ec2-metadata-token": "another"}  # the session has run out
        assert notices.look() == ""
        assert "terminate" in notices.look()
        assert server.sessions == ["21600", "21600"]


def test_gcp_tells_true() -> None:
    with metadata() as server:
        server.needs = {"Metadata-Flavor": "Google"}
        server.answers["/computeMetadata/v1/instance/preempted"] = "FALSE"
        notices = Notices("gcp", server.url)
        assert notices.look() == ""
        server.answers["/computeMetadata/v1/instance/preempted"] = "TRUE"
        assert notices.look() == "TRUE"


def test_azure_tells_of_other_machines_too() -> None:
    with metadata() as server:
        server.needs = {"Metadata": "true"}
        server.answers["/metadata/instance/compute/name?api-version=2021-02-01&format=text"] = "vm_1"
        events = "/metadata/scheduledevents?api-version=2020-07-01"
        notices = Notices("azure", server.url)

        def tell(kind: str, *machines: str) -> str:
            event = {"EventId": "1", "EventType": kind, "ResourceType": "VirtualMachine", "Resources": machines}
            server.answers[events] = json.dumps({"DocumentIncarnation": 2, "Events": [event]})
            return notices.look()

        assert tell("Preempt", "vm_2") == ""
        assert tell("Freeze", "vm_1") == ""
        assert "Preempt" in tell("Preempt", "vm_2", "vm_1")


def test_nobody_there_is_no_notice_and_one_notice_is_told_once() -> None:
    with metadata() as server:
        url = server.url
    assert [Notices(cloud, url).look() for cloud in clouds()] == [""] * len(clouds())
    with pytest.raises(RecipeError, match="vast: its notices are not known"):
        Notices("vast")
    told: list[str] = []
    with metadata() as server:
        server.answers["/computeMetadata/v1/instance/preempted"] = "TRUE"
        Notices("gcp", server.url).watch(threading.Event(), told.append)
    assert told == ["TRUE"]


def test_every_notice_has_its_source() -> None:
    for fact in workspace.facts("spot_notices").values():
        assert fact["source"].startswith("https://")
        assert fact["date"]
        assert fact["seconds"] > 0
