"""An HTTP server that answers as OpenAI's API, Triton and ``/predict`` do, with delays that are known."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class SlowServer:
    """Waits ``first_s``, then says a word every ``next_s``. What it was asked is in ``bodies``, in order."""

    first_s: float = 0.0
    next_s: float = 0.0
    fail_every: int = 0
    """Every so many requests one is refused with 503."""
    cut_every: int = 0
    """Every so many requests one ends in the middle."""
    hangs_up_s: float | None = None
    """After each streamed answer it closes the connection so much later, without a word before."""
    serial: bool = False
    drafts: tuple[int, int] | None = None
    """(drafted, accepted) tokens of each of Triton's answers; None: it refuses to tell."""
    port: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    connections: int = 0
    most_in_flight: int = 0
    in_flight: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    turn: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class Handler(BaseHTTPRequestHandler):
    """Answers as the server's ``state`` says."""

    state: SlowServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        with self.state.lock:
            self.state.connections += 1

    def log_message(self, *_arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        pages: dict[str, Any] = {
            "/v1/models": {"data": [{"id": "slow"}]},
            "/version": {"version": "1.2.3"},
            "/v2": {"name": "triton", "version": "9"},
            "/v2/models/slow": {
                "inputs": [{"name": name} for name in ("text_input", "min_tokens", "return_perf_metrics")]
            },
        }
        self._whole(200 if self.path in pages else 404, pages.get(self.path, {}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.state.lock:
            self.state.bodies.append(body)
            number = len(self.state.bodies)
            self.state.in_flight += 1
            self.state.most_in_flight = max(self.state.most_in_flight, self.state.in_flight)
        try:
            if self.state.serial:
                with self.state.turn:
                    self._answer(number, body)
            else:
                self._answer(number, body)
        finally:
            with self.state.lock:
                self.state.in_flight -= 1

    def _answer(self, number: int, body: dict[str, Any]) -> None:
        if self.state.fail_every and number % self.state.fail_every == 0:
            self._whole(503, {"error": {"message": "too many"}})
            return
        if body.get("return_perf_metrics") and self.state.drafts is None:
            self._whole(400, {"error": "this engine does not return performance metrics"})
            return
        time.sleep(self.state.first_s)
        words = [f"w{index} " for index in range(body["max_tokens"])]
        if self.path == "/predict":
            self._whole(200, {"generated_text": "".join(words)})
            return
        cut = self.state.cut_every and number % self.state.cut_every == 0
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for index, word in enumerate(words[: len(words) // 2] if cut else words):
            time.sleep(self.state.next_s if index else 0)
            self._event(json.dumps(self._piece(word, body)))
        if cut:
            self.close_connection = True
            return
        if self.path.startswith("/v1"):
            self._event(json.dumps({"choices": [], "usage": {"completion_tokens": len(words)}}))
            self._event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")
        if self.state.hangs_up_s is not None:
            time.sleep(self.state.hangs_up_s)
            self.close_connection = True

    def _piece(self, word: str, body: dict[str, Any]) -> dict[str, Any]:
        if self.path.startswith("/v2"):
            drafted, accepted = self.state.drafts or (0, 0)
            told = {"total_draft_tokens": drafted, "total_accepted_draft_tokens": accepted}
            return {"text_output": word, **(told if body.get("return_perf_metrics") else {})}
        return {"choices": [{"delta": {"content": word}} if "chat" in self.path else {"text": word}]}

    def _event(self, data: str) -> None:
        line = f"data: {data}\n\n".encode()
        self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
        self.wfile.flush()

    def _whole(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def slow_server(**settings: Any) -> Iterator[SlowServer]:
    state = SlowServer(**settings)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Slow", (Handler,), {"state": state}))
    server.daemon_threads = True
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
