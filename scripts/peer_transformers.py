"""transformers' own `generate` behind the little of OpenAI's API that `bench_peers.py` asks. One request at a time.

    python scripts/peer_transformers.py DIR PORT [--dtype bfloat16]

Each token is sent as soon as `generate` gives it to its streamer. It is a peer to measure, not a server to use.
"""

from __future__ import annotations

import argparse
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer


class Sender(BaseStreamer):
    """Writes each token's text as an event; the first call brings the prompt."""

    def __init__(self, tokenizer: Any, write: Any) -> None:
        self.tokenizer, self.write, self.count = tokenizer, write, -1

    def put(self, value: Any) -> None:
        self.count += 1
        if self.count:
            self.write({"choices": [{"text": self.tokenizer.decode(value.tolist())}]})

    def end(self) -> None:
        self.write({"choices": [], "usage": {"completion_tokens": self.count}})


class Handler(BaseHTTPRequestHandler):
    """GET: it is there. POST: an answer in events."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    model: Any
    tokenizer: Any
    turn = threading.Lock()

    def log_message(self, *_arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with self.turn, torch.inference_mode():
            inputs = self.tokenizer(asked["prompt"], return_tensors="pt")
            length = {"max_new_tokens": asked["max_tokens"], "min_new_tokens": asked["max_tokens"]}
            sender = Sender(self.tokenizer, lambda event: self.event(json.dumps(event)))
            self.model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False,
                                streamer=sender, **length)  # fmt: skip
        self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def event(self, data: str) -> None:
        line = f"data: {data}\n\n".encode()
        self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
        self.wfile.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("port", type=int)
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args()
    Handler.model = AutoModelForCausalLM.from_pretrained(given.model, dtype=getattr(torch, given.dtype)).eval()
    Handler.tokenizer = AutoTokenizer.from_pretrained(given.model, local_files_only=True)
    ThreadingHTTPServer(("127.0.0.1", given.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
